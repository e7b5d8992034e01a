"""The second driver of the core: a heap instead of an event loop.

`simulate` feeds a schedule to the same `ServingCore` that serves live, lets steps take what `ServiceTimes` says, and
writes the same rows through the same recorder. Same seed, same rows. Events at one instant go in order of their
making. Every replica draws the spread of its step times from a generator of its own, and every request its way there
and back in order of the schedule: what one replica does changes no draw of another.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

from gpuplan.policy.core import ServingCore
from gpuplan.policy.cost import step_costs
from gpuplan.policy.dispatch import Dispatcher
from gpuplan.policy.vocabulary import (
    OUT_OF_MEMORY,
    Action,
    Arrive,
    Cancel,
    Event,
    ReplicaDown,
    ReplicaUp,
    RunStep,
    StartReplica,
    StepDone,
    StepFailed,
    StopReplica,
    Wake,
)
from gpuplan.record.recorder import Answer, Recorder, Served
from gpuplan.record.run import Run, RunMeta
from gpuplan.scenario import deployment as supply
from gpuplan.scenario import files
from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.deployment import Deployment
from gpuplan.scenario.schedule import Schedule, ScheduledRequest
from gpuplan.scenario.script import NAN_OUTPUT
from gpuplan.sim.faults import Injection
from gpuplan.sim.service_times import ServiceTimes
from gpuplan.telemetry.emulated import EmulatedCards

TELEMETRY_HZ = 10.0
Watch = Callable[[Mapping[int, Served], Event, Sequence[Action], float], None]


def simulate(
    scenario: Scenario,
    deployment: Deployment,
    schedule: Schedule,
    service_times: ServiceTimes,
    *,
    seed: int = 0,
    keep_decisions: bool = False,
    keep_telemetry: bool = True,
    dispatcher: Dispatcher | None = None,
    watch: Watch | None = None,
) -> Run:
    """A run of the schedule against the deployment on virtual time. Every request is followed to its end. `dispatcher`
    places requests otherwise than the server would, for comparisons. `watch` is told of every event with what is known
    of each request so far, and ends the simulation by raising."""
    recorder = Recorder(deployment, keep_tokens=True, keep_decisions=keep_decisions)
    cards = EmulatedCards(deployment) if keep_telemetry else None
    simulation = _Simulation(deployment, service_times, recorder, cards, seed, dispatcher, watch)
    simulation.run(schedule)
    links = random.Random(f"{seed}/downlink")  # noqa: S311 - not for secrets
    for request in schedule.requests:
        downlink_s = links.choice(service_times.downlink_s)
        recorder.answered(_answer(request, recorder.served[request.index], scenario.warmup, downlink_s))
    tables = recorder.tables()
    return Run(
        RunMeta(
            name=scenario.name,
            source="simulate",
            scenario=files.to_builtins(scenario),
            deployment=supply.describe(deployment),
            seed=seed,
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
            duration_s=schedule.duration_s,
            measured_s=max(schedule.duration_s, simulation.now_s),
            target="simulation",
            provenance=dict.fromkeys(scenario.models, "simulated"),
            engines={r.model: f"simulated, step times {service_times.basis(r)}" for r in deployment.replicas},
            telemetry_source="emulated" if keep_telemetry and deployment.gpu else "none",
            notes=[
                *supply.differences(scenario.deployment),
                *supply.assumptions(deployment),
                *service_times.notes(deployment),
                *simulation.faults.notes(max(schedule.duration_s, simulation.now_s)),
            ],
        ),
        *tables,
        decisions=tuple(recorder.decisions),
    )


class _Simulation:
    """One pass: the core, the heap of steps that are running, and the virtual clock."""

    def __init__(
        self,
        deployment: Deployment,
        service_times: ServiceTimes,
        recorder: Recorder,
        cards: EmulatedCards | None,
        seed: int,
        dispatcher: Dispatcher | None,
        watch: Watch | None,
    ) -> None:
        self._core = ServingCore(deployment, dispatcher=dispatcher)
        self._timers = {
            r.id: service_times.timer(deployment, r, random.Random(f"{seed}/steps/{r.id}"))  # noqa: S311 - not for secrets
            for r in deployment.every_replica()
        }
        self._costs = {r.id: step_costs(deployment, r) for r in deployment.every_replica()}
        self._cold_start_s = deployment.autoscale.cold_start
        self._coming: list[tuple[float, str]] = []  # a heap: replicas that are being started, and when they serve
        self._leaving: list[tuple[float, int]] = []  # a heap: clients that hang up if they still wait, and when
        self._links = random.Random(f"{seed}/uplink")  # noqa: S311 - not for secrets
        self._uplink_s = service_times.uplink_s
        self._recorder, self._cards, self._watch = recorder, cards, watch
        self._running: list[tuple[float, int, StepDone | StepFailed]] = []
        self._sample_due_s = 0.0
        self.faults = Injection(deployment)
        self.now_s = 0.0
        for replica in deployment.replicas:
            self._feed(ReplicaUp(replica.id), 0.0)

    def run(self, schedule: Schedule) -> None:
        # A request that was longer on its way may arrive after a later one.
        draws = ((r.scheduled_s + self._links.choice(self._uplink_s), r) for r in schedule.requests)
        arrivals = iter(sorted(draws, key=lambda drawn: drawn[0]))
        arrival_s, coming = next(arrivals, (float("inf"), None))
        core, running, faults, never = self._core, self._running, self.faults, float("inf")
        if coming is not None:
            faults.begin(arrival_s)
        while True:
            step_s = running[0][0] if running else never
            up_s = self._coming[0][0] if self._coming else never
            timer_s = core.next_timer_s()
            if coming is None and not running and not core.in_flight:
                return  # what is left is time that passes, and what nobody would notice
            fault_s = faults.next_s
            if self._leaving and self._leaving[0][0] <= min(arrival_s, step_s, never if timer_s is None else timer_s):
                left_s, request_id = heapq.heappop(self._leaving)
                if self._recorder.served[request_id].finished_s is None:
                    self._feed(Cancel(request_id), left_s)
            elif fault_s < never and fault_s <= min(arrival_s, step_s, never if timer_s is None else timer_s):
                self._fault(fault_s)
            elif self._coming and up_s <= min(arrival_s, step_s, never if timer_s is None else timer_s):
                _, replica_id = heapq.heappop(self._coming)
                self._feed(ReplicaUp(replica_id), up_s)
            elif timer_s is not None and timer_s <= min(arrival_s, step_s):
                self._feed(Wake(), max(timer_s, self.now_s))
            elif step_s <= arrival_s and running:
                done_s, _, event = heapq.heappop(running)
                self._feed(event, done_s)
            elif coming is not None:
                arrival = Arrive(
                    coming.index, coming.model, coming.prompt_tokens, coming.output_tokens, str(coming.index),
                    coming.traffic_class,
                )  # fmt: skip
                self._feed(arrival, arrival_s)
                if coming.abandon_s is not None:
                    heapq.heappush(self._leaving, (arrival_s + coming.abandon_s, coming.index))
                arrival_s, coming = next(arrivals, (never, None))
            else:
                return

    def _feed(self, event: Event, now_s: float) -> None:
        self._sample_until(now_s)
        self.now_s = now_s
        actions: list[Action] = self._core.handle(event, now_s=now_s)
        self._recorder.decided(event, actions, now_s=now_s)
        if self._watch is not None:
            self._watch(self._recorder.served, event, actions, now_s)
        if self._cards is not None:
            self._cards.decided(event, actions, now_s=now_s)
        for action in actions:
            kind = type(action)
            if kind is RunStep:
                self._start(action, now_s)  # type: ignore[arg-type]
            elif kind is StartReplica:
                heapq.heappush(self._coming, (now_s + self._cold_start_s, action.replica_id))  # type: ignore[union-attr]
            elif kind is StopReplica:
                self._feed(ReplicaDown(action.replica_id, "scaled down"), now_s)  # type: ignore[union-attr]

    def _fault(self, now_s: float) -> None:
        event = self.faults.pop()
        if type(event) is ReplicaDown:  # what ran there never ends
            self._running[:] = [due for due in self._running if due[2].replica_id != event.replica_id]
            heapq.heapify(self._running)
        if event is not None:
            self._feed(event, now_s)

    def _start(self, step: RunStep, now_s: float) -> None:
        costs, seconds = self._costs[step.replica_id], 0.0
        event: StepDone | StepFailed = StepDone(step.replica_id, step.step_id)
        if costs is None or costs.fits(step.load):
            seconds = self._timers[step.replica_id](step.load)
        else:
            event = StepFailed(step.replica_id, step.step_id, OUT_OF_MEMORY)
        ends, seconds = self.faults.befall(step, event, seconds, now_s)
        if ends is not None:
            heapq.heappush(self._running, (now_s + seconds, step.step_id, ends))

    def _sample_until(self, now_s: float) -> None:
        while self._cards is not None and self._sample_due_s <= now_s:
            self._recorder.sampled(self._cards.read(self._sample_due_s))
            self._sample_due_s += 1.0 / TELEMETRY_HZ


# What a live server answers where a request was not completed (serve/http/errors.py); every other refusal is a 503.
_REFUSALS = {
    "class_full": ("rejected", 429),
    "rate_limited": ("rejected", 429),
    "too_long": ("error", 400),
    "replica_lost": ("error", 503),
    "timeout": ("error", 504),
    OUT_OF_MEMORY: ("error", 503),
    NAN_OUTPUT: ("error", 500),
}


def _answer(request: ScheduledRequest, served: Served, warmup_s: float, downlink_s: float) -> Answer:
    """What a client would have seen, from what the core did."""
    answer = Answer.to(request, warmup_s=warmup_s)
    answer.sent_s = request.scheduled_s
    if served.finished_s is not None:
        answer.done_s = served.finished_s + downlink_s
    times = served.token_s
    if served.outcome == "cancelled":
        answer.status, answer.error = "error", "abandoned"
        if not times:
            return answer
    elif served.outcome != "completed":
        status, http_status = _REFUSALS.get(served.outcome, ("rejected", 503))
        answer.status, answer.error, answer.http_status = status, served.outcome, http_status
        # A stream that was lost is a 200 with an error at its end; the step that failed it gave it no token.
        times = [t for t in times if served.finished_s is None or t < served.finished_s]
        if not times:
            return answer
    answer.http_status = 200
    if request.output_tokens:
        answer.first_token_s = times[0] + downlink_s
        answer.tokens = len(times)
        answer.gaps_ms = [(b - a) * 1e3 for a, b in itertools.pairwise(times)]
    return answer
