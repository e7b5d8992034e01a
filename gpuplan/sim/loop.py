"""The second driver of the core: a heap instead of an event loop.

One pass over a schedule: arrivals, steps that end, timers of the core, faults, replicas that start and clients that
hang up, each at its time. Events at one instant go in order of their making. What is decided is told to the observers,
as by a live server.

A step that may run several times in a row is one entry of the heap; when the core cuts it short, another entry takes
its place.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from typing import Protocol

from gpuplan.policy.core import ServingCore
from gpuplan.policy.cost import step_costs
from gpuplan.policy.dispatch import Dispatcher
from gpuplan.policy.vocabulary import (
    OUT_OF_MEMORY,
    Action,
    Arrive,
    Cancel,
    Complete,
    Cut,
    Event,
    Fail,
    Reject,
    ReplicaDown,
    ReplicaUp,
    RunStep,
    StartReplica,
    StepDone,
    StepFailed,
    StopReplica,
    Wake,
)
from gpuplan.scenario.deployment import Deployment, Replica
from gpuplan.scenario.faults import NEVER
from gpuplan.scenario.schedule import Columns
from gpuplan.sim.clock import StepClock
from gpuplan.sim.faults import Injection
from gpuplan.sim.service_times import ServiceTimes
from gpuplan.sim.tally import Tally


class Observer(Protocol):
    """Sees every decision after it was made."""

    def decided(self, event: Event, actions: list[Action], *, now_s: float) -> None: ...


class Sampler(Protocol):
    """Hears of time that passes."""

    def passed(self, now_s: float) -> None: ...


class _Station:
    """One replica: how long its steps take and whether they fit, the step that runs since `began_s`, and its end."""

    __slots__ = ("befalls", "began_s", "clock", "costs", "end", "step")

    def __init__(
        self, deployment: Deployment, replica: Replica, service_times: ServiceTimes, faults: Injection, seed: int
    ) -> None:
        mean_s, ratios = service_times.timer(deployment, replica), service_times.ratios(deployment, replica)
        self.clock = StepClock(mean_s, ratios, f"{seed}/steps/{replica.id}")
        self.costs = step_costs(deployment, replica)
        self.befalls = faults.befalls(replica.id)
        self.step: RunStep | None = None
        self.end: StepDone | StepFailed | None = None
        self.began_s = 0.0


class Simulation:
    """A deployment on virtual time, which starts at 0.

    The `sampler` hears of each event before it is handled; the `tally` is one more observer, called directly.
    `steps_max`: how often in a row a step may run without the observers' being told of each.
    """

    def __init__(
        self,
        deployment: Deployment,
        service_times: ServiceTimes,
        observers: Sequence[Observer],
        *,
        seed: int,
        tally: Tally | None = None,
        sampler: Sampler | None = None,
        dispatcher: Dispatcher | None = None,
        steps_max: int = 1,
    ) -> None:
        every = deployment.every_replica()
        self.now_s = 0.0
        self.faults = Injection(deployment)
        self._core = ServingCore(deployment, dispatcher=dispatcher, steps_max=steps_max)
        self._observers, self._tally, self._sampler = list(observers), tally, sampler
        self._stations = {r.id: _Station(deployment, r, service_times, self.faults, seed) for r in every}
        self._links = random.Random(f"{seed}/uplink")  # noqa: S311 - not for secrets
        self._uplink_s = service_times.uplinks_s(deployment)
        self._cold_start_s = deployment.autoscale.cold_start
        self._ends: list[tuple[float, int, StepDone | StepFailed]] = []  # a heap: steps that run, and when they end
        self._number = 0
        self._coming: list[tuple[float, str]] = []  # a heap: replicas that are being started, and when they serve
        self._leaving: list[tuple[float, int]] = []  # a heap: clients that hang up if they still wait, and when
        self._impatient: set[int] = set()  # those of them that still wait
        for replica in deployment.replicas:
            self._feed(ReplicaUp(replica.id), 0.0)

    def run(self, requests: Columns) -> None:
        """Feeds all requests, and follows each to its end."""
        order, arrivals_s = self._arrivals(requests)
        coming, count = 0, len(order)
        arrival_s = arrivals_s[0] if count else NEVER
        core, ends = self._core, self._ends
        if count:
            self.faults.begin(arrival_s)
        while True:
            if coming == count and not ends and not core.in_flight:
                return  # what is left is time that passes, and what nobody would notice
            step_s = ends[0][0] if ends else NEVER
            timer_s = core.next_timer_s()
            soonest_s = step_s if step_s < arrival_s else arrival_s
            if timer_s is not None and timer_s < soonest_s:
                soonest_s = timer_s
            rare_s = self._rare_s()
            if rare_s <= soonest_s:
                if rare_s == NEVER:
                    return
                self._something_rare(rare_s)
            elif timer_s is not None and timer_s <= soonest_s:
                self._feed(Wake(), timer_s if timer_s > self.now_s else self.now_s)
            elif step_s <= arrival_s:
                event = heapq.heappop(ends)[2]
                self._step_over(event, step_s)
            else:
                number = order[coming]
                self._arrive(requests, number, arrival_s)
                coming += 1
                arrival_s = arrivals_s[coming] if coming < count else NEVER

    def _arrivals(self, requests: Columns) -> tuple[Sequence[int], Sequence[float]]:
        """In which order they arrive, and when: one that was longer on its way may be later than one sent after it."""
        if len(self._uplink_s) == 1:
            uplink_s = self._uplink_s[0]
            if not uplink_s:
                return range(len(requests)), requests.scheduled_s
            return range(len(requests)), [at_s + uplink_s for at_s in requests.scheduled_s]
        ways_s = self._links.choices(self._uplink_s, k=len(requests))
        at_s = [scheduled_s + way_s for scheduled_s, way_s in zip(requests.scheduled_s, ways_s, strict=True)]
        order = sorted(range(len(at_s)), key=at_s.__getitem__)
        return order, [at_s[i] for i in order]

    def _arrive(self, requests: Columns, number: int, now_s: float) -> None:
        traffic_class, model = requests.kinds[requests.kind[number]]
        prompt, output = requests.prompt_tokens[number], requests.output_tokens[number]
        if requests.abandon_s and (after_s := requests.abandon_s.get(number)) is not None:
            heapq.heappush(self._leaving, (now_s + after_s, number))
            self._impatient.add(number)
        client_id = str(number) if self._observers else ""
        if requests.spans and (spans := requests.spans.get(number)):
            arrival = Arrive(number, model, prompt, output, client_id, traffic_class, spans=spans)
        else:
            arrival = Arrive(number, model, prompt, output, client_id, traffic_class)
        self._feed(arrival, now_s)

    # --- what seldom happens --------------------------------------------------------------------------------------

    def _rare_s(self) -> float:
        soonest_s = self.faults.next_s
        if self._leaving and self._leaving[0][0] < soonest_s:
            soonest_s = self._leaving[0][0]
        if self._coming and self._coming[0][0] < soonest_s:
            soonest_s = self._coming[0][0]
        return soonest_s

    def _something_rare(self, now_s: float) -> None:
        if self._leaving and self._leaving[0][0] == now_s:
            request_id = heapq.heappop(self._leaving)[1]
            if request_id in self._impatient:
                self._impatient.discard(request_id)
                self._feed(Cancel(request_id), now_s)
        elif self.faults.next_s == now_s:
            event = self.faults.pop()
            if type(event) is ReplicaDown:  # what ran there never ends
                self._stations[event.replica_id].end = None
            if event is not None:
                self._feed(event, now_s)
        else:
            self._feed(ReplicaUp(heapq.heappop(self._coming)[1]), now_s)

    # --- events in, actions out -----------------------------------------------------------------------------------

    def _feed(self, event: Event, now_s: float) -> None:
        if self._sampler is not None:
            self._sampler.passed(now_s)
        self.now_s = now_s
        actions = self._core.handle(event, now_s=now_s)
        if self._tally is not None:
            self._tally.decided(event, actions, now_s=now_s)
        for observer in self._observers:
            observer.decided(event, actions, now_s=now_s)
        for action in actions:
            kind = type(action)
            if kind is RunStep:
                self._start(action, now_s)  # type: ignore[arg-type]
            elif kind is Cut:
                self._cut(action, now_s)  # type: ignore[arg-type]
            elif kind is StartReplica:
                heapq.heappush(self._coming, (now_s + self._cold_start_s, action.replica_id))  # type: ignore[union-attr]
            elif kind is StopReplica:
                self._feed(ReplicaDown(action.replica_id, "scaled down"), now_s)  # type: ignore[union-attr]
            elif self._impatient and (kind is Complete or kind is Reject or kind is Fail):
                self._impatient.discard(action.request_id)  # type: ignore[union-attr]

    def _start(self, step: RunStep, now_s: float) -> None:
        replica_id, seconds = step.replica_id, 0.0
        station = self._stations[replica_id]
        event: StepDone | StepFailed | None
        if station.costs is not None and not station.costs.fits(step.load):
            event = StepFailed(replica_id, step.step_id, OUT_OF_MEMORY)
        else:
            steps = 1 if station.befalls else step.steps
            seconds = station.clock.begin(step.load, steps)
            event = StepDone(replica_id, step.step_id) if steps == 1 else _done(step, steps)
        if station.befalls:
            event, seconds = self.faults.befall(step, event, seconds, now_s)
        station.step, station.began_s, station.end = step, now_s, event
        if event is not None:
            self._ends_at(now_s + seconds, event)

    def _cut(self, cut: Cut, now_s: float) -> None:
        station = self._stations[cut.replica_id]
        step, end = station.step, station.end
        if step is not None and type(end) is StepDone and end.steps > 1:
            steps, seconds = station.clock.cut(now_s - station.began_s)
            if steps < end.steps:
                station.end = end = _done(step, steps)
                self._ends_at(max(station.began_s + seconds, now_s), end)

    def _ends_at(self, end_s: float, event: StepDone | StepFailed) -> None:
        self._number += 1
        heapq.heappush(self._ends, (end_s, self._number, event))

    def _step_over(self, event: StepDone | StepFailed, now_s: float) -> None:
        """The end of a step, if it has not been cut short or lost with its replica."""
        station = self._stations[event.replica_id]
        if station.end is event:
            station.end = None
            if type(event) is StepDone:
                station.clock.ran(event.steps)
            self._feed(event, now_s)


def _done(step: RunStep, steps: int) -> StepDone:
    return StepDone(step.replica_id, step.step_id, steps=steps)
