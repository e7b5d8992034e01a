"""When to add and remove replicas: thresholds on queue depth, from simulated loads below and above what the plan holds.

The metric is requests waiting per replica: GPU utilisation says 'busy' at 60 % and at 300 % of what a replica can
bear, a queue does not. Each model is simulated at multiples of the scenario's rate: doubled until its SLOs break, then
halved in between. The queues on both sides of that load give the threshold to scale up; the queue at a load that one
replica fewer would hold too gives the threshold to scale down. Both are averages over time, not whole requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from gpuplan.plan.trials import Part, Trials
from gpuplan.scenario.deployment import Deployment

METRIC = "queue_depth_per_replica"
FACTOR_MAX = 64.0
HALVINGS = 2
# Kubernetes' Horizontal Pod Autoscaler waits 300 s before it scales down, and looks every 15 s.
STABILIZATION_WINDOW_S = 300.0
COOLDOWN_S_MIN = 15.0
DOWN_MARGIN = 0.8
"""Scale down only where one replica fewer would still be this far below what it holds."""
QUEUE_MIN = 0.1
"""No threshold below this: averaged over a minute, that is one request waiting for six seconds."""


def recommend(trials: Trials, deployment: Deployment, model: str, gpus: int) -> dict[str, Any]:
    """`autoscale.<model>` of a plan, the simulated loads behind it included."""
    rows = _sweep(trials, deployment, model, trials.part)
    replicas = len(deployment.replicas_of(model))
    held = [row for row in rows if row["meets_slos"]]
    last = held[-1] if held else None
    missed = next((row for row in rows if not row["meets_slos"]), None)
    up = float(f"{_up(last, missed):.2g}")
    scale = deployment.autoscale
    return {
        "metric": METRIC,
        "scale_up_at": up,
        "scale_down_at": _down(held, replicas, up),
        "cooldown_s": max(scale.cold_start, COOLDOWN_S_MIN),
        "stabilization_window_s": max(STABILIZATION_WINDOW_S, 2 * scale.cold_start),
        "min_replicas": replicas,
        "max_replicas": replicas * max(scale.max_gpus // max(gpus, 1), 1),
        "holds_up_to_factor": last["rate_factor"] if last else None,
        "reason": _reason(last, missed),
        "evidence": rows,
    }


def highest_held(trials: Trials, deployment: Deployment, model: str) -> float:
    """The highest multiple of the rate at which the model's SLOs hold; 1 where none does."""
    rows = _sweep(trials, deployment, model, trials.part_if_holds)
    return float(max([1.0, *(row["rate_factor"] for row in rows if row["meets_slos"])]))


def _sweep(
    trials: Trials, deployment: Deployment, model: str, part: Callable[..., Part | None]
) -> list[dict[str, Any]]:
    """Loads and what became of them, in order of load, none after the first that misses an SLO."""

    def row(factor: float) -> dict[str, Any]:
        return _row(part(deployment, model, factor=factor), deployment, model, factor)

    def tried(*factors: float) -> dict[float, dict[str, Any]]:
        return dict(zip(factors, trials.workers.each(row, factors), strict=True))

    rows = tried(0.5, 1.0)
    factor, abreast = 1.0, min(trials.workers.count, 2)  # the second is in vain where the first breaks
    while rows[factor]["meets_slos"] and factor < FACTOR_MAX:
        ahead = [factor * 2**i for i in range(1, abreast + 1) if factor * 2**i <= FACTOR_MAX]
        rows |= tried(*ahead)
        factor = next((f for f in ahead if not rows[f]["meets_slos"]), ahead[-1])
    if not rows[factor]["meets_slos"]:
        good, bad = factor / 2, factor
        for _ in range(HALVINGS):
            middle = round(math.sqrt(good * bad), 2)
            rows |= tried(middle)
            good, bad = (middle, bad) if rows[middle]["meets_slos"] else (good, middle)
    ordered = [rows[factor] for factor in sorted(rows)]
    first_miss = next((i for i, row in enumerate(ordered) if not row["meets_slos"]), len(ordered))
    return ordered[: first_miss + 1]


def _row(part: Part | None, deployment: Deployment, model: str, factor: float) -> dict[str, Any]:
    """None is a part that does not hold, whose figures nobody asked for."""
    if part is None:
        return {"rate_factor": factor, "meets_slos": False}
    depth = part.figures["models"][model]["queue_depth"]
    replicas = len(deployment.replicas_of(model))
    return {
        "rate_factor": factor,
        "queue_depth_per_replica": depth["mean"] / replicas if depth else 0.0,
        "queue_depth_per_replica_p95": depth["p95"] / replicas if depth else 0.0,
        "slo_attainment": part.figures["overall"]["slo_attainment"],
        "meets_slos": part.holds and not part.figures["overall"]["rejected"],
    }


def _up(last: dict[str, Any] | None, missed: dict[str, Any] | None) -> float:
    """Between the queue at the highest load that holds and the queue at the lowest that does not (their geometric
    mean): crossed before the SLOs break, and not at every burst that they bear."""
    held = max(last["queue_depth_per_replica"], QUEUE_MIN) if last else QUEUE_MIN
    if missed is None:
        return max(float(last["queue_depth_per_replica_p95"]), QUEUE_MIN) if last else QUEUE_MIN
    return math.sqrt(held * max(missed["queue_depth_per_replica"], held))


def _down(held: list[dict[str, Any]], replicas: int, up: float) -> float:
    """The queue at a load that would still hold after one of `replicas + 1` is gone."""
    if not held:
        return 0.0
    safe_factor = held[-1]["rate_factor"] * replicas / (replicas + 1) * DOWN_MARGIN
    safe = [row["queue_depth_per_replica"] for row in held if row["rate_factor"] <= safe_factor]
    return min(round(max(safe, default=0.0), 2), up / 2)


def _reason(last: dict[str, Any] | None, missed: dict[str, Any] | None) -> str:
    if last is None:
        return "no load that was simulated holds the SLOs: scale up as soon as a request waits"
    mean, p95 = last["queue_depth_per_replica"], last["queue_depth_per_replica_p95"]
    waiting = f"{mean:.2g} waiting per replica on average, p95 {p95:.2g}"
    if missed is None:
        return f"the SLOs hold at every load simulated, up to {last['rate_factor']:g} x the rate ({waiting})"
    return (
        f"the SLOs hold up to {last['rate_factor']:g} x the rate ({waiting}) and break at "
        f"{missed['rate_factor']:g} x ({missed['queue_depth_per_replica']:.2g} waiting)"
    )
