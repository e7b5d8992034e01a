"""Faults injected into a live server: what happens, in which order, and that a simulation is told the same story.

A host that is busy makes everything later and nothing earlier, so waits are tested from below.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from gpuplan.load.bench import BenchOptions, bench
from gpuplan.policy.core import ServingCore
from gpuplan.policy.vocabulary import (
    Action,
    Arrive,
    Decision,
    Event,
    ReplicaDown,
    ReplicaUp,
    RunStep,
    StepDone,
    StepFailed,
)
from gpuplan.record.run import Run
from gpuplan.scenario import deployment, files
from gpuplan.scenario.build import build
from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.deployment import Deployment
from gpuplan.scenario.schedule import build_schedule
from gpuplan.serve.engines import EngineLost
from gpuplan.serve.faults import Injection
from gpuplan.serve.server import RequestRefused, Server, Ticket
from gpuplan.sim.service_times import ServiceTimes
from gpuplan.sim.simulator import simulate
from tests.serve.test_worker import answer, step, worker

from .conftest import SCENARIO, FakeEngine


class Journal:
    """What was decided, and when."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, Event, list[Action]]] = []

    def decided(self, event: Event, actions: list[Action], *, now_s: float) -> None:
        self.rows.append((now_s, event, actions))

    def since_first_s(self, kind: type[Event], replica_id: str = "mood-0") -> list[tuple[float, Any]]:
        """Events of a kind on a replica, after the server had started, by the time since the first request."""
        first_s = next(now_s for now_s, event, _ in self.rows if type(event).__name__ == "Arrive")
        return [
            (now_s - first_s, event)
            for now_s, event, _ in self.rows
            if type(event) is kind and event.replica_id == replica_id and now_s >= first_s  # type: ignore[union-attr]
        ]

    async def until(self, kind: type[Event], count: int = 1) -> None:
        while sum(type(event) is kind for _, event, _ in self.rows) < count:
            await asyncio.sleep(0.005)


class Scene:
    """A server of fakes with faults."""

    def __init__(self, faults: list[dict[str, Any]], batching: dict[str, Any] | None = None) -> None:
        data = {**SCENARIO, "faults": faults}
        if batching:
            data["deployment"] = {**data["deployment"], "batching": {"mood": batching}}  # type: ignore[dict-item]
        self.deployment = deployment.resolve(build(data, Scenario))
        self.engines = {r.id: FakeEngine() for r in self.deployment.replicas}
        self.journal = Journal()

    def play(self, scene: Callable[[Server], Awaitable[None]]) -> None:
        async def main() -> None:
            injection = Injection(self.deployment)
            engines = {r.id: injection.into(r, self.engines[r.id]) for r in self.deployment.replicas}
            self.server = Server(self.deployment, engines, [injection, self.journal])
            await self.server.start()
            await asyncio.wait_for(scene(self.server), 20)
            self.server.core.check_invariants()
            await self.server.close()
            assert asyncio.all_tasks() == {asyncio.current_task()}, "nothing is left behind"

        asyncio.run(main())


def ask(server: Server, model: str = "mood", tokens: int = 0) -> Ticket:
    return server.submit(model, server.tokenize(model, "a b"), output_tokens=tokens)


def test_a_crash_takes_the_step_that_runs_and_the_replica_is_back_after_its_time() -> None:
    scene = Scene([{"at": 0.1, "replica": "mood-0", "crash": {"back_after": 0.4}}])
    engine = scene.engines["mood-0"]

    async def play(server: Server) -> None:
        engine.gate.clear()
        ticket = ask(server)
        await scene.journal.until(ReplicaDown)
        engine.gate.set()
        assert await answer(ticket) == "ok", "it ran again"
        assert (engine.loads, engine.closed) == (2, True), "the memory of the dead is free, and it is loaded anew"

    scene.play(play)
    ((down_s, down),), ((up_s, _),) = (scene.journal.since_first_s(kind) for kind in (ReplicaDown, ReplicaUp))
    assert 0.1 <= down_s < up_s and up_s >= 0.5
    assert down.reason == "an injected crash" and down.returns
    assert len(engine.steps) == 2


