"""Simulations that a plan is chosen by, each done once.

A model's requests meet only its own replicas, so a deployment is tried model by model: what one model does on
'2g.20gb + 1g.10gb' is the same in every layout that gives it those, and is simulated once. A `Part` is one model's
result on one set of replicas, the worst over the seeds asked for; a `Trial` is a whole deployment's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from gpuplan.plan.capacity import ModelDemand, demand_of
from gpuplan.record import summary
from gpuplan.record.summary import Summary
from gpuplan.scenario import deployment as supply
from gpuplan.scenario.demand import DeploymentSpec, Scenario, Trace
from gpuplan.scenario.deployment import Deployment
from gpuplan.scenario.schedule import Schedule, build_schedule
from gpuplan.sim.service_times import ServiceTimes
from gpuplan.sim.simulator import simulate

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

    def __init__(self, scenario: Scenario, times: ServiceTimes, *, rate_scale: float, speed: float) -> None:
        self.scenario, self.times = scenario, times
        self._rate_scale, self._speed = rate_scale, speed
        self._parts: dict[tuple[Any, ...], Part] = {}
        self._schedules: dict[tuple[str | None, int, float], Schedule] = {}
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

    def part(self, deployment: Deployment, model: str, *, seeds: Sequence[int] = (0,), factor: float = 1.0) -> Part:
        """One model of the deployment at `factor` times its rate, at its worst over the seeds."""
        return max(
            (self._part(deployment, model, seed, factor) for seed in seeds), key=lambda p: (not p.holds, p.margin)
        )

    def whole(self, deployment: Deployment, *, seed: int = 0) -> Summary:
        """All models of the deployment together, as they will run."""
        self.simulations += 1
        schedule = self.schedule(None, seed, 1.0)
        scenario = _lasting(self.scenario, schedule.duration_s)
        return summary.summarize(
            simulate(scenario, deployment, schedule, self.times, seed=scenario.seed + seed, keep_telemetry=False)
        )

    def schedule(self, model: str | None, seed: int, factor: float) -> Schedule:
        """The schedule of one model's classes (None: all) with the seed moved and the rates multiplied."""
        key = (model, seed, factor)
        if key not in self._schedules:
            scenario = _lasting(_only(self.scenario, model), self._horizon_s())
            scenario = msgspec.structs.replace(scenario, seed=scenario.seed + seed)
            built = build_schedule(scenario, rate_scale=self._rate_scale * factor, speed=self._speed)
            if len(built.requests) > REQUESTS_MAX:
                cut = built.requests[:REQUESTS_MAX]
                built = Schedule(cut, cut[-1].scheduled_s)
                if seed == 0 and factor == 1.0:
                    self.notes.append(f"planned on the first {cut[-1].scheduled_s:.0f} s of {model or 'all models'}")
            self._schedules[key] = built
        return self._schedules[key]

    def _horizon_s(self) -> float:
        if any(isinstance(c.arrivals, Trace) for c in self.scenario.traffic):
            return self.scenario.duration
        return max(self.scenario.duration, HORIZON_S_MIN)

    def _part(self, deployment: Deployment, model: str, seed: int, factor: float) -> Part:
        replicas = tuple(r for r in deployment.replicas if r.model == model)
        key = (model, tuple(sorted(r.slice.name for r in replicas)), deployment.batching[model], seed, factor)
        if key not in self._parts:
            self.simulations += 1
            schedule = self.schedule(model, seed, factor)
            scenario = _lasting(_only(self.scenario, model), schedule.duration_s)
            alone = replace(deployment, replicas=replicas, models={model: deployment.models[model]})
            run = simulate(scenario, alone, schedule, self.times, seed=self.scenario.seed + seed, keep_telemetry=False)
            figures = summary.summarize(run)
            self._parts[key] = Part(figures, summary.worst_margin(figures))
        return self._parts[key]


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
