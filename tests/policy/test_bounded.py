"""Memory in a flood: whatever comes, the core holds no more than its queues and batches may.

Every list, dict, set and deque that can be reached from the core is looked at, so one that is added later is, too.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest

from gpuplan.policy.core import ServingCore
from gpuplan.policy.vocabulary import Arrive, Cancel, Complete, Event, Fail, Knock, Reject, RunStep, StepDone, Wake
from gpuplan.scenario.demand import AdmissionSpec, ClassSpec, RateLimit
from tests.policy.conftest import deployment, started

QUEUE, BATCH, REPLICAS = 64, 8, 4
IN_FLIGHT = 2 * (QUEUE + REPLICAS * BATCH)
LARGEST = 2 * IN_FLIGHT + 16
"""Of any container: heaps may hold as many dead entries as living ones, and a few; all else holds less."""
CLASSES = {
    "patient": ClassSpec(deadline=3600.0),
    "hasty": ClassSpec(deadline=0.5, priority=1),
    "limited": ClassSpec(priority=2, rate_limit=RateLimit(requests_per_s=50, tokens_per_s=5000, burst=1.0)),
}


def flooded_core() -> ServingCore:
    rule = {"max_batch_size": BATCH, "max_queue_size": QUEUE}
    admission = AdmissionSpec(classes=CLASSES, per_key=RateLimit(requests_per_s=1e6, burst=1.0))
    return started(deployment(mood=REPLICAS, chat=[2000] * REPLICAS, moods=rule, chats=rule, admission=admission))


def containers(root: Any) -> Iterator[tuple[str, int]]:
    """Where each container is that can change, and how large."""
    seen: set[int] = set()
    found: list[tuple[str, Any]] = [("core", root)]
    while found:
        path, thing = found.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, list | dict | set | deque):
            yield path, len(thing)
            items = thing.values() if isinstance(thing, dict) else thing
            found += [(f"{path}[]", item) for item in items]
        elif isinstance(thing, tuple):
            found += [(f"{path}()", item) for item in thing]
        elif type(thing).__module__.startswith("gpuplan.policy"):
            slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
            names = [*slots, *getattr(thing, "__dict__", ())]
            found += [(f"{path}.{name}", getattr(thing, name)) for name in names if hasattr(thing, name)]


class Flood:
    """Requests at ten times what a core's replicas can do, of which some hang up: in the door, waiting, running."""

    def __init__(self, core: ServingCore, seed: int) -> None:
        self.core, self.rng, self.now_s = core, random.Random(seed), 0.0
        self.ends: list[tuple[float, int, str]] = []
        self.open: set[int] = set()
        self.counts = {"completed": 0, "refused": 0, "failed": 0, "cancelled": 0}

    def feed(self, event: Event) -> None:
        for action in self.core.handle(event, now_s=self.now_s):
            match action:
                case RunStep(replica_id=replica_id, step_id=step_id):
                    heapq.heappush(self.ends, (self.now_s + 0.02, step_id, replica_id))
                case Complete(request_id=request_id):
                    self.open.discard(request_id)
                    self.counts["completed"] += 1
                case Fail(request_id=request_id):
                    self.open.discard(request_id)
                    self.counts["failed"] += 1
                case Reject(request_id=request_id):
                    self.open.discard(request_id)
                    self.counts["refused"] += 1

    def until(self, then_s: float) -> None:
        while True:
            timer_s = self.core.next_timer_s()
            due_s = min(self.ends[0][0] if self.ends else then_s, then_s if timer_s is None else timer_s)
            if due_s >= then_s:
                self.now_s = then_s
                return
            self.now_s = max(due_s, self.now_s)
            if self.ends and self.ends[0][0] <= due_s:
                _, step_id, replica_id = heapq.heappop(self.ends)
                self.feed(StepDone(replica_id, step_id))
            else:
                self.feed(Wake())

    def ask(self, request_id: int) -> None:
        rng = self.rng
        traffic_class, key = rng.choice(["", "patient", "hasty", "limited"]), f"key-{rng.randrange(5)}"
        refused = self.counts["refused"]
        self.feed(Knock(request_id, traffic_class, key))
        if self.counts["refused"] > refused:
            return
        if rng.random() < 0.02:
            self.cancel(request_id)
            return
        self.open.add(request_id)
        model = rng.choice(["mood", "chat"])
        tokens = rng.randint(1, 40) if model == "chat" else 0
        self.feed(Arrive(request_id, model, rng.randint(1, 100), tokens, traffic_class=traffic_class, key=key))
        if self.open and rng.random() < 0.1:
            self.cancel(rng.choice(sorted(self.open)))

    def cancel(self, request_id: int) -> None:
        self.open.discard(request_id)
        self.counts["cancelled"] += 1
        self.feed(Cancel(request_id))


@pytest.mark.parametrize(("requests", "per_s"), [(50_000, 10_000.0), (10_000, 400.0)], ids=["flood", "what it bears"])
def test_every_container_is_bounded_by_the_queues(requests: int, per_s: float) -> None:
    flood = Flood(flooded_core(), seed=7)
    largest: dict[str, int] = {}
    for number in range(requests):
        flood.until(number / per_s)
        flood.ask(number)
        if number % 250 == 0:
            flood.core.check_invariants()
            assert flood.core.in_flight <= IN_FLIGHT and flood.core.at_the_door <= 2 * QUEUE
            for path, size in containers(flood.core):
                largest[path] = max(largest.get(path, 0), size)
    assert all(flood.counts.values()), "all of it happened"
    assert {path: size for path, size in largest.items() if size > LARGEST} == {}
    assert any(path.endswith("._deadlines") for path in largest), "private parts were looked at"
    flood.until(flood.now_s + 4000.0)
    assert (flood.core.in_flight, flood.core.at_the_door, flood.open) == (0, 0, set())
    left = dict(containers(flood.core))
    assert (left["core._sequences"], left["core._gate._door"]) == (0, 0)
    assert left["core._deadlines"] <= 16
    assert all(flood.core.kv_free(f"chat-{i}") == 2000 for i in range(REPLICAS)), "all of the KV cache is free"