def test_a_stream_ends_when_its_replica_dies() -> None:
    scene = Scene([{"at": 0.1, "model": "chat", "crash": {"back_after": 0.0}}])

    async def play(server: Server) -> None:
        assert await answer(ask(server, "chat", 100_000)) == "replica_lost"
        await scene.journal.until(ReplicaUp, 3)
        assert await answer(ask(server, "chat", 3)) == "ok"

    scene.play(play)


def test_an_idle_replica_crashes_too_and_one_that_never_returns_has_no_requests() -> None:
    scene = Scene([{"at": 0.1, "replica": "mood-0", "crash": {}}])

    async def play(server: Server) -> None:
        assert await answer(ask(server)) == "ok"
        await scene.journal.until(ReplicaDown)
        assert await answer(ask(server)) == "no_replica", "taken while there was hope, and told when there was none"
        await scene.journal.until(ReplicaDown, 3)
        with pytest.raises(RequestRefused, match="no_replica"):
            await ask(server).next()

    scene.play(play)
    downs = [event for _, event in scene.journal.since_first_s(ReplicaDown)]
    assert [down.returns for down in downs[:2]] == [True, False]
    assert downs[1].reason == "an injected crash: mood-0 does not come back"
    assert scene.engines["mood-0"].loads == 1


def test_no_fault_comes_before_a_request() -> None:
    scene = Scene([{"at": 0.0, "replica": "mood-0", "crash": {"back_after": 0.0}}])

    async def play(server: Server) -> None:
        await asyncio.sleep(0.1)
        assert scene.journal.rows and not any(isinstance(event, ReplicaDown) for _, event, _ in scene.journal.rows)
        assert server.fleet.engines["mood-0"].notes() == []
        await answer(ask(server))
        await scene.journal.until(ReplicaDown)
        assert server.fleet.engines["mood-0"].notes() == ["injected at 0 s: crash, back after 0 s"]

    scene.play(play)


def test_a_hang_is_noticed_after_the_step_timeout() -> None:
    scene = Scene(
        [{"at": 0.0, "replica": "mood-0", "hang": {"back_after": 0.3}}], {"max_batch_size": 1, "step_timeout": 0.2}
    )

    async def play(server: Server) -> None:
        tickets = [ask(server) for _ in range(2)]
        assert [await answer(t) for t in tickets] == ["ok"] * len(tickets)

    scene.play(play)
    ((down_s, down),), ((up_s, _),) = (scene.journal.since_first_s(kind) for kind in (ReplicaDown, ReplicaUp))
    assert down_s >= 0.2 and up_s >= down_s + 0.29
    assert down.reason == "a step did not end within 0.2 s" and down.returns
    assert len(scene.engines["mood-0"].steps) == 2, "the step that hangs never reaches the engine"


def test_a_replica_that_crashes_while_it_hangs_is_lost_once() -> None:
    scene = Scene(
        [
            {"at": 0.0, "replica": "mood-0", "hang": {"back_after": 60.0}},
            {"at": 0.1, "replica": "mood-0", "crash": {"back_after": 0.0}},
        ],
        {"step_timeout": 0.3},
    )

    async def play(server: Server) -> None:
        assert await answer(ask(server)) == "ok"
        await asyncio.sleep(0.4)

    scene.play(play)
    assert [down.reason for _, down in scene.journal.since_first_s(ReplicaDown)] == ["an injected crash"]


class Steady(FakeEngine):
    """A fake whose steps take 20 ms."""

    async def run(self, step: Any, prompts: Any, *, asked_s: float) -> Any:
        await asyncio.sleep(0.02)
        return await super().run(step, prompts, asked_s=asked_s)


