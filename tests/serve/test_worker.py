"""Workers: a real process for each, that is killed, hangs, runs out of memory, and comes back."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from gpuplan.errors import RunError
from gpuplan.hardware.roofline import StepLoad
from gpuplan.policy.vocabulary import Action, Event, Prefill, ReplicaDown, ReplicaUp, RunStep
from gpuplan.scenario import deployment
from gpuplan.scenario.build import build
from gpuplan.scenario.demand import Scenario
from gpuplan.serve.engines import EngineLost, OutOfMemory, Prompt
from gpuplan.serve.engines.session import EngineSpec
from gpuplan.serve.server import RequestFailed, Server, Ticket
from gpuplan.serve.worker import StepError, WorkerProcess, WorkerThread

FAULTY = "tests.serve.faulty:build"


def worker(source: str = "one", *, step_timeout_s: float = 30.0, **spec: Any) -> WorkerProcess:
    return WorkerProcess(
        EngineSpec(source=source, role="classifier", **spec),
        step_timeout_s=step_timeout_s,
        build=FAULTY,
        encode=lambda text: list(range(len(text.split()))),
    )


def step(*texts: str) -> tuple[RunStep, dict[int, Prompt]]:
    prompts = {i: Prompt(text, [1, 2]) for i, text in enumerate(texts)}
    prefills = tuple(Prefill(i, 2, True) for i in prompts)
    return RunStep("m-0", 1, prefills, (), StepLoad(0, 0, 0, 0, len(texts)), 0), prompts


def in_time(scene: Callable[[], Awaitable[None]], seconds: float = 20.0) -> None:
    asyncio.run(asyncio.wait_for(scene(), seconds))  # type: ignore[arg-type]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_step_goes_there_and_back() -> None:
    async def scene() -> None:
        engine = worker()
        await engine.load()
        assert engine.pid != os.getpid() and engine.description == f"faulty, process {engine.pid}"
        assert engine.notes() == ["it fails on command"]
        outputs = await engine.run(*step("a", "nan"), asked_s=0.0)
        assert [(o.text, o.error) for o in outputs.values()] == [
            (f"one:{engine.pid}", None),
            (f"one:{engine.pid}", "nan_output"),
        ]
        with pytest.raises(StepError, match="ValueError: what a prompt"):
            await engine.run(*step("a", "poison"), asked_s=0.0)
        with pytest.raises(OutOfMemory, match="CUDA failure 2"):
            await engine.run(*step(*["hungry"] * 5), asked_s=0.0)
        assert len(await engine.run(*step("a"), asked_s=0.0)) == 1, "it lives after all that"
        pid = engine.pid
        await engine.close()
        assert pid is not None and not alive(pid)

    in_time(scene)


@pytest.mark.parametrize("text", ["kill", "hang"])
def test_a_process_that_dies_or_hangs_is_lost_and_loaded_again(text: str) -> None:
    async def scene() -> None:
        engine = worker(step_timeout_s=0.3 if text == "hang" else 30.0)
        await engine.load()
        first = engine.pid
        begun_s = time.monotonic()
        with pytest.raises(EngineLost):
            await engine.run(*step(text), asked_s=0.0)
        why = await engine.gone()
        assert why == ("a step did not end within 0.3 s" if text == "hang" else "was killed by signal 9")
        assert time.monotonic() - begun_s < 2.0, "noticed at once"
        with pytest.raises(EngineLost):
            await engine.run(*step("a"), asked_s=0.0)
        await engine.load()
        assert engine.pid != first and first is not None and not alive(first)
        assert (await engine.run(*step("a"), asked_s=0.0))[0].text == f"one:{engine.pid}"
        await engine.close()

    in_time(scene)


@pytest.mark.parametrize("worker_too", [False, True], ids=["the server", "the server and its worker"])
@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_worker_is_not_lost_because_its_server_stood_still(worker_too: bool, loop: Any) -> None:
    """`time.sleep` on the event loop's own thread is a server that stands still."""

    async def scene() -> None:
        engine = worker(step_timeout_s=0.5)
        await engine.load()
        assert engine.pid is not None
        running = asyncio.ensure_future(engine.run(*step("slow"), asked_s=0.0))
        await asyncio.sleep(0.05)
        if worker_too:
            os.kill(engine.pid, signal.SIGSTOP)
        time.sleep(1.0)
        if worker_too:
            os.kill(engine.pid, signal.SIGCONT)
        assert (await running)[0].text == f"one:{engine.pid}"
        await asyncio.sleep(0.1)
        assert (await engine.run(*step("a"), asked_s=0.0))[0].text == f"one:{engine.pid}", "and it lives on"
        with pytest.raises(EngineLost):
            await engine.run(*step("hang"), asked_s=0.0)
        assert await engine.gone() == "a step did not end within 0.5 s", "one that hangs is found all the same"
        await engine.close()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(asyncio.wait_for(scene(), 20))  # type: ignore[arg-type]


def test_a_model_that_does_not_load_says_so_and_leaves_no_process(tmp_path: Path) -> None:
    async def scene() -> None:
        for word, said in (("broken", "the file is broken"), ("deadly", "was killed by signal 9 while loading")):
            (tmp_path / "m").write_text(word)
            engine = worker(str(tmp_path / "m"))
            with pytest.raises(RunError, match=said):
                await engine.load()
            assert engine.pid is None

    in_time(scene)


