"""Where a runner runs: in a process of its own, or in a thread.

`WorkerProcess` and `WorkerThread` are engines around a `Runner`. A process is the default for ONNX: CUDA sees one MIG
slice a process, a hung kernel can be killed, and its Python has a lock of its own. What passes between the two
processes over a socket pair are frames of msgpack (four bytes of length, then a message of those below), never pickle.

A process that dies, or is killed because a step outlasted its deadline, is told by `gone`; `load` starts another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import msgspec
from msgspec import Struct

from gpuplan.errors import InputError, RunError
from gpuplan.policy.vocabulary import RunStep
from gpuplan.record.run import Provenance
from gpuplan.serve import model_files
from gpuplan.serve.engines import EngineLost, OutOfMemory, Output, Prompt, Runner
from gpuplan.serve.engines.session import CPU_PROVIDER, EngineSpec, first_line
from gpuplan.serve.watchdog import Watchdog

RUNNER = "gpuplan.serve.models:runner"
"""What builds the runner of a spec, as module:function."""
FRAME_BYTES_MAX = 256 << 20
LOAD_S_MAX = 600.0
CLOSE_S_MAX = 5.0


class Load(Struct, frozen=True, tag=True):
    """Build the runner and load it."""

    build: str
    spec: EngineSpec


class Run(Struct, frozen=True, tag=True):
    """Run a step."""

    step: RunStep
    prompts: dict[int, Prompt]


class Release(Struct, frozen=True, tag=True):
    """These requests are over. There is no answer."""

    request_ids: tuple[int, ...]


class Loaded(Struct, frozen=True, tag=True):
    """The answer to Load."""

    description: str
    notes: list[str]


class Ran(Struct, frozen=True, tag=True):
    """The answer to Run."""

    outputs: dict[int, Output]


class Failed(Struct, frozen=True, tag=True):
    """The answer to either when it failed: the error's class and its text in one line."""

    kind: str
    message: str


class StepError(Exception):
    """A step failed in the worker."""


class _Worker:
    """What both kinds have in common: the model's tokenizer on this side, and what runs on the other."""

    late_s: float | None = None

    def __init__(self, spec: EngineSpec, encode: Any = None) -> None:
        self.spec = spec
        files = None if encode else model_files.read(spec.source)
        self._encode = files.encode if files else encode
        self.vocabulary_size = files.vocabulary_size if files else None
        self.description = f"ONNX Runtime, {spec.provider}"
        self._notes: list[str] = []
        self.provenance: Provenance = "cpu" if spec.provider == CPU_PROVIDER else "hardware"

    def tokenize(self, text: str) -> Sequence[int]:
        ids: Sequence[int] = self._encode(text)
        return ids

    def notes(self) -> list[str]:
        return self._notes


class WorkerThread(_Worker):
    """The runner in a thread of this process: ONNX Runtime releases the interpreter's lock while it computes."""

    def __init__(self, spec: EngineSpec, *, build: str = RUNNER, encode: Any = None) -> None:
        super().__init__(spec, encode)
        self._runner = _built(build, spec)
        self._thread: ThreadPoolExecutor | None = None

    async def load(self) -> None:
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="runner")
        await self._call(self._runner.load)
        self.description, self._notes = self._runner.description, self._runner.notes()

    def run(self, step: RunStep, prompts: Mapping[int, Prompt], *, asked_s: float) -> Awaitable[Mapping[int, Output]]:
        return self._call(self._runner.run, step, prompts)

    def release(self, request_ids: Iterable[int]) -> None:
        if self._thread is not None:
            self._thread.submit(self._runner.release, tuple(request_ids))

    async def gone(self) -> str:
        await asyncio.Event().wait()  # a thread goes with the server
        raise AssertionError("unreachable")

    async def close(self) -> None:
        if self._thread is not None:
            await self._call(self._runner.close)
            self._thread.shutdown()
            self._thread = None

    def _call(self, work: Any, *arguments: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)