def test_slow_steps_take_their_factor_of_time_while_the_fault_lasts() -> None:
    scene = Scene([{"at": 0.0, "for": 0.25, "replica": "mood-0", "slow": {"factor": 10.0}}])
    scene.engines["mood-0"] = Steady()

    async def play(server: Server) -> None:
        for _ in range(12):
            await answer(ask(server))

    scene.play(play)
    begun = {a.step_id: now_s for now_s, _, actions in scene.journal.rows for a in actions if isinstance(a, RunStep)}
    took_s = [
        (begun[event.step_id] - min(begun.values()), now_s - begun[event.step_id])
        for now_s, event, _ in scene.journal.rows
        if isinstance(event, StepDone)
    ]
    assert len(took_s) == 12
    assert all(seconds >= 0.19 for at_s, seconds in took_s if at_s < 0.25)
    assert min(seconds for at_s, seconds in took_s if at_s >= 0.25) < 0.15


def test_a_slow_step_is_lost_when_the_replica_dies() -> None:
    scene = Scene(
        [
            {"at": 0.0, "replica": "mood-0", "slow": {"factor": 1000.0}},
            {"at": 0.2, "replica": "mood-0", "crash": {}},
        ]
    )
    scene.engines["mood-0"] = Steady()  # 20 s a step

    async def play(server: Server) -> None:
        assert await answer(ask(server)) == "no_replica"

    scene.play(play)


def test_the_share_of_answers_that_are_not_numbers() -> None:
    scene = Scene([{"at": 0.0, "for": 0.5, "model": "chat", "nan": {"share": 1.0}}])

    async def play(server: Server) -> None:
        assert await answer(ask(server, "chat", 3)) == "nan_output"
        assert await answer(ask(server)) == "ok", "another replica has no part in it"
        await asyncio.sleep(0.6)
        assert await answer(ask(server, "chat", 3)) == "ok"

    scene.play(play)


def test_a_step_that_is_too_large_has_no_memory() -> None:
    scene = Scene([{"at": 0.0, "replica": "mood-0", "out_of_memory": {"above_batch": 1}}])

    async def play(server: Server) -> None:
        tickets = [ask(server) for _ in range(3)]  # the first runs at once, the others together
        assert [await answer(t) for t in tickets] == ["ok"] * len(tickets)

    scene.play(play)
    (failed,) = [event for _, event, _ in scene.journal.rows if isinstance(event, StepFailed)]
    assert failed.reason == "out_of_memory"
    assert [len(step_.prefills) for step_ in scene.engines["mood-0"].steps] == [1, 1, 1]


class Endless(FakeEngine):
    """A fake whose steps take longer than any test."""

    cancelled = False

    async def run(self, step: Any, prompts: Any, *, asked_s: float) -> Any:
        self.steps.append(step)
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            self.cancelled = True
            raise


def test_what_an_engine_is_asked_when_it_is_lost_never_reaches_it() -> None:
    """A server may ask before it has heard of the loss."""
    scene, engine = Scene([{"at": 0.1, "replica": "mood-0", "crash": {}}]), Endless()

    async def main() -> None:
        injection = Injection(scene.deployment)
        faulty = injection.into(scene.deployment.replicas_of("mood")[0], engine)
        await faulty.load()
        asked_s = time.monotonic()
        injection.decided(Arrive(1, "mood", 2), [], now_s=asked_s)
        running = asyncio.ensure_future(faulty.run(*step("a"), asked_s=asked_s))
        assert await faulty.gone() == "an injected crash"
        with pytest.raises(EngineLost):
            await running
        with pytest.raises(EngineLost):
            await faulty.run(*step("a"), asked_s=asked_s + 0.2)
        await asyncio.sleep(0)
        assert len(engine.steps) == 1
        assert engine.cancelled, "nobody waits for the step that was lost"

    asyncio.run(asyncio.wait_for(main(), 20))


