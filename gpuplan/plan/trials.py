"""Simulations that a plan is chosen by, each done once.

A model's requests meet only its own replicas, so a deployment is tried model by model: what one model does on
'2g.20gb + 1g.10gb' is the same in every layout that gives it those, and is simulated once. A `Part` is one model's
result on one set of replicas, the worst over the seeds asked for; a `Trial` is a whole deployment's.

`Trials` may be asked from several threads, and simulates on as many cores as its `Workers` have. Where only those that
hold matter (`part_if_holds`, `trial_if_holds`), a simulation ends as soon as an SLO is missed beyond doubt; whoever
needs the figures of such a loser later has it simulated to its end. Neither changes what is chosen.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from gpuplan.hardware import mig
from gpuplan.plan.capacity import ModelDemand, demand_of
from gpuplan.record import summary
from gpuplan.record.summary import Summary
from gpuplan.scenario import deployment as supply
from gpuplan.scenario.demand import DeploymentSpec, ReplicaSpec, Scenario, Trace
from gpuplan.scenario.deployment import Deployment
from gpuplan.scenario.schedule import Schedule, build_schedule
from gpuplan.sim.candidate import Candidate
from gpuplan.sim.many import Workers
from gpuplan.sim.service_times import ServiceTimes

HORIZON_S_MIN = 60.0
"""A scenario whose arrivals are drawn is planned on at least this long: on less, a p95 is a handful of requests."""
REQUESTS_MAX = 6_000
"""Simulated per model and try; a longer scenario is planned on its first ones."""


@dataclass(frozen=True, slots=True)
class Part:
    """One model on one set of replicas. `margin` is its worst SLO's value over its limit."""

    figures: Summary
    margin: float

    @property
    def holds(self) -> bool:
        return bool(self.figures["meets_slos"])


@dataclass(frozen=True, slots=True)
class Trial:
    """A deployment and how each of its models did."""

    spec: DeploymentSpec
    deployment: Deployment
    parts: dict[str, Part]

    @property
    def holds(self) -> bool:
        return all(part.holds for part in self.parts.values())

    @property
    def margin(self) -> float:
        return max(part.margin for part in self.parts.values())

    @property
    def rank(self) -> tuple[bool, float]:
        """Smaller is better: holding first, then the most room at the tightest SLO."""
        return (not self.holds, self.margin)

    @property
    def occupied(self) -> float:
        """The share of the cards' memory that slices in use take up, in cards."""
        parts = [r.slice.profile for r in self.deployment.replicas]
        return sum(part.width / part.cells for part in parts if part)

    @property
    def slo_attainment(self) -> float:
        asked = [
            (p.figures["overall"]["requests"], p.figures["overall"]["slo_attainment"] or 0.0)
            for p in self.parts.values()
        ]
        return float(sum(n * share for n, share in asked) / max(sum(n for n, _ in asked), 1))

    def tightest(self) -> str | None:
        """The SLO with least room, in words."""
        return tightest_slo([part.figures for part in self.parts.values()])


@dataclass(frozen=True, slots=True)
class LayoutTried:
    """One layout with so many cards: its best trial, or the reason there is none."""

    count: int
    profiles: tuple[str, ...]
    trial: Trial | None
    impossible: str = ""


