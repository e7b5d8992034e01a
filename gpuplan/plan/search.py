"""The plan: which layout, what on it, how large the batches, when to scale; each choice by simulation.

`make_plan(run)` goes these steps, and its document says what was tried:
1. Step times are fitted to the run where it has steps of its own; the roofline stands in elsewhere.
2. The fewest cards that could carry the demand by capacity (an integer programme) is where the count begins.
3. For that many cards, every layout is simulated with its best assignments of models to slices. If none meets every
   SLO, one card more, up to the deployment's `max_gpus`.
4. Of those with about as much room at their tightest SLO as the best, the finalists are those that leave most of the
   card free. They are simulated again on seeds they were not chosen on; the first that holds on all wins.
5. On the winner, batch sizes, delays and queue limits are settled, then thresholds; the whole is simulated as it
   stands, again on fresh seeds. Settings that fail there are taken back.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from gpuplan.errors import InputError, RunError
from gpuplan.hardware import mig
from gpuplan.hardware.catalog import Gpu
from gpuplan.plan import batches, calibrate, capacity, equal_cards, layouts, thresholds
from gpuplan.plan.document import Findings, document
from gpuplan.plan.packing_terms import layouts_of
from gpuplan.plan.trials import LayoutTried, Trial, Trials
from gpuplan.record.run import Run
from gpuplan.record.summary import Summary
from gpuplan.scenario import deployment as supply
from gpuplan.scenario import files
from gpuplan.scenario.demand import DeploymentSpec, ReplicaSpec, Scenario
from gpuplan.sim.many import Workers

ASSIGNMENTS_SIMULATED = 3
"""Per layout: the load estimate ranks well, but not so well that a later choice is never better."""
LAYOUTS_KEPT = 8
"""Of those that failed with n cards, how many are tried with n + 1."""
FINALISTS = 4
ALIKE = 0.05
"""Margins this close are the same: the difference is the noise of a percentile."""
FRESH_SEEDS = (1001, 2002)


def make_plan(
    run: Run, *, workers: int | None = 1, on_progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """`plan.json` for the scenario of a run. Raises RunError when a model's step times are unknown or it fits nowhere.

    `workers` is how many candidates are simulated at once, each in a process of its own (None: one on each core); the
    plan is the same. `on_progress` is told in a few words what is being tried.
    """
    with Workers(workers) as hands:
        hands.warm()
        return _planned(run, hands, on_progress)


def _planned(run: Run, workers: Workers, on_progress: Callable[[str], None]) -> dict[str, Any]:
    started_s = time.perf_counter()
    scenario = _always_there(files.from_builtins(run.meta.scenario))
    times = calibrate.fit(run)
    trials = Trials(scenario, times, rate_scale=run.meta.rate_scale, speed=run.meta.speed, workers=workers)
    own = supply.resolve(scenario)
    if own.engine.tensor_parallel > 1:
        raise RunError(
            "a plan cuts single cards, and deployment.engine.tensor_parallel_size takes several for a replica"
        )
    if own.gpu is None:
        found = _Found(trials.trial(scenario.deployment), bound=None)
    else:
        found = _Layouts(trials, own.gpu, scenario.deployment, on_progress).search()
    on_progress("settling batch sizes")
    spec, reasons = batches.recommend(trials, found.winner)
    final = trials.trial(spec)
    fresh = _on_fresh_seeds(trials, final)
    if found.winner.holds and not all(figures["meets_slos"] for figures in fresh.values()):
        final = trials.trial(found.winner.spec)
        fresh = _on_fresh_seeds(trials, final)
        reasons = dict.fromkeys(
            reasons, "as configured: other settings did better on the seeds they were tuned on only"
        )
    on_progress("finding thresholds")
    gpus = len(final.deployment.layouts)
    names = list(scenario.models)
    advice = workers.each(lambda name: thresholds.recommend(trials, final.deployment, name, gpus), names)
    on_progress("comparing the simulation with the run")
    return document(
        Findings(
            trials=trials,
            final=final,
            predicted=trials.whole(final.deployment),
            fresh=fresh,
            bound=found.bound,
            layouts_tried=found.tried,
            batching_reasons=reasons,
            autoscale=dict(zip(names, advice, strict=True)),
            backtest=calibrate.backtest(run) if run.meta.source == "bench" else None,
            notes=found.notes,
            started_s=started_s,
        )
    )


def _always_there(scenario: Scenario) -> Scenario:
    """The scenario without its autoscale rules and its faults: a plan says how many replicas hold the SLOs when all of
    them are there, and proposes thresholds of its own."""
    spec = scenario.deployment
    fixed = msgspec.structs.replace(spec, autoscale=msgspec.structs.replace(spec.autoscale, models={}))
    return msgspec.structs.replace(scenario, deployment=fixed, faults=[])


def _on_fresh_seeds(trials: Trials, trial: Trial) -> dict[int, Summary]:
    figures = trials.workers.each(lambda seed: trials.whole(trial.deployment, seed=seed), FRESH_SEEDS)
    return dict(zip(FRESH_SEEDS, figures, strict=True))


@dataclass(slots=True)
class _Found:
    winner: Trial
    bound: int | None
    tried: list[LayoutTried] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class _Layouts:
    """The search over layouts of one kind of card."""

    def __init__(self, trials: Trials, card: Gpu, own: DeploymentSpec, on_progress: Callable[[str], None]) -> None:
        self._trials, self._card, self._own, self._say = trials, card, own, on_progress
        self._rates = {name: demand.rate_per_s for name, demand in trials.demands.items()}
        self._capacities = self._all_capacities()

    def search(self) -> _Found:
        bound = equal_cards.cards_needed_min(self._card, self._rates, self._capacities)
        most = self._own.autoscale.max_gpus
        tried: list[LayoutTried] = []
        failed: list[Trial] = []
        for count in range(min(bound or 1, most), most + 1):
            round_ = self._round(count, self._worth_another(tried))
            tried += round_
            ranked = sorted((t.trial for t in round_ if t.trial), key=lambda t: t.rank)
            winner = self._verified([t for t in ranked if t.holds])
            if winner is not None:
                return _Found(winner, bound, tried)
            failed += ranked[:1]
        if not failed:
            raise RunError(f"no layout of up to {most} x {self._card.name} has a slice for every model")
        # Where no number of cards is enough, the fewest that come as near as any: more would be bought for nothing.
        near = min(t.margin for t in failed) * (1 + ALIKE)
        best = next(t for t in failed if t.margin <= near)
        note = f"no layout of up to {most} cards (autoscale.max_gpus) meets every SLO; this is the least as near to it"
        return _Found(best, bound, tried, [note])

    def _worth_another(self, tried: list[LayoutTried]) -> set[tuple[str, ...]]:
        """Layouts to try with one card more: all at first, then the best of the last round and those that had too few
        slices for all models."""
        last = [t for t in tried if t.count == tried[-1].count]
        ranked = sorted((t for t in last if t.trial), key=lambda t: t.trial.rank if t.trial else (True, 0.0))
        kept = {t.profiles for t in ranked[:LAYOUTS_KEPT]} | {t.profiles for t in last if t.trial is None}
        return kept or set(layouts_of(self._card))

    def _round(self, count: int, wanted: set[tuple[str, ...]]) -> list[LayoutTried]:
        found = layouts.candidates(self._card, count, self._rates, self._capacities, best=ASSIGNMENTS_SIMULATED)
        found = {profiles: choices for profiles, choices in found.items() if profiles in wanted}
        specs = {
            profiles: [self._spec(count, profiles, choice.replicas) for choice in choices]
            for profiles, choices in found.items()
        }
        here = f"{count} x {self._card.name}"
        models = self._trials.scenario.models
        self._trials.ahead(
            [supply.build(spec, models) for choices in specs.values() for spec in choices],
            on_progress=lambda done, of: self._say(f"{here}, simulation {done} of {of}"),
        )

        def tried(profiles: tuple[str, ...]) -> LayoutTried:
            self._say(f"{here}: {' + '.join(profiles)}")
            results = [self._trials.trial(spec) for spec in specs[profiles]]
            best = self._trimmed(min(results, key=lambda t: t.rank)) if results else None
            return LayoutTried(count, profiles, best, "" if best else self._why_impossible(profiles, count))

        return self._trials.workers.each(tried, specs)

    def _trimmed(self, trial: Trial, margin_max: float | None = None) -> Trial:
        """The trial without the replicas that it holds as well without: what is left free, others can have."""
        margin_max = trial.margin * (1 + ALIKE) if margin_max is None else margin_max
        for spec in _one_replica_fewer(trial.spec):
            smaller = self._trials.trial_if_holds(spec)
            if smaller is not None and smaller.margin <= margin_max:
                return self._trimmed(smaller, margin_max)
        return trial

    def _verified(self, holding: list[Trial]) -> Trial | None:
        """The first of the finalists that holds on every fresh seed, or None."""
        if not holding:
            return None
        self._say("checking the finalists on fresh seeds")
        alike = [t for t in holding if t.margin <= holding[0].margin * (1 + ALIKE)]
        alike.sort(key=lambda t: (t.occupied, t.rank))
        others = [t for t in holding if t not in alike]
        for finalist in [*alike, *others][:FINALISTS]:
            if self._holds_on_fresh_seeds(finalist.spec):
                return finalist
        return None

    def _holds_on_fresh_seeds(self, spec: DeploymentSpec) -> bool:
        trials = self._trials
        return all(trials.workers.each(lambda seed: trials.trial_if_holds(spec, seeds=(seed,)), FRESH_SEEDS))

    def _spec(self, count: int, profiles: tuple[str, ...], replicas: tuple[ReplicaSpec, ...]) -> DeploymentSpec:
        cut = [] if profiles == (mig.WHOLE,) else list(profiles)
        return msgspec.structs.replace(self._own, count=count, mig=cut, replicas=list(replicas))

    def _all_capacities(self) -> dict[tuple[str, str], float]:
        """Requests per second of every model on every profile of the card that it fits."""
        found, unknown = {}, dict[str, RunError]()
        for part in (mig.whole(self._card), *mig.plain_profiles(self._card)):
            for name, source in self._trials.scenario.models.items():
                alone = ReplicaSpec(model=name, slice=part.name)
                try:
                    deployment = supply.build(self._spec(1, (part.name,), (alone,)), {name: source})
                except InputError:
                    continue  # it does not fit there
                (replica,) = deployment.replicas
                try:
                    timer = self._trials.times.timer(deployment, replica)
                except RunError as error:
                    unknown[name] = error
                    continue  # nobody has measured it there
                found[(name, part.name)] = capacity.requests_per_s_max(
                    replica, timer, self._trials.demands[name], deployment.batching[name]
                )
        for name, why in unknown.items():
            if not any(model == name for model, _ in found):
                raise why
        return found

    def _why_impossible(self, profiles: tuple[str, ...], count: int) -> str:
        for model in self._rates:
            if not any((model, kind) in self._capacities for kind in profiles):
                return (
                    f"no slice has the memory{' and a measurement' if self._trials.times.measured else ''} for {model}"
                )
        return f"slices for {len(self._rates)} models, each of which needs its own: there are {len(profiles) * count}"


def _one_replica_fewer(spec: DeploymentSpec) -> Iterator[DeploymentSpec]:
    """Every way to drop one replica and keep one of each model, the first named (the largest slices) first."""
    counts: Counter[str] = Counter()
    for row in spec.replicas:
        counts[row.model] += row.count
    for i, row in enumerate(spec.replicas):
        if counts[row.model] > 1:
            fewer = [msgspec.structs.replace(row, count=row.count - 1)] if row.count > 1 else []
            yield msgspec.structs.replace(spec, replicas=[*spec.replicas[:i], *fewer, *spec.replicas[i + 1 :]])