def test_an_engine_without_faults_is_left_as_it_is(fake_deployment: Deployment) -> None:
    async def main() -> None:
        hit = replace(fake_deployment, faults=Scene([{"at": 0, "replica": "chat-0", "hang": {}}]).deployment.faults)
        engine = FakeEngine()
        assert Injection(hit).into(hit.replicas_of("mood")[0], engine) is engine

    asyncio.run(main())


def test_a_worker_process_that_crashes_is_replaced_and_one_that_dies_by_itself_as_well() -> None:
    scene = Scene([{"at": 0.1, "replica": "mood-0", "crash": {"back_after": 0.0}}])
    engine = worker()
    scene.engines["mood-0"] = engine  # type: ignore[assignment]

    async def play(server: Server) -> None:
        assert server.fleet.engines["mood-0"].description == f"faulty, process {engine.pid}"
        pids = [engine.pid]
        await answer(ask(server))
        await scene.journal.until(ReplicaUp, 3)
        pids.append(engine.pid)
        killer = server.submit("mood", server.tokenize("mood", "kill"), output_tokens=0)
        assert await answer(killer) == "replica_lost"
        await scene.journal.until(ReplicaUp, 5)
        assert await answer(ask(server)) == "ok"
        assert len({*pids, engine.pid}) == 3
        assert server.fleet.engines["mood-0"].description == f"faulty, process {engine.pid}"

    scene.play(play)


# --- the same story -----------------------------------------------------------------------------------------------


def crashing() -> Scenario:
    """Two replicas, each with a few streams of a second at any time, one of which dies."""
    data = {
        "name": "crash",
        "seed": 5,
        "duration": 3.0,
        "models": {"chat": {"emulate": "phi-2"}},
        "traffic": [
            {
                "name": "talk",
                "model": "chat",
                "arrivals": {"process": "poisson", "rate": 10},
                "prompt_tokens": 50,
                "output_tokens": 60,
            }
        ],
        "deployment": {
            "gpu": "a100-80gb",
            "mig": ["2g.20gb", "2g.20gb"],
            "replicas": [{"model": "chat", "slice": "2g.20gb", "count": 2}],
        },
        "faults": [{"at": 1.2, "replica": "chat-0", "crash": {"back_after": 0.8}}],
    }
    scenario = build(data, Scenario)
    files.check(scenario)
    return scenario


def measured(scenario: Scenario) -> Run:
    options = BenchOptions(target="in-process", telemetry="none")
    return asyncio.run(bench(scenario, deployment.resolve(scenario), build_schedule(scenario), options))


def simulated(scenario: Scenario) -> Run:
    return simulate(
        scenario, deployment.resolve(scenario), build_schedule(scenario), ServiceTimes({}), keep_decisions=True
    )


@pytest.mark.parametrize("way", [measured, simulated])
def test_live_and_simulated_a_crash_loses_what_ran_there_and_nothing_else(way: Callable[[Scenario], Run]) -> None:
    done = way(crashing())
    rows, first_s = done.requests, done.requests["arrived_s"].min()
    lost = rows[rows["status"] != "completed"]
    assert 2 <= len(lost) <= 10 and set(lost["replica"]) == {"chat-0"} and set(lost["status"]) == {"error"}
    assert (lost["http_status"] == 200).all() and lost["tokens"].between(1, 59).all(), "they were in the middle"
    assert (lost["arrived_s"] < first_s + 1.2).all() and (lost["finished_s"] >= first_s + 1.2).all()
    kept = rows[rows["status"] == "completed"]
    assert (kept["tokens"] == 60).all()
    again_s = kept["started_s"][(kept["replica"] == "chat-0") & (kept["finished_s"] > first_s + 1.2)]
    assert len(again_s) and (again_s >= first_s + 2.0).all()
    assert "chat-0: injected at 1.2 s: crash, back after 0.8 s" in done.meta.notes
    core = ServingCore(deployment.resolve(crashing()))
    for line in done.decisions:  # what the core made of it follows from what it was told, and from nothing else
        decision = msgspec.json.decode(line, type=Decision)
        assert core.handle(decision.event, now_s=decision.at_s) == decision.actions