class Trials:
    """Simulates deployments for one scenario, and remembers."""

    def __init__(
        self,
        scenario: Scenario,
        times: ServiceTimes,
        *,
        rate_scale: float,
        speed: float,
        workers: Workers | None = None,
    ) -> None:
        self.scenario, self.times = scenario, times
        self.workers = workers or Workers(1)
        self._rate_scale, self._speed = rate_scale, speed
        self._parts: dict[tuple[Any, ...], Future[Part | None]] = {}
        self._schedules: dict[tuple[str | None, int, float], Schedule] = {}
        self._lock = threading.RLock()
        self.simulations = 0
        self.notes: list[str] = []
        self.demands: dict[str, ModelDemand] = {
            name: demand_of(self.schedule(name, 0, 1.0), name) for name in scenario.models
        }

    def trial(self, spec: DeploymentSpec, *, seeds: Sequence[int] = (0,)) -> Trial:
        """The deployment of `spec`, each model at its worst over the seeds."""
        deployment = supply.build(spec, self.scenario.models)
        return Trial(
            spec, deployment, {name: self.part(deployment, name, seeds=seeds) for name in self.scenario.models}
        )

    def trial_if_holds(self, spec: DeploymentSpec, *, seeds: Sequence[int] = (0,)) -> Trial | None:
        """The same, or None where some model does not hold on some seed."""
        deployment = supply.build(spec, self.scenario.models)
        parts = {}
        for name in self.scenario.models:
            part = self.part_if_holds(deployment, name, seeds=seeds)
            if part is None:
                return None
            parts[name] = part
        return Trial(spec, deployment, parts)

    def part(self, deployment: Deployment, model: str, *, seeds: Sequence[int] = (0,), factor: float = 1.0) -> Part:
        """One model of the deployment at `factor` times its rate, at its worst over the seeds."""
        parts = [self._part(deployment, model, seed, factor) for seed in seeds]
        return max((part for part in parts if part), key=lambda p: (not p.holds, p.margin))

    def part_if_holds(
        self, deployment: Deployment, model: str, *, seeds: Sequence[int] = (0,), factor: float = 1.0
    ) -> Part | None:
        """The same, or None where it does not hold on one of the seeds."""
        parts = []
        for seed in seeds:
            part = self._part(deployment, model, seed, factor, early_stop=True)
            if part is None or not part.holds:
                return None
            parts.append(part)
        return max(parts, key=lambda p: p.margin)

    def ahead(self, deployments: Iterable[Deployment], *, on_progress: Callable[[int, int], None]) -> None:
        """Simulates what trials of these deployments will ask for, on all cores, each part once. `on_progress` hears
        how many of how many are done."""
        wanted = {self._key(d, model, 0, 1.0): (d, model) for d in deployments for model in d.models}
        done = itertools.count(1)
        self.workers.each(
            lambda part: self._part(*part, 0, 1.0),
            wanted.values(),
            on_done=lambda _: on_progress(next(done), len(wanted)),
        )

    def whole(self, deployment: Deployment, *, seed: int = 0) -> Summary:
        """All models of the deployment together, as they will run."""
        schedule = self.schedule(None, seed, 1.0)
        figures = self._simulated("all models", self.scenario, deployment, schedule, seed, rows=True)
        assert figures is not None, "nothing stops it early"
        return figures

    def schedule(self, model: str | None, seed: int, factor: float) -> Schedule:
        """The schedule of one model's classes (None: all) with the seed moved and the rates multiplied."""
        key = (model, seed, factor)
        with self._lock:
            if key not in self._schedules:
                self._schedules[key] = self._built(model, seed, factor)
            return self._schedules[key]

    def _built(self, model: str | None, seed: int, factor: float) -> Schedule:
        scenario = _lasting(_only(self.scenario, model), self._horizon_s())
        scenario = msgspec.structs.replace(scenario, seed=scenario.seed + seed)
        built = build_schedule(scenario, rate_scale=self._rate_scale * factor, speed=self._speed)
        if len(built.requests) > REQUESTS_MAX:
            cut = built.requests[:REQUESTS_MAX]
            built = Schedule(cut, cut[-1].scheduled_s)
            if seed == 0 and factor == 1.0:
                self.notes.append(f"planned on the first {cut[-1].scheduled_s:.0f} s of {model or 'all models'}")
        return built

    def _horizon_s(self) -> float:
        if any(isinstance(c.arrivals, Trace) for c in self.scenario.traffic):
            return self.scenario.duration
        return max(self.scenario.duration, HORIZON_S_MIN)

    def _part(
        self, deployment: Deployment, model: str, seed: int, factor: float, *, early_stop: bool = False
    ) -> Part | None:
        """One simulation, done once whoever asks; None for one that was stopped, where that is allowed."""
        key = self._key(deployment, model, seed, factor)
        while True:
            with self._lock:
                known = self._parts.get(key)
                future = self._parts[key] = known or Future()
            if known is None:
                try:
                    future.set_result(self._tried(deployment, model, seed, factor, early_stop))
                except BaseException as error:
                    future.set_exception(error)
                    raise
            part = future.result()
            if part is not None or early_stop:
                return part
            with self._lock:  # it was stopped, and its figures are wanted after all
                if self._parts.get(key) is future:
                    del self._parts[key]

    @staticmethod
    def _key(deployment: Deployment, model: str, seed: int, factor: float) -> tuple[Any, ...]:
        slices = sorted(r.slice.name for r in deployment.replicas if r.model == model)
        return (model, tuple(slices), deployment.batching[model], seed, factor)

    def _tried(self, deployment: Deployment, model: str, seed: int, factor: float, early_stop: bool) -> Part | None:
        schedule = self.schedule(model, seed, factor)
        mine = tuple(r for r in deployment.replicas if r.model == model)
        alone = replace(deployment, replicas=mine, models={model: deployment.models[model]})
        name = f"{model} on {' + '.join(r.slice.name for r in mine)}"
        figures = self._simulated(name, _only(self.scenario, model), alone, schedule, seed, early_stop=early_stop)
        return Part(figures, summary.worst_margin(figures)) if figures is not None else None

    def _simulated(
        self,
        name: str,
        scenario: Scenario,
        deployment: Deployment,
        schedule: Schedule,
        seed: int,
        *,
        early_stop: bool = False,
        rows: bool = False,
    ) -> Summary | None:
        with self._lock:
            self.simulations += 1
        spec = _spec_of(deployment, self.scenario.deployment)
        asked = msgspec.structs.replace(_lasting(scenario, schedule.duration_s), deployment=spec)
        candidate = Candidate(name, asked, self.scenario.seed + seed, schedule, early_stop=early_stop, rows=rows)
        return self.workers.simulate(candidate, self.times).summary


