"""Worker processes that simulate: bytes in, bytes out, over pipes.

A process is started by `warm` or by the first work that finds none idle, and lives until `close`. What passes are
frames (eight bytes of length, then msgpack), never pickle, and a script that uses this needs no guard around its main
part. A worker ends at once, in the midst of a simulation too, when the pipe from its parent closes: none outlives its
command.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from queue import LifoQueue
from typing import IO

from gpuplan.errors import RunError

LENGTH_BYTES = 8
WARM = 16
"""At most so many are started for work that may not come."""
START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from gpuplan.sim.processes import main; main()"
"""The same path as here, so that a worker is of the same version."""


class Processes:
    """Up to `count` worker processes; `ask` may be called from as many threads."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._idle: LifoQueue[subprocess.Popen[bytes] | None] = LifoQueue()
        for _ in range(count):
            self._idle.put(None)
        self._lock = threading.Lock()
        self._all: set[subprocess.Popen[bytes]] = set()
        self._closed = False

    def warm(self) -> None:
        """Starts processes for work to come: they take half a second until they have imported what they need."""
        slots = [self._idle.get() for _ in range(min(self.count, WARM))]
        for process in slots:
            self._idle.put(process or self._started())

    def ask(self, name: str, work: bytes) -> bytes:
        """What `candidate.answer` gives for this work, computed by the next process that is idle. Raises RunError,
        naming the work, when the process dies over it; the next work gets a new one."""
        process = self._idle.get()
        try:
            process = process or self._started()
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(OSError):
                write_frame(process.stdin, work)
            answered = read_frame(process.stdout)
            if answered is None:
                lost, process = process, None
                raise RunError(f"{name}: its simulation was lost: {self._end_of(lost)}")
            return answered
        finally:
            self._idle.put(process)

    def close(self) -> None:
        """Ends every process, whatever it does."""
        with self._lock:
            self._closed = True
            processes, self._all = self._all, set()
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def _started(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._closed:
                raise RunError("no more simulations: they were ended")
            process = subprocess.Popen(  # noqa: S603 - this very interpreter
                [sys.executable, "-c", START, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the parent, which ends its workers
            )
            self._all.add(process)
        return process

    def _end_of(self, process: subprocess.Popen[bytes]) -> str:
        code = process.wait()
        with self._lock:
            self._all.discard(process)
        return f"the process ended with exit code {code}" if code >= 0 else f"the process was killed by signal {-code}"


def write_frame(pipe: IO[bytes], body: bytes) -> None:
    """Raises OSError where nobody reads."""
    pipe.write(len(body).to_bytes(LENGTH_BYTES, "little") + body)
    pipe.flush()


def read_frame(pipe: IO[bytes]) -> bytes | None:
    """The next frame, or None when the other end is closed."""
    head = pipe.read(LENGTH_BYTES)
    if len(head) < LENGTH_BYTES:
        return None
    length = int.from_bytes(head, "little")
    body = pipe.read(length)
    return body if len(body) == length else None


# --- in the worker process ----------------------------------------------------------------------------------------


def main() -> None:
    """The worker process: answers frames on its standard input until that closes."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever prints must not print into the answers
    from gpuplan.sim.candidate import answer

    todo: LifoQueue[bytes] = LifoQueue()
    threading.Thread(target=_read, args=(todo,), daemon=True).start()
    while True:
        write_frame(answers, answer(todo.get()))


def _read(todo: LifoQueue[bytes]) -> None:
    """Ends the process, in the midst of a simulation too, when its parent is gone."""
    while (work := read_frame(sys.stdin.buffer)) is not None:
        todo.put(work)
    os._exit(0)
