"""A run on virtual time.

`simulate` feeds a schedule to the same `ServingCore` that serves live, lets steps take what `ServiceTimes` says, and
writes the same rows through the same recorder. Same seed, same rows.

Without rows, only what a summary needs is kept: of each request its times and its end, not its tokens'. Then steps of a
decoder are taken many at once, and a simulation costs by requests, not by tokens.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

from gpuplan import __version__
from gpuplan.policy.dispatch import Dispatcher
from gpuplan.policy.vocabulary import Action, Event
from gpuplan.record.recorder import Recorder
from gpuplan.record.run import Run, RunMeta
from gpuplan.scenario import deployment as supply
from gpuplan.scenario import files
from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.deployment import Deployment
from gpuplan.scenario.schedule import Columns, Schedule
from gpuplan.sim.answers import answer
from gpuplan.sim.early_stop import EarlyStop
from gpuplan.sim.loop import Observer, Simulation
from gpuplan.sim.service_times import ServiceTimes
from gpuplan.sim.tally import NAN, Tally
from gpuplan.telemetry.emulated import EmulatedCards

TELEMETRY_HZ = 10.0
STEPS_MAX = 64
"""Steps in a row, where they are not told one by one: what they say of a replica's speed is heard after the last."""


def simulate(
    scenario: Scenario,
    deployment: Deployment,
    schedule: Schedule,
    service_times: ServiceTimes,
    *,
    seed: int = 0,
    keep_decisions: bool = False,
    keep_telemetry: bool = True,
    keep_rows: bool = True,
    dispatcher: Dispatcher | None = None,
    early_stop: bool = False,
    watching: Sequence[Observer] = (),
    rate_scale: float = 1.0,
    speed: float = 1.0,
) -> Run:
    """A run of the schedule against the deployment on virtual time. Every request is followed to its end. `dispatcher`
    places requests otherwise than the server would, for comparisons. Without rows the run is for `summarize` alone: it
    has no decisions, no telemetry, and no inter-token latencies (TPOT it has).

    With `early_stop` BeyondDoubt is raised as soon as an SLO can no longer be met. `watching` are further observers.
    `rate_scale` and `speed` say how the schedule was made of the scenario.
    """
    requests = Columns.of(schedule.requests)
    downlink = random.Random(f"{seed}/downlink")  # noqa: S311 - not for secrets
    downlinks_s = downlink.choices(service_times.downlink_s, k=len(requests))
    tally, recorder, cards, observers = None, None, None, list[Observer]()
    if keep_rows:
        recorder = Recorder(deployment, keep_tokens=True, keep_decisions=keep_decisions)
        cards = _Cards(deployment, recorder) if keep_telemetry else None
        observers = [recorder, cards] if cards is not None else [recorder]
    else:
        tally = Tally(deployment, requests, since_s=scenario.warmup)
    if early_stop:
        first_token_s = tally.first_token_s if tally is not None else _first_token_s(recorder)
        downlink_s = min(service_times.downlink_s)
        observers.append(EarlyStop(scenario, requests, first_token_s, downlink_s=downlink_s))
    observers += watching
    simulation = Simulation(
        deployment,
        service_times,
        observers,
        seed=seed,
        tally=tally,
        sampler=cards,
        dispatcher=dispatcher,
        steps_max=1 if keep_rows else STEPS_MAX,
    )
    with _uncollected():
        simulation.run(requests)
    ended_s = max(schedule.duration_s, simulation.now_s)
    meta = RunMeta(
        name=scenario.name,
        source="simulate",
        scenario=files.to_builtins(scenario),
        deployment=supply.describe(deployment),
        seed=seed,
        rate_scale=rate_scale,
        speed=speed,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        duration_s=schedule.duration_s,
        measured_s=ended_s,
        target="simulation",
        provenance=dict.fromkeys(scenario.models, "simulated"),
        engines={r.model: f"simulated, step times {service_times.basis(r)}" for r in deployment.replicas},
        telemetry_source="emulated" if cards is not None and deployment.gpu else "none",
        notes=[
            *supply.differences(scenario.deployment),
            *supply.assumptions(deployment),
            *service_times.notes(deployment),
            *simulation.faults.notes(ended_s),
        ],
        gpuplan_version=__version__,
    )
    if tally is not None:
        return Run(meta, *tally.tables(downlinks_s, scenario.warmup), steps=tally.steps)
    assert recorder is not None
    for request, downlink_s in zip(requests, downlinks_s, strict=True):
        recorder.answered(answer(request, recorder.served[request.index], scenario.warmup, downlink_s))
    return Run(meta, *recorder.tables(), decisions=tuple(recorder.decisions))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the search for cycles: there are none to be found, and it would look at every request again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _first_token_s(recorder: Recorder | None) -> Callable[[int], float]:
    assert recorder is not None
    served = recorder.served

    def first_token_s(request_id: int) -> float:
        first_s = served[request_id].first_token_s if request_id in served else None
        return NAN if first_s is None else first_s

    return first_token_s


class _Cards:
    """Emulated cards that are read at a fixed rate."""

    def __init__(self, deployment: Deployment, recorder: Recorder) -> None:
        self._cards, self._recorder, self._due_s = EmulatedCards(deployment), recorder, 0.0

    def passed(self, now_s: float) -> None:
        while self._due_s <= now_s:
            self._recorder.sampled(self._cards.read(self._due_s))
            self._due_s += 1.0 / TELEMETRY_HZ

    def decided(self, event: Event, actions: list[Action], *, now_s: float) -> None:
        self._cards.decided(event, actions, now_s=now_s)