class WorkerProcess(_Worker):
    """The runner in a process of its own, which `load` starts, and starts again after it was lost."""

    def __init__(self, spec: EngineSpec, *, step_timeout_s: float, build: str = RUNNER, encode: Any = None) -> None:
        super().__init__(spec, encode)
        self._build, self._step_timeout_s = build, step_timeout_s
        self._process: asyncio.subprocess.Process | None = None
        self._line: _Line | None = None
        self._why = ""

    @property
    def pid(self) -> int | None:
        """The process, while there is one."""
        return self._process.pid if self._process else None

    async def load(self) -> None:
        await self._end()
        ours, theirs = socket.socketpair()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "gpuplan.serve.worker", str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True,
                env=self._environment(),
            )  # fmt: skip
        finally:
            theirs.close()
        ours.setblocking(False)
        _, self._line = await asyncio.get_running_loop().create_connection(_Line, sock=ours)
        self._why = ""
        try:
            answer = await self._answer_to(Load(self._build, self.spec), LOAD_S_MAX)
        except EngineLost:
            why = await self.gone()
            await self._end()
            raise RunError(f"the worker process of {self.spec.source} {why} while loading") from None
        except BaseException:
            await self._end()
            raise
        if isinstance(answer, Failed):
            await self._end()
            raise RunError(answer.message)
        self.description, self._notes = answer.description, answer.notes

    def run(self, step: RunStep, prompts: Mapping[int, Prompt], *, asked_s: float) -> Awaitable[Mapping[int, Output]]:
        return self._outputs(self._answer_to(Run(step, dict(prompts)), self._step_timeout_s))

    def release(self, request_ids: Iterable[int]) -> None:
        if self._line is not None:
            self._line.send(Release(tuple(request_ids)))

    async def gone(self) -> str:
        process, line = self._process, self._line
        assert process is not None and line is not None, "load comes first"
        await line.closed.wait()
        code = await process.wait()
        return self._why or (f"ended with exit code {code}" if code >= 0 else f"was killed by signal {-code}")

    async def close(self) -> None:
        await self._end()

    async def _outputs(self, answer: Awaitable[Any]) -> Mapping[int, Output]:
        told = await answer
        if isinstance(told, Failed):
            raise OutOfMemory(told.message) if told.kind == OutOfMemory.__name__ else StepError(told.message)
        outputs: Mapping[int, Output] = told.outputs
        return outputs

    def _answer_to(self, message: Load | Run, timeout_s: float) -> asyncio.Future[Any]:
        """Sends the message now; the future raises EngineLost when no answer can come any more."""
        if self._line is None:
            lost: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            lost.set_exception(EngineLost("the worker process is not running"))
            return lost
        answer = self._line.ask(message)
        watchdog = Watchdog(timeout_s, lambda: self._overdue(answer, timeout_s))
        answer.add_done_callback(lambda _: watchdog.cancel())
        return answer

    def _overdue(self, answer: asyncio.Future[Any], timeout_s: float) -> None:
        """A kernel that hangs cannot be interrupted: the process is killed, which ends the line and so the step."""
        if answer.done():  # just now, and whoever waits for it has not had its turn
            return
        self._why = f"a step did not end within {timeout_s:g} s"
        self._kill()

    async def _end(self) -> None:
        """Closes the line, which ends a process that is well, and kills one that is not."""
        if self._line is not None:
            self._line.close()
            self._line = None
        if self._process is not None:
            try:
                await asyncio.wait_for(self._process.wait(), CLOSE_S_MAX)
            except TimeoutError:
                self._kill()
                await self._process.wait()
            self._process = None

    def _kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def _environment(self) -> dict[str, str]:
        environment = dict(os.environ)
        if self.spec.device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.spec.device
        return environment


_ENCODE = msgspec.msgpack.Encoder().encode
_ANSWERS = msgspec.msgpack.Decoder(Loaded | Ran | Failed)
_CALLS = msgspec.msgpack.Decoder(Load | Run | Release)


class _Line(asyncio.Protocol):
    """The parent's end: one question at a time, whose answer is the next frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._answer: asyncio.Future[Any] | None = None
        self._transport: Any = None
        self.closed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= 4:
            end = 4 + int.from_bytes(self._buffer[:4], "little")
            if end > FRAME_BYTES_MAX:
                self._transport.abort()
                return
            if len(self._buffer) < end:
                return
            frame = bytes(self._buffer[4:end])
            del self._buffer[:end]
            if self._answer is not None and not self._answer.done():
                self._answer.set_result(_ANSWERS.decode(frame))

    def connection_lost(self, error: Exception | None) -> None:
        self.closed.set()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(EngineLost("the worker process is gone"))

    def send(self, message: Load | Run | Release) -> None:
        if not self.closed.is_set():
            self._transport.write(_frame(message))

    def ask(self, message: Load | Run) -> asyncio.Future[Any]:
        self._answer = asyncio.get_running_loop().create_future()
        if self.closed.is_set():
            self._answer.set_exception(EngineLost("the worker process is gone"))
        self.send(message)
        return self._answer

    def close(self) -> None:
        self._transport.close()


def _frame(message: Struct) -> bytes:
    body = _ENCODE(message)
    return len(body).to_bytes(4, "little") + body


def _built(build: str, spec: EngineSpec) -> Runner:
    module, _, function = build.partition(":")
    runner: Runner = getattr(import_module(module), function)(spec)
    return runner


# --- in the worker process ----------------------------------------------------------------------------------------


def main() -> None:
    """The worker process: answers frames on the socket whose number is its argument, until its parent is gone."""
    _die_with_parent()
    line = socket.socket(fileno=int(sys.argv[1]))
    runner: Runner | None = None
    while (frame := _read(line)) is not None:
        match _CALLS.decode(frame):
            case Load(build=build, spec=spec):
                if spec.cores and hasattr(os, "sched_setaffinity"):
                    os.sched_setaffinity(0, spec.cores)
                try:
                    runner = _built(build, spec)
                    runner.load()
                    answer: Struct = Loaded(runner.description, runner.notes())
                except Exception as error:
                    answer = _failed(error)
                line.sendall(_frame(answer))
            case Run(step=step, prompts=prompts):
                assert runner is not None, "Load comes first"
                try:
                    answer = Ran(dict(runner.run(step, prompts)))
                except Exception as error:  # whatever it is, the parent must hear of it
                    answer = _failed(error)
                line.sendall(_frame(answer))
            case Release(request_ids=request_ids):
                assert runner is not None, "Load comes first"
                runner.release(request_ids)
    if runner is not None:
        runner.close()


def _failed(error: Exception) -> Failed:
    text = str(error) if isinstance(error, InputError | RunError | OutOfMemory) else f"{type(error).__name__}: {error}"
    return Failed(type(error).__name__, first_line(Exception(text)))


def _read(line: socket.socket) -> bytes | None:
    """The next frame, or None when the other end is closed."""
    head = _exactly(line, 4)
    return None if head is None else _exactly(line, int.from_bytes(head, "little"))


def _exactly(line: socket.socket, count: int) -> bytes | None:
    whole = bytearray(count)
    view = memoryview(whole)
    while view:
        try:
            received = line.recv_into(view)
        except ConnectionError:
            return None
        if not received:
            return None
        view = view[received:]
    return bytes(whole)


def _die_with_parent() -> None:
    """Asks Linux to kill this process when its parent is gone, even in the middle of a kernel that hangs."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)


if __name__ == "__main__":
    main()
