"""Whatever happens, in whatever order: the state stays sound and every admitted request ends exactly once."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuplan.policy.core import ServingCore
from gpuplan.policy.vocabulary import (
    Action,
    Arrive,
    Assign,
    Cancel,
    Complete,
    Decision,
    Drain,
    Event,
    Fail,
    Knock,
    Reject,
    ReplicaDown,
    ReplicaUp,
    RunStep,
    StepDone,
    StepFailed,
    Swap,
    Trip,
    Unload,
    VersionAdded,
    VersionDropped,
    Wake,
)
from gpuplan.scenario import deployment as supply
from gpuplan.scenario import files
from gpuplan.scenario.demand import AdmissionSpec, BreakerSpec, ClassSpec, RateLimit
from gpuplan.scenario.deployment import Deployment
from gpuplan.scenario.engine import BUILT_IN, Engine
from gpuplan.scenario.schedule import build_schedule
from gpuplan.sim.service_times import ServiceTimes
from gpuplan.sim.simulator import simulate
from tests.conftest import REPOSITORY
from tests.policy.conftest import deployment

REPLICAS = ("mood-0", "mood-1", "chat-0", "chat-1")


CLASSES = {
    "urgent": ClassSpec(priority=0, deadline=2.0),
    "bulk": ClassSpec(priority=2, max_queue_size=2, rate_limit=RateLimit(requests_per_s=4, tokens_per_s=200, burst=2)),
    "plain": ClassSpec(priority=1),
}


IN_BLOCKS = Engine("vllm", block_size=4, prefix_caching=True, schedules_ahead=True)


def small(engine: Engine = BUILT_IN) -> Deployment:
    """Two replicas each of a classifier and a decoder, all of it so small that every limit is met often."""
    return deployment(
        mood=2,
        chat=[40, 80],
        moods={"max_batch_size": 3, "max_queue_size": 3, "max_queue_delay": 0.2},
        chats={"max_batch_size": 3, "max_queue_size": 3, "max_batch_tokens": 16, "step_time_target": 0.1},
        admission=AdmissionSpec(classes=CLASSES, per_key=RateLimit(requests_per_s=20, burst=1), ageing=0.5),
        breakers=BreakerSpec(consecutive_failures=3, window=8, slow_factor=3, open=0.5, open_max=2),
        engine=engine,
    )


class Driver:
    """Feeds a core and holds every action against what has gone before."""

    def __init__(self, deployment: Deployment) -> None:
        self.core = ServingCore(deployment)
        self.now_s = 0.0
        self.log: list[Decision] = []
        self.running: dict[str, RunStep] = {}
        self.old_steps: list[StepDone] = []
        self.asked = 0
        self.door: dict[int, str] = {}  # those that have knocked and are not in yet: their class
        self.open: set[int] = set()
        self.started: set[int] = set()
        self.breakers: dict[str, str] = {}
        self.cancelled: set[int] = set()
        self.ended: set[int] = set()
        self.serving = {"mood": ["mood-0", "mood-1"], "chat": ["chat-0", "chat-1"]}
        self.coming: dict[str, list[str]] = {}  # by model: versions that wait for the old ones to be unloaded
        self.leaving: set[str] = set()
        self.returning: set[str] = set()
        self.unloaded: list[str] = []
        self.versions = 1

    def feed(self, event: Event) -> None:
        actions = self.core.handle(event, now_s=self.now_s)
        self.core.check_invariants()
        self.log.append(Decision(self.now_s, event, actions))
        if isinstance(event, Arrive):
            self.open.add(event.request_id)
        for action in actions:
            self._hold(event, action)
        while self.unloaded:
            self._unloaded(self.unloaded.pop(0))

    def _hold(self, event: Event, action: Action) -> None:
        match action:
            case RunStep(replica_id=replica_id, prefills=prefills, decodes=decodes, load=load):
                named = [p.request_id for p in prefills] + list(decodes)
                assert replica_id not in self.running, "a replica runs one step at a time"
                assert named and len(named) == len(set(named)), "something to do, and each request once"
                assert set(named) <= self.open, "only requests that are open: not ended, not cancelled"
                assert load.samples == len(action.answered()), "who gets a token needs the output head"
                self.running[replica_id] = action
                self.started |= set(named)
            case Assign(request_id=request_id, taken_from=taken_from):
                assert request_id in self.open, "whoever waits is open"
                assert not taken_from or request_id not in self.started or isinstance(event, ReplicaDown), (
                    "what has started is not moved, but for what is lost"
                )
                if isinstance(event, ReplicaDown):
                    self.started.discard(request_id)
            case Trip(name=name, state=state):
                assert (self.breakers.get(name, "closed"), state) in TRIPS
                self.breakers[name] = state
            case Reject(request_id=request_id):
                assert isinstance(event, Arrive | Knock) and event.request_id == request_id, "only who has just come"
                self.open.discard(request_id)
                self.door.pop(request_id, None)
            case Complete(request_id=request_id) | Fail(request_id=request_id):
                assert request_id not in self.ended, "an end comes once"
                self.open.remove(request_id)
                self.ended.add(request_id)
            case Unload(replica_id=replica_id):
                assert replica_id in self.leaving, "only what was taken over from"
                assert replica_id not in self.running, "and nothing runs there"
                self.leaving.remove(replica_id)
                self.unloaded.append(replica_id)

    def _unloaded(self, replica_id: str) -> None:
        """As a fleet does: a new version that waited for this place takes over as soon as all old ones are gone."""
        model = replica_id.partition("-")[0]
        self.feed(VersionDropped(replica_id))
        if model in self.coming and not any(r.startswith(model) for r in self.leaving):
            self.serving[model] = self.coming.pop(model)
            self.feed(Swap(model, tuple(self.serving[model])))

    # --- what may happen ------------------------------------------------------------------------------------------

    def arrive(self, model: str, prompt: int, output: int) -> None:
        """Without a class, a key, or a knock."""
        self.asked += 1
        spans = ((("a", "b")[self.asked % 2], min(prompt, 10)),)
        self.feed(Arrive(self.asked, model, prompt, output if model == "chat" else 0, spans=spans))

    def knock(self, traffic_class: str) -> None:
        self.asked += 1
        self.door[self.asked] = traffic_class
        self.feed(Knock(self.asked, traffic_class, f"key-{self.asked % 2}"))

    def come_in(self, model: str, prompt: int, output: int) -> None:
        if self.door:
            request_id = min(self.door)
            who = {"traffic_class": self.door.pop(request_id), "key": f"key-{request_id % 2}"}
            timeout_s = 3.0 if request_id % 3 == 0 else None
            output = output if model == "chat" else 0
            self.feed(Arrive(request_id, model, prompt, output, timeout_s=timeout_s, **who))

    def step_over(self, which: int, failed: bool, ended: int) -> None:
        if self.running:
            step = self.running.pop(sorted(self.running)[which % len(self.running)])
            early, rest = step.answered()[:ended], step.answered()[ended:]
            bad = tuple((request_id, "nan_output") for request_id in rest[:1] if which % 7 == 0)
            over = StepDone(step.replica_id, step.step_id, early, bad)
            self.old_steps.append(over)
            self.feed(StepFailed(step.replica_id, step.step_id, "engine_error") if failed else over)

    def stale(self, which: int) -> None:
        if self.old_steps:
            before = self.core.in_flight
            self.feed(self.old_steps[which % len(self.old_steps)])
            assert self.log[-1].actions == [] and self.core.in_flight == before, "a stale event does nothing"

    def cancel(self, which: int) -> None:
        if which % 4 and self.open:
            request_id = sorted(self.open)[which % len(self.open)]
        else:
            request_id = 1 + which % (self.asked + 1)  # some never were, some have ended
        self.door.pop(request_id, None)
        if request_id in self.open:
            self.open.remove(request_id)
            self.cancelled.add(request_id)
        self.feed(Cancel(request_id))

    def down(self, which: int, returns: bool) -> None:
        there = sorted([r for ids in self.serving.values() for r in ids] + list(self.leaving))
        if not there:
            return
        replica_id = there[which % len(there)]
        step = self.running.pop(replica_id, None)
        if step is not None:
            self.old_steps.append(StepDone(replica_id, step.step_id))
        returns = returns and replica_id not in self.leaving
        (self.returning.add if returns else self.returning.discard)(replica_id)
        self.feed(ReplicaDown(replica_id, returns=returns))

    def up(self, which: int) -> None:
        there = sorted(r for ids in self.serving.values() for r in ids)
        if there:
            self.returning.discard(there[which % len(there)])
            self.feed(ReplicaUp(there[which % len(there)]))

    def swap(self, model: str, beside: bool, fails: bool) -> None:
        """One at a time for each model."""
        if model in self.coming or any(r.startswith(model) for r in self.leaving):
            return
        self.versions += 1
        old, new = self.serving[model], [f"{model}-{i}#{self.versions}" for i in (0, 1)]
        for replica_id in new:
            self.feed(VersionAdded(replica_id, replica_id.partition("#")[0], returns=not beside))
        if fails:
            for replica_id in new:
                self.feed(VersionDropped(replica_id))
            return
        self.leaving |= set(old)
        self.returning -= set(old)
        self.serving[model] = new if beside else []
        if not beside:
            self.coming[model] = new
        self.feed(Swap(model, tuple(new) if beside else (), tuple(old)))

    def wake(self) -> None:
        timer_s = self.core.next_timer_s()
        if timer_s is not None:
            self.now_s = max(self.now_s, timer_s)
            self.feed(Wake())
            later_s = self.core.next_timer_s()
            assert later_s is None or later_s > self.now_s, "a timer that has fired does not fire again at once"

    def advance(self, seconds: float) -> None:
        self.now_s += seconds

    def drain(self) -> None:
        """Nothing new; whatever runs is finished."""
        self.feed(Drain())
        while self.door:
            self.feed(Cancel(self.door.popitem()[0]))
        for replica_id in sorted(self.returning):
            self.feed(ReplicaUp(replica_id))
        for _ in range(10_000):
            if self.running:
                self.step_over(0, failed=False, ended=0)
            elif self.core.next_timer_s() is not None:
                self.wake()
            else:
                return
        raise AssertionError("it does not come to an end")


TRIPS = {("closed", "open"), ("open", "half_open"), ("half_open", "open"), ("half_open", "closed")}
WHICH = st.integers(0, 40)
HAPPENINGS = st.one_of(
    st.tuples(st.just("arrive"), st.sampled_from(["mood", "chat"]), st.integers(1, 60), st.integers(1, 8)),
    st.tuples(st.just("arrive"), st.just("chat"), st.integers(1, 30), st.integers(1, 8)),
    st.tuples(st.just("knock"), st.sampled_from([*CLASSES, "unknown"])),
    st.tuples(st.just("come_in"), st.sampled_from(["mood", "chat"]), st.integers(1, 60), st.integers(1, 8)),
    st.tuples(st.just("step_over"), WHICH, st.integers(0, 9).map(lambda n: n == 0), st.integers(0, 2)),
    st.tuples(st.just("step_over"), WHICH, st.just(False), st.just(0)),
    st.tuples(st.just("stale"), WHICH),
    st.tuples(st.just("cancel"), WHICH),
    st.tuples(st.just("down"), WHICH, st.booleans()),
    st.tuples(
        st.just("swap"), st.sampled_from(["mood", "chat"]), st.booleans(), st.integers(0, 3).map(lambda n: n == 0)
    ),
    st.tuples(st.just("up"), WHICH),
    st.tuples(st.just("wake")),
    st.tuples(st.just("advance"), st.sampled_from([0.0, 0.05, 0.2, 3.0])),
)


@settings(max_examples=200, deadline=None)
@given(
    up_at_first=st.sets(st.sampled_from(REPLICAS)),
    happenings=st.lists(HAPPENINGS, max_size=60),
    engine=st.sampled_from((BUILT_IN, IN_BLOCKS)),
)
def test_every_admitted_request_ends_once_and_a_replay_decides_the_same(
    up_at_first: set[str], happenings: list[tuple[Any, ...]], engine: Engine
) -> None:
    assert_sound(up_at_first, happenings, engine)


@pytest.mark.parametrize("engine", [BUILT_IN, IN_BLOCKS], ids=lambda engine: engine.name)
@pytest.mark.parametrize("seed", range(40))
def test_the_same_on_long_walks(seed: int, engine: Engine) -> None:
    """Long enough for rare states: a batch, a queue and a KV cache that are full while replicas come and go."""
    rng = random.Random(seed)
    kinds: list[Callable[[], tuple[Any, ...]]] = [
        lambda: ("arrive", rng.choice(["mood", "chat"]), rng.randint(1, 60), rng.randint(1, 8)),
        lambda: ("knock", rng.choice([*CLASSES, "unknown"])),
        lambda: ("come_in", rng.choice(["mood", "chat"]), rng.randint(1, 60), rng.randint(1, 8)),
        lambda: ("step_over", rng.randrange(4), rng.random() < 0.1, rng.choice([0, 0, 1])),
        lambda: ("advance", rng.choice([0.0, 0.05, 0.2])),
        lambda: ("wake",),
        lambda: ("cancel", rng.randrange(10_000)),
        lambda: ("stale", rng.randrange(10_000)),
        lambda: ("up", rng.randrange(4)),
        lambda: ("down", rng.randrange(4), rng.random() < 0.5),
        lambda: ("swap", rng.choice(["mood", "chat"]), rng.random() < 0.5, rng.random() < 0.2),
    ]
    weights = [20, 14, 12, 40, 10, 8, 10, 3, 2, 1, 2]
    assert_sound(set(REPLICAS), [kind() for kind in rng.choices(kinds, weights, k=400)], engine)


def assert_sound(up_at_first: set[str], happenings: list[tuple[Any, ...]], engine: Engine) -> None:
    driver = Driver(small(engine))
    for replica_id in sorted(up_at_first):
        driver.feed(ReplicaUp(replica_id))
    for name, *arguments in happenings:
        happen: Callable[..., None] = getattr(driver, name)
        happen(*arguments)
    driver.drain()
    assert not driver.open, "neither ended nor cancelled"
    assert driver.core.in_flight == 0
    assert driver.core.at_the_door == 0
    assert not driver.leaving and not driver.coming, "every swap has come to its end"
    assert not driver.ended & driver.cancelled
    assert_replays(small(engine), driver.log)


def assert_replays(deployment: Deployment, log: list[Decision]) -> None:
    core = ServingCore(deployment)
    for decision in log:
        assert core.handle(decision.event, now_s=decision.at_s) == decision.actions


@pytest.mark.parametrize("name", ["quickstart", "azure-code"])
def test_a_recorded_log_replays_into_a_fresh_core(name: str) -> None:
    scenario = files.load(REPOSITORY / "scenarios" / f"{name}.yaml")
    answers = supply.resolve(scenario)
    run = simulate(scenario, answers, build_schedule(scenario), ServiceTimes({}), keep_decisions=True)
    decoder = msgspec.json.Decoder(Decision)
    log = [decoder.decode(line) for line in run.decisions]
    assert sum(isinstance(d.event, Arrive) for d in log) == len(run.requests)
    assert_replays(answers, log)
