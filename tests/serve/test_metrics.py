"""What `/metrics` tells of replicas, breakers and refusals, from the decisions of a core that a test drives."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gpuplan.policy.core import ServingCore
from gpuplan.policy.vocabulary import (
    Arrive,
    Event,
    Knock,
    ReplicaUp,
    StepFailed,
    Swap,
    VersionAdded,
    Wake,
)
from gpuplan.scenario import deployment
from gpuplan.scenario.build import build
from gpuplan.scenario.demand import Scenario
from gpuplan.serve.lag import LoopLag
from gpuplan.serve.metrics import Metrics

from .test_scaling_live import scenario

CLASSES = {"classes": {"one": {"max_queue_size": 1}}}


class Watched:
    """A core and its metrics, on a clock of its own."""

    def __init__(self) -> None:
        data = scenario(1)
        data["deployment"] |= {"admission": CLASSES, "breakers": {"consecutive_failures": 1, "open": "5s"}}
        supply = deployment.resolve(build(data, Scenario))
        self.core, self.metrics = ServingCore(supply), Metrics(supply)
        self.metrics.watch(self.core, supply, LoopLag())
        self.feed(ReplicaUp("chat-0"))

    def feed(self, event: Event, now_s: float = 0.0) -> None:
        self.metrics.decided(event, self.core.handle(event, now_s=now_s), now_s=now_s)

    def told(self, name: str) -> dict[str, float]:
        """A metric's values by their labels' values."""
        return {
            ",".join(sample.labels.values()): sample.value
            for family in text_string_to_metric_families(self.metrics.text().decode())
            for sample in family.samples
            if sample.name == f"gpuplan_{name}"
        }


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_replicas_by_what_they_do_and_how_many_are_wanted(watched: Watched) -> None:
    states = {"chat,ready": 1, "chat,starting": 0, "chat,stopping": 0, "chat,standby": 2}
    assert watched.told("replicas") == states
    assert watched.told("replicas_wanted") == {"chat": 1}
    for i in range(40):
        watched.feed(Arrive(i, "chat", 10, 100))
    for look in range(1, 10):
        watched.feed(Wake(), look * 0.1)
    assert watched.told("replicas") == {**states, "chat,starting": 2, "chat,standby": 0}
    assert watched.told("replicas_wanted") == {"chat": 3}


def test_the_kv_cache_in_use(watched: Watched) -> None:
    assert watched.told("kv_cache_usage_ratio") == {"chat": 0}
    limit = watched.core.kv_free("chat-0")
    assert limit is not None
    watched.feed(Arrive(1, "chat", 100, limit // 4 - 100))
    assert watched.told("kv_cache_usage_ratio")["chat"] == pytest.approx(0.25, rel=1e-3)


def test_refusals_are_counted_with_those_at_the_door(watched: Watched) -> None:
    assert set(watched.told("refused_total").values()) == {0}, "every reason is there from the start"
    watched.feed(Knock(1, "one"))
    watched.feed(Knock(2, "one"))
    watched.feed(Arrive(3, "chat", 10, 10_000_000))
    counted = {reason: number for reason, number in watched.told("refused_total").items() if number}
    assert counted == {"class_full": 1, "too_long": 1}
    assert watched.told("requests_total") == {"chat,too_long": 1}, "of the other nobody knows the model"


def test_breakers_by_place_whatever_versions_are_there(watched: Watched) -> None:
    places = dict.fromkeys(("chat", "chat-0", "chat-1", "chat-2"), 0.0)
    assert watched.told("circuit_breaker_state") == places
    watched.feed(Arrive(1, "chat", 10, 5))
    watched.feed(StepFailed("chat-0", 1, "engine_error"), 0.1)
    assert watched.told("circuit_breaker_state") == {**places, "chat": 2, "chat-0": 2}
    watched.feed(Wake(), 5.2)
    assert watched.told("circuit_breaker_state") == {**places, "chat": 1, "chat-0": 1}
    watched.feed(VersionAdded("chat-0#2", "chat-0"), 5.3)
    watched.feed(Swap("chat", ("chat-0#2",), ("chat-0",)), 5.4)
    assert watched.told("circuit_breaker_state") == {**places, "chat": 1, "chat-0": 1}, (
        "no new label, and the worse one"
    )