def tightest_slo(summaries: Sequence[Summary]) -> str | None:
    """The SLO with least room in any of the summaries, in words; a missed one before one that is met."""
    verdicts = [
        (name, v)
        for figures in summaries
        for name, c in figures["classes"].items()
        for v in c["slos"]
        if v["met"] is not None
    ]
    if not verdicts:
        return None
    name, v = max(
        verdicts, key=lambda item: (item[1]["met"] is False, (item[1]["value_ms"] or 1e12) / item[1]["limit_ms"])
    )
    value = f"{v['value_ms']:.0f} ms" if v["value_ms"] is not None else "nothing completed"
    return f"{name} {v['metric'].removesuffix('_ms').upper()} {v['statistic']} {value}, limit {v['limit_ms']:g} ms"


def _only(scenario: Scenario, model: str | None) -> Scenario:
    if model is None:
        return scenario
    return msgspec.structs.replace(scenario, models={model: scenario.models[model]}, traffic=scenario.traffic_of(model))


def _lasting(scenario: Scenario, duration_s: float) -> Scenario:
    return msgspec.structs.replace(scenario, duration=duration_s, warmup=min(scenario.warmup, duration_s / 2))


def _spec_of(deployment: Deployment, own: DeploymentSpec) -> DeploymentSpec:
    """The deployment as a file would have it: `build` makes the same of it, but for which of equal slices a replica
    has. What a layout does not change is as in `own`."""
    replicas, rows = list(deployment.replicas), []
    while replicas:
        first = replicas[0]
        del replicas[: first.processes]  # they share a slice
        rows.append(
            ReplicaSpec(
                model=first.model,
                slice=first.slice.name,
                processes=first.processes,
                worker=first.worker,
                threads=first.threads,
                # An engine with blocks of its own has them by its own rule.
                kv_cache_tokens=first.kv_tokens_max if deployment.engine.block_size is None else None,
            )
        )
    layout = deployment.layouts[0]
    return msgspec.structs.replace(
        own,
        count=len(deployment.layouts),
        mig=[] if deployment.gpu is None or layout == (mig.WHOLE,) else list(layout),
        replicas=rows,
        batching=dict(deployment.batching),
    )
