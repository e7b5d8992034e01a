"""Whoever is to blame, and how many: they alone get the error, and finding them takes few steps."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from gpuplan.policy.concurrency import CALM_STEPS
from gpuplan.policy.core import ServingCore
from gpuplan.policy.vocabulary import (
    OUT_OF_MEMORY,
    Action,
    Arrive,
    Complete,
    Event,
    Fail,
    RunStep,
    StepDone,
    StepFailed,
)
from gpuplan.scenario.demand import BreakerSpec
from tests.policy.conftest import deployment, started


class Engine:
    """Runs one replica's steps: those that name a culprit, or too many, fail."""

    def __init__(self, core: ServingCore, *, culprits: set[int] = frozenset(), batch_max: int = 10**9) -> None:  # type: ignore[assignment]
        self.core, self.culprits, self.batch_max = core, culprits, batch_max
        self.step: RunStep | None = None
        self.completed: list[int] = []
        self.failed: list[int] = []
        self.failed_steps = 0
        self.sizes: list[int] = []

    def feed(self, event: Event) -> None:
        for action in self.core.handle(event, now_s=0.0):
            self._take(action)
        self.core.check_invariants()

    def _take(self, action: Action) -> None:
        match action:
            case RunStep():
                self.step = action
            case Complete(request_id=request_id):
                self.completed.append(request_id)
            case Fail(request_id=request_id):
                self.failed.append(request_id)

    def run(self, steps: int = 10_000) -> None:
        while self.step is not None and steps:
            step, self.step, steps = self.step, None, steps - 1
            named = {*step.decodes, *(p.request_id for p in step.prefills)}
            self.sizes.append(len(named))
            if len(named) > self.batch_max:
                self.feed(StepFailed(step.replica_id, step.step_id, OUT_OF_MEMORY))
            elif named & self.culprits:
                self.failed_steps += 1
                self.feed(StepFailed(step.replica_id, step.step_id, "engine_error"))
            else:
                self.feed(StepDone(step.replica_id, step.step_id))


@settings(deadline=None)
@given(st.integers(1, 40), st.sets(st.integers(1, 40), max_size=5), st.sampled_from(["mood", "chat"]))
def test_the_culprits_fail_and_nobody_else(count: int, culprits: set[int], model: str) -> None:
    rule = {"max_batch_size": 16, "max_queue_size": 64}
    patient = BreakerSpec(consecutive_failures=1000, window=10_000)
    replicas = {"mood": 1, "moods": rule} if model == "mood" else {"chat": [10_000], "chats": rule}
    core = started(deployment(**replicas, breakers=patient))
    engine = Engine(core, culprits=culprits)
    for i in range(1, count + 1):
        engine.feed(Arrive(i, model, 10, 3 if model == "chat" else 0))
    engine.run()
    guilty = {i for i in culprits if i <= count}
    assert set(engine.failed) == guilty and len(engine.failed) == len(guilty)
    assert sorted(engine.completed) == sorted(set(range(1, count + 1)) - guilty)
    assert core.in_flight == 0
    assert engine.failed_steps <= len(guilty) * (math.ceil(math.log2(16)) + 1)


def test_a_limit_that_was_lowered_comes_back_slowly() -> None:
    core = started(deployment(mood=1, moods={"max_batch_size": 8, "max_queue_size": 4096}))
    engine = Engine(core, batch_max=4)
    for i in range(1, 1001):
        engine.feed(Arrive(i, "mood", 10))
    engine.run(4)
    assert engine.sizes == [1, 8, 4, 4]
    engine.batch_max = 8
    engine.run(CALM_STEPS * 2)
    assert engine.sizes[3 + CALM_STEPS :][:2] == [5, 5] and engine.sizes[-1] == 6
    engine.run()
    assert engine.sizes.count(8) > 30, "all of it, in the end"
    assert len(engine.completed) == 1000 and not engine.failed


def test_a_replica_that_has_memory_for_one_serves_one_after_the_other() -> None:
    core = started(deployment(chat=[10_000], chats={"max_batch_size": 4}))
    engine = Engine(core, batch_max=1)
    for i in range(1, 9):
        engine.feed(Arrive(i, "chat", 10, 5))
    engine.run()
    assert sorted(engine.completed) == list(range(1, 9)) and not engine.failed