def test_a_worker_does_not_outlive_its_server() -> None:
    async def scene() -> None:
        code = (
            "import asyncio, sys; from tests.serve.test_worker import worker, step\n"
            "async def main():\n"
            "    engine = worker(); await engine.load(); print(engine.pid, flush=True)\n"
            "    await engine.run(*step('hang'), asked_s=0.0)\n"
            "asyncio.run(main())"
        )
        server = await asyncio.create_subprocess_exec(
            os.sys.executable,
            "-c",
            code,
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parents[2],  # type: ignore[attr-defined]
        )
        assert server.stdout is not None
        pid = int(await server.stdout.readline())
        await asyncio.sleep(0.2)
        server.kill()
        await server.wait()
        while alive(pid):
            await asyncio.sleep(0.02)

    in_time(scene)


def test_a_worker_s_threads_stay_on_its_cores() -> None:
    async def scene() -> None:
        core = min(os.sched_getaffinity(0))
        engine = worker(cores=(core,))
        await engine.load()
        assert engine.pid is not None and os.sched_getaffinity(engine.pid) == {core}
        await engine.close()

    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system binds no process to cores")
    in_time(scene)


def test_a_thread_is_an_engine_too() -> None:
    async def scene() -> None:
        engine = WorkerThread(EngineSpec(source="one", role="classifier"), build=FAULTY, encode=list)
        for _ in range(2):
            await engine.load()
            assert (await engine.run(*step("a"), asked_s=0.0))[0].text == f"one:{os.getpid()}"
            engine.release([0])
            await engine.close()
        await engine.close()

    in_time(scene)


# --- behind a server ----------------------------------------------------------------------------------------------


class Heard:
    """What the core was told of replicas."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def decided(self, event: Event, actions: list[Action], *, now_s: float) -> None:
        if isinstance(event, ReplicaUp):
            self.events.append(f"{event.replica_id} up")
        if isinstance(event, ReplicaDown):
            self.events.append(f"{event.replica_id} down: {event.reason}")


def serve(scene: Callable[[Server, Heard], Awaitable[None]], *, replicas: int = 1, **rule: Any) -> None:
    """Runs a scene on a server whose every replica is a worker process that fails on command."""
    data = {
        "name": "faults",
        "models": {"m": {"emulate": "bert-base"}},
        "deployment": {
            "gpu": "a100-80gb",
            "mig": ["1g.10gb"] * 7,
            "replicas": [{"model": "m", "slice": "1g.10gb", "count": replicas}],
            "batching": {"m": {"max_batch_size": 8, **rule}},
        },
    }
    supply = deployment.resolve(build(data, Scenario))

    async def main() -> None:
        heard = Heard()
        server = Server(supply, {r.id: worker(r.id, step_timeout_s=0.5) for r in supply.replicas}, [heard])
        await server.start()
        await scene(server, heard)
        server.core.check_invariants()
        await server.close()

    in_time(main, 30.0)


def ask(server: Server, *texts: str) -> list[Ticket]:
    return [server.submit("m", Prompt(text, [1]), output_tokens=0) for text in texts]


async def answer(ticket: Ticket) -> str:
    """`ok`, or why not."""
    try:
        return "ok" if [output async for output in ticket] else "nothing"
    except RequestFailed as failed:
        return str(failed)


def test_what_kills_workers_is_found_and_its_batch_mates_are_answered() -> None:
    async def scene(server: Server, heard: Heard) -> None:
        tickets = ask(server, "slow", "a", "kill", "b", "c")
        assert [await answer(t) for t in tickets] == ["ok", "ok", "replica_lost", "ok", "ok"]
        assert heard.events == ["m-0 up", *["m-0 down: was killed by signal 9", "m-0 up"] * 2], "two, and no third"
        assert [await answer(t) for t in ask(server, "a")] == ["ok"]

    serve(scene)


def test_another_replica_takes_over() -> None:
    async def scene(server: Server, heard: Heard) -> None:
        (running,) = ask(server, "slow")
        pid = server.fleet.engines["m-0"].pid  # type: ignore[attr-defined]
        await asyncio.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        assert [output.text async for output in running] == [f"m-1:{server.fleet.engines['m-1'].pid}"]  # type: ignore[attr-defined]
        while heard.events[-1] != "m-0 up":
            await asyncio.sleep(0.01)
        assert server.core.ready()

    serve(scene, replicas=2)


def test_an_idle_worker_that_is_killed_comes_back() -> None:
    async def scene(server: Server, heard: Heard) -> None:
        os.kill(server.fleet.engines["m-0"].pid, signal.SIGKILL)  # type: ignore[attr-defined]
        while heard.events[-1] == "m-0 up":
            await asyncio.sleep(0.005)
        assert not server.core.ready()
        assert [await answer(t) for t in ask(server, "a", "b")] == ["ok", "ok"], "they waited for it"
        assert heard.events == ["m-0 up", "m-0 down: was killed by signal 9", "m-0 up"]

    serve(scene)


def test_a_hung_step_costs_its_deadline_and_its_culprit() -> None:
    async def scene(server: Server, heard: Heard) -> None:
        assert [await answer(t) for t in ask(server, "hang", "a")] == ["replica_lost", "ok"]
        assert heard.events.count("m-0 down: a step did not end within 0.5 s") == 2

    serve(scene)


def test_without_memory_batches_are_split_and_all_are_answered() -> None:
    async def scene(server: Server, heard: Heard) -> None:
        tickets = ask(server, "slow", *["hungry"] * 8)
        assert {await answer(t) for t in tickets} == {"ok"}
        assert heard.events == ["m-0 up"]

    serve(scene)


def test_one_bad_item_fails_alone() -> None:
    async def scene(server: Server, heard: Heard) -> None:
        tickets = ask(server, "slow", "a", "poison", "b", "nan", "c")
        assert [await answer(t) for t in tickets] == ["ok", "ok", "engine_error: StepError", "ok", "nan_output", "ok"]

    serve(scene)
