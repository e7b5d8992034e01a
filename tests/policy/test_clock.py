"""What a clock that jumps does to the core: backwards nothing, forwards only what is due."""

from __future__ import annotations

import random

import pytest

from gpuplan.policy.core import ServingCore
from gpuplan.policy.vocabulary import Action, Arrive, Complete, Event, Fail, RunStep, StepDone, Trip, Wake
from gpuplan.scenario.demand import AdmissionSpec, ClassSpec, RateLimit
from gpuplan.scenario.deployment import Deployment
from tests.policy.conftest import deployment, started

RULES = AdmissionSpec(
    classes={"soon": ClassSpec(deadline=2.0), "some": ClassSpec(rate_limit=RateLimit(requests_per_s=5, burst=1.0))},
)


def small() -> Deployment:
    return deployment(
        mood=2,
        chat=[4000, 4000],
        moods={"max_batch_size": 3, "max_queue_size": 8, "max_queue_delay": 0.2},
        chats={"max_batch_size": 3, "max_queue_size": 8},
        admission=RULES,
    )


class Driven:
    """A core, and the steps that run on its replicas."""

    def __init__(self) -> None:
        self.core = started(small())
        self.running: dict[str, RunStep] = {}
        self.actions: list[list[Action]] = []

    def feed(self, event: Event, now_s: float) -> list[Action]:
        actions = self.core.handle(event, now_s=now_s)
        self.core.check_invariants()
        self.actions.append(actions)
        self.running |= {a.replica_id: a for a in actions if isinstance(a, RunStep)}
        return actions

    def end_steps(self, now_s: float) -> list[Action]:
        ended = [self.running.pop(replica_id) for replica_id in sorted(self.running)]
        return [a for step in ended for a in self.feed(StepDone(step.replica_id, step.step_id), now_s)]


@pytest.mark.parametrize("seed", range(10))
def test_time_that_goes_backwards_stands_still(seed: int) -> None:
    """One core is told a time that falls back now and then, the other the latest of all that were told."""
    rng = random.Random(seed)
    told, truth = Driven(), Driven()
    latest_s = now_s = 0.0
    for number in range(400):
        now_s += rng.choice([0.0, 0.01, 0.1, -0.05, -5.0, 5.0])
        latest_s = max(latest_s, now_s)
        told.feed(Wake(), now_s)
        truth.feed(Wake(), latest_s)
        if rng.random() < 0.5:
            model, traffic_class = rng.choice(["mood", "chat"]), rng.choice(["", "soon", "some"])
            asked = Arrive(number, model, 5, 8 if model == "chat" else 0, traffic_class=traffic_class)
            told.feed(asked, now_s)
            truth.feed(asked, latest_s)
        else:
            told.end_steps(now_s)
            truth.end_steps(latest_s)
        assert told.actions[-1:] == truth.actions[-1:]
        assert told.core.next_timer_s() == truth.core.next_timer_s()
    assert told.actions == truth.actions


def test_a_jump_forwards_costs_what_has_a_deadline_and_nothing_else() -> None:
    driven = Driven()
    for number in range(8):
        model = "mood" if number % 2 else "chat"
        driven.feed(Arrive(number, model, 5, 0 if number % 2 else 3, traffic_class="soon" if number < 4 else ""), 1.0)
    woken = driven.feed(Wake(), 3601.0)
    assert {a.request_id for a in woken if isinstance(a, Fail)} == {0, 1, 2, 3}
    assert {a.reason for a in woken if isinstance(a, Fail)} == {"timeout"}
    for step in range(10):
        driven.end_steps(3601.0 + step * 0.01)
    every = [a for actions in driven.actions for a in actions]
    assert {a.request_id for a in every if isinstance(a, Complete)} == {4, 5, 6, 7}
    assert not any(isinstance(a, Trip) for a in every), "a stop is nobody's failure"
    assert driven.core.in_flight == 0
    for number in (100, 101):
        later = driven.feed(Arrive(number, "chat", 5, 1, traffic_class="soon"), 3602.0)
        assert any(isinstance(a, RunStep) for a in later), "service is back at once"
        assert [a.request_id for a in driven.end_steps(3602.1) if isinstance(a, Complete)] == [number]


def test_steps_that_a_stop_made_long_trip_no_breaker() -> None:
    """Every replica stood still for a minute, five times over, and its step with it."""
    driven, now_s = Driven(), 0.0
    for number in range(200):
        driven.feed(Arrive(number, "chat", 5, 1), now_s)
        now_s += 60.0 if number % 40 == 20 else 0.01
        driven.end_steps(now_s)
    assert not any(isinstance(a, Trip | Fail) for actions in driven.actions for a in actions)
    assert set(dict(driven.core.breakers()).values()) == {"closed"}


def test_a_core_that_has_only_just_begun_takes_any_clock() -> None:
    """A monotonic clock may begin anywhere, below zero too."""
    core = ServingCore(small())
    assert core.handle(Wake(), now_s=-1e9) == []
    assert core.handle(Wake(), now_s=1e9) == []
