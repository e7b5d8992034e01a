"""Replicas of two models come and go on the same slices, are killed, and cannot be started: whatever the order, each
slice has one of them at most, everybody gets an end, and afterwards both models serve again."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from gpuplan.policy.core import ServingCore
from gpuplan.policy.vocabulary import (
    Action,
    Arrive,
    Cancel,
    Complete,
    Decision,
    Event,
    Fail,
    Reject,
    ReplicaDown,
    ReplicaUp,
    RunStep,
    Scale,
    StartReplica,
    StepDone,
    StepFailed,
    StopReplica,
    Wake,
)
from gpuplan.scenario import deployment as supply
from gpuplan.scenario.demand import BreakerSpec
from gpuplan.scenario.deployment import Deployment
from tests.policy.conftest import started
from tests.policy.test_core_properties import assert_replays
from tests.policy.test_scaling import assert_alone_on_its_slice, scenario

MODELS = ("chat", "news")
SLICES = 4


class Fleet:
    """A core, and replicas that do as it says: they start after the cold start, if they can be, and stop in time."""

    def __init__(self, deployment: Deployment, rng: random.Random) -> None:
        self.cold_start_s = deployment.autoscale.cold_start
        self.core: ServingCore = started(deployment)
        self.rng = rng
        self.now_s = 0.0
        self.log: list[Decision] = [Decision(0.0, ReplicaUp(r.id), []) for r in deployment.replicas]
        self.up = {r.id for r in deployment.replicas}
        self.steps: dict[str, RunStep] = {}
        self.due: dict[str, tuple[float, Event]] = {}  # what is to happen to a replica that is not up, and when
        self.starting: set[str] = set()
        self.open: set[int] = set()
        self.answered: set[int] = set()
        self.asked = 0

    def feed(self, event: Event) -> None:
        actions = self.core.handle(event, now_s=self.now_s)
        self.log.append(Decision(self.now_s, event, actions))
        self.core.check_invariants()
        assert_alone_on_its_slice(self.core)
        for action in actions:
            self._do(action)

    def _do(self, action: Action) -> None:
        match action:
            case RunStep(replica_id=replica_id):
                assert replica_id in self.up and replica_id not in self.steps, "it is there, and has nothing to do"
                self.steps[replica_id] = action
            case Complete(request_id=request_id) | Fail(request_id=request_id) | Reject(request_id=request_id):
                self.open.remove(request_id)
                if isinstance(action, Complete):
                    self.answered.add(request_id)
            case StartReplica(replica_id=replica_id):
                assert replica_id not in self.up and replica_id not in self.due, "it stood by"
                self.due[replica_id] = (self.now_s + self.cold_start_s, ReplicaUp(replica_id))
                self.starting.add(replica_id)
            case StopReplica(replica_id=replica_id):
                assert replica_id not in self.steps and replica_id not in self.starting, "it was up, and runs nothing"
                self.up.discard(replica_id)
                after_s = self.rng.choice([0.0, 0.3, 2.0])
                self.due[replica_id] = (self.now_s + after_s, ReplicaDown(replica_id, "scaled down"))
            case Scale(model=model, replicas=replicas):
                assert 0 <= replicas <= SLICES - 1, f"{model} keeps to its rule"

    def pass_time(self, seconds: float) -> None:
        """Whatever falls due meanwhile happens, each at its time."""
        until_s = self.now_s + seconds
        while True:
            timer_s = self.core.next_timer_s()
            at_s, replica_id = min(
                ((at_s, r) for r, (at_s, _) in self.due.items()), default=(float("inf"), ""), key=lambda due: due
            )
            if min(at_s, timer_s if timer_s is not None else float("inf")) > until_s:
                break
            if timer_s is not None and timer_s < at_s:
                self.now_s = max(self.now_s, timer_s)
                self.feed(Wake())
                later_s = self.core.next_timer_s()
                assert later_s is None or later_s > self.now_s, "a timer that has fired does not fire again at once"
            else:
                self.now_s = max(self.now_s, at_s)
                event = self.due.pop(replica_id)[1]
                self.starting.discard(replica_id)
                if isinstance(event, ReplicaUp):
                    self.up.add(replica_id)
                self.feed(event)
        self.now_s = until_s

    # --- what may happen ------------------------------------------------------------------------------------------

    def ask(self, model: str, prompt: int, output: int, timeout_s: float | None = None) -> int:
        self.asked += 1
        self.open.add(self.asked)
        self.feed(Arrive(self.asked, model, prompt, output, timeout_s=timeout_s))
        return self.asked

    def hang_up(self) -> None:
        if self.open:
            request_id = self.rng.choice(sorted(self.open))
            self.open.remove(request_id)
            self.feed(Cancel(request_id))

    def kill(self) -> None:
        if self.up:
            replica_id = self.rng.choice(sorted(self.up))
            self.up.remove(replica_id)
            self.steps.pop(replica_id, None)
            self.due[replica_id] = (self.now_s + self.rng.choice([0.1, 3.0]), ReplicaUp(replica_id))
            self.feed(ReplicaDown(replica_id, "killed", returns=True))

    def fail_to_start(self) -> None:
        """The first try; the fleet tries again."""
        if self.starting:
            replica_id = self.rng.choice(sorted(self.starting))
            self.due[replica_id] = (self.due[replica_id][0] + 3.0, ReplicaUp(replica_id))
            self.feed(ReplicaDown(replica_id, "cannot be loaded"))

    def end_step(self, *, fails: bool = False, early: bool = False) -> None:
        if self.steps:
            step = self.steps.pop(self.rng.choice(sorted(self.steps)))
            self.pass_time(self.rng.choice([0.001, 0.01, 0.3]))
            if step.replica_id not in self.up:
                return  # it was killed meanwhile
            if fails:
                self.feed(StepFailed(step.replica_id, step.step_id, "engine_error"))
            else:
                ended = step.answered()[:1] if early else ()
                self.feed(StepDone(step.replica_id, step.step_id, ended))

    def calm(self, until: Callable[[], bool], turns: int) -> bool:
        """Nothing goes wrong any more, and steps end."""
        for _ in range(turns):
            if until():
                return True
            if self.steps:
                self.end_step()
            else:
                self.pass_time(0.5)
        return until()


def two_models(rng: random.Random) -> Deployment:
    rules: dict[str, dict[str, Any]] = {m: {"min_replicas": rng.choice([0, 1]), "max_replicas": 3} for m in MODELS}
    deployment = supply.resolve(scenario(SLICES, rules, cold_start=rng.choice([0.5, 5.0, 20.0])))
    batching = {
        model: msgspec.structs.replace(rule, max_batch_size=rng.choice([1, 4]), max_queue_size=rng.choice([4, 64]))
        for model, rule in deployment.batching.items()
    }
    breakers = BreakerSpec(consecutive_failures=3, open=1, open_max=4, slow_factor=3)
    return replace(deployment, batching=batching, breakers=breakers)


@pytest.mark.parametrize("seed", range(60))
def test_replicas_come_and_go_and_nobody_is_forgotten(seed: int) -> None:
    rng = random.Random(seed)
    deployment = two_models(rng)
    fleet = Fleet(deployment, rng)
    happenings: list[Callable[[], object]] = [
        lambda: fleet.ask(
            rng.choice(MODELS), rng.choice([10, 100, 10**6]), rng.choice([1, 5, 500]), rng.choice([None, 3.0, 30.0])
        ),
        lambda: fleet.end_step(fails=rng.random() < 0.4, early=rng.random() < 0.7),
        lambda: fleet.pass_time(rng.choice([0.05, 0.5, 1.0])),
        fleet.hang_up,
        fleet.kill,
        fleet.fail_to_start,
    ]
    for happen in rng.choices(happenings, [40, 25, 20, 10, 3, 2], k=500):
        happen()
    assert fleet.calm(lambda: fleet.core.in_flight == 0, 20_000), "everybody gets an end"
    assert not fleet.open
    for model in MODELS:
        for _ in range(100):
            asked = fleet.ask(model, 10, 2)
            fleet.calm(lambda asked=asked: asked not in fleet.open, 200)  # type: ignore[misc]
            if asked in fleet.answered:
                break
            fleet.pass_time(0.5)
        else:
            raise AssertionError(f"{model} never serves again")
    assert_replays(deployment, fleet.log)
