"""`plan.json`: what a search found, in the words that other tools rely on. Decides nothing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gpuplan.hardware import mig, roofline
from gpuplan.plan.trials import LayoutTried, Trial, Trials, tightest_slo
from gpuplan.record import summary
from gpuplan.record.summary import Summary
from gpuplan.scenario import deployment as supply
from gpuplan.scenario.demand import ModelSource
from gpuplan.scenario.deployment import Deployment, Slice


@dataclass(frozen=True, slots=True)
class Findings:
    """All that a search leaves behind. `bound` is the fewest cards by capacity, None where there are none to count."""

    trials: Trials
    final: Trial
    predicted: Summary
    fresh: dict[int, Summary]
    bound: int | None
    layouts_tried: Sequence[LayoutTried]
    batching_reasons: dict[str, str]
    autoscale: dict[str, Any]
    backtest: dict[str, Any] | None
    notes: list[str]
    started_s: float


def document(found: Findings) -> dict[str, Any]:
    """The plan as plain data."""
    deployment, scenario = found.final.deployment, found.trials.scenario
    card = deployment.gpu
    gpus = len(deployment.layouts) if card else 0
    price = deployment.price_per_hour
    cost = price * max(gpus, 1)
    lowest = min(price * (found.bound or 1), cost)
    seeds = {0: found.predicted, **found.fresh}
    meets = all(figures["meets_slos"] for figures in seeds.values())
    own_price = scenario.deployment.price_per_hour is not None
    return {
        "schema_version": 1,
        "scenario": scenario.name,
        "meets_slos": meets,
        "verdict": _verdict(deployment, seeds, meets, any(c.slo for c in scenario.traffic)),
        "gpus_needed": gpus,
        "fleet": [{"gpu": deployment.gpu_name, "count": max(gpus, 1), "price_per_hour": price}],
        "cost_per_hour": cost,
        "price_source": "the scenario" if own_price or card is None else card.price_source,
        "lower_bound_cost_per_hour": lowest,
        "optimality_gap": (cost - lowest) / cost if cost else 0.0,
        "proven_optimal": meets and found.bound is not None and gpus <= found.bound,
        "mig": {"layouts": [_layout(found.trials, deployment)] if card else []},
        "models": {name: _model(source) for name, source in deployment.models.items()},
        "replicas": _replicas(deployment),
        "batching": _batching(deployment, found.batching_reasons),
        "autoscale": found.autoscale,
        "predicted": found.predicted,
        "verified": [
            {"seed": scenario.seed + seed, "meets_slos": f["meets_slos"], "worst_margin": summary.worst_margin(f)}
            for seed, f in seeds.items()
        ],
        "backtest": found.backtest,
        "service_times": _service_times(found.trials, deployment),
        "searched": {
            "layouts_valid": len(mig.valid_layouts(card)) if card else 0,
            "layouts_maximal": len(mig.maximal_layouts(card)) if card else 0,
            "layouts_simulated": len({t.profiles for t in found.layouts_tried if t.trial}),
            "simulations": found.trials.simulations,
            "elapsed_s": time.perf_counter() - found.started_s,
        },
        "alternatives": [
            _alternative(t, found.final, price) for t in found.layouts_tried if not _is_final(t, found.final)
        ],
        "notes": [
            *found.notes,
            *found.trials.notes,
            *supply.assumptions(deployment),
            "thresholds come from simulated steady loads; the scaling loop itself was not simulated",
        ],
    }


def _verdict(deployment: Deployment, seeds: dict[int, Summary], meets: bool, asked: bool) -> str:
    what = describe(deployment)
    if meets:
        s = "s" if what.startswith("1 ") else ""
        met = f"meet{s} every SLO" if asked else f"serve{s} what is asked (no SLO was asked)"
        return f"{what} {met} on {len(seeds)} simulated seeds"
    failing = [figures for figures in seeds.values() if not figures["meets_slos"]]
    return f"no plan found that holds: {what} misses {tightest_slo(failing)}"


def describe(deployment: Deployment) -> str:
    """The cards of a deployment in a few words."""
    if deployment.gpu is None:
        count = len(deployment.replicas)
        return f"{count} replica{'s' if count > 1 else ''} on the host's CPU"
    layout = deployment.layouts[0]
    how = "uncut" if layout == (mig.WHOLE,) else "cut as " + " + ".join(layout)
    return f"{len(deployment.layouts)} x {deployment.gpu_name} {how}"


def _layout(trials: Trials, deployment: Deployment) -> dict[str, Any]:
    """The cards' one layout. `placements` holds every slice of every card; `card` says which it is on."""
    on = {r.slice: r for r in deployment.replicas}
    return {
        "gpu": deployment.gpu_name,
        "profiles": list(deployment.layouts[0]),
        "count": len(deployment.layouts),
        "placements": [_placement(trials, deployment, part, on.get(part)) for part in deployment.slices],
    }


def _placement(trials: Trials, deployment: Deployment, part: Slice, replica: supply.Replica | None) -> dict[str, Any]:
    assert part.profile is not None, "only cards have placements"
    used_bytes = None
    if replica is not None and (shape := supply.shape_of(deployment.models[replica.model])):
        demand, rule = trials.demands[replica.model], deployment.batching[replica.model]
        kv_tokens = round(rule.max_batch_size * (demand.prompt_tokens + demand.output_tokens))
        used_bytes = roofline.memory_used_bytes(shape, min(kv_tokens, replica.kv_tokens_max or kv_tokens))
    return {
        "card": part.gpu_index,
        "profile": part.name,
        "start": part.start,
        "width": part.profile.width,
        "cells": part.profile.cells,
        "slices": part.profile.slices,
        "memory_bytes": part.profile.memory_bytes,
        "memory_used_bytes": used_bytes,
        "model": replica.model if replica else None,
        "replica": replica.id if replica else None,
    }


def _model(source: ModelSource) -> dict[str, Any]:
    """What a model gives back, a `decoder` tokens and a `classifier` one answer, and what it is in the scenario."""
    named = source.builtin or source.onnx or source.emulate or source.profiled
    return {"role": supply.role(source), "source": named or "a shape of its own"}


def _replicas(deployment: Deployment) -> list[dict[str, Any]]:
    counts = Counter((r.model, r.slice.name, r.processes) for r in deployment.replicas)
    return [{"model": m, "slice": s, "processes": p, "count": n // p} for (m, s, p), n in counts.items()]


def _batching(deployment: Deployment, reasons: dict[str, str]) -> dict[str, Any]:
    return {
        name: {
            "max_batch_size": rule.max_batch_size,
            "max_queue_delay_ms": rule.max_queue_delay * 1e3,
            "max_queue_size": rule.max_queue_size,
            "max_batch_tokens": rule.max_batch_tokens,
            "reason": reasons[name],
        }
        for name, rule in deployment.batching.items()
    }


def _service_times(trials: Trials, deployment: Deployment) -> list[dict[str, Any]]:
    """What the step times of each model and slice of the plan rest on, and how far they are off: measured on this run
    where they were fitted, else the emulated GPU's own record."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for r in deployment.replicas:
        fit = trials.times.fits.get((r.model, r.slice.name))
        rows[(r.model, r.slice.name)] = {
            "model": r.model,
            "slice": r.slice.name,
            "basis": trials.times.basis(r),
            "error": fit.error if fit else _band(deployment, r),
            "steps": fit.steps if fit else 0,
        }
    return list(rows.values())


def _band(deployment: Deployment, replica: supply.Replica) -> float | None:
    if deployment.gpu is None or replica.slice.profile is None:
        return None
    model = supply.shape_of(deployment.models[replica.model])
    return roofline.band(deployment.gpu, replica.slice.profile, model).step_percent / 100


def _is_final(tried: LayoutTried, final: Trial) -> bool:
    return tried.profiles == final.deployment.layouts[0] and tried.count == len(final.deployment.layouts)


def _alternative(tried: LayoutTried, final: Trial, price: float) -> dict[str, Any]:
    trial = tried.trial
    return {
        "gpu": final.deployment.gpu_name,
        "count": tried.count,
        "profiles": list(tried.profiles),
        "replicas": _replicas(trial.deployment) if trial else [],
        "cost_per_hour": price * tried.count,
        "slo_attainment": trial.slo_attainment if trial else None,
        "worst_margin": trial.margin if trial else None,
        "meets_slos": trial.holds if trial else False,
        "simulated": trial is not None,
        "reason": _why_lost(tried, final),
    }


def _why_lost(tried: LayoutTried, final: Trial) -> str:
    trial = tried.trial
    if trial is None:
        return tried.impossible
    if not trial.holds:
        return f"misses {trial.tightest()}"
    tightest = trial.tightest()
    if tried.count < len(final.deployment.layouts):
        return f"held on one seed and missed an SLO on another; tightest {tightest}"
    if trial.margin > final.margin:
        return f"meets every SLO with less room: {tightest}"
    room = f"takes up {trial.occupied:.0%} of the cards' memory where the plan takes {final.occupied:.0%}"
    return f"meets every SLO and {room}; tightest {tightest}"
