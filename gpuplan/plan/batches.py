"""How large a batch may grow, how long it may wait, how deep the queue may be: for each model of a chosen layout.

Judged under stress, at the highest load that the model still holds: at ease every setting looks alike, and the best
one there would be the smallest batch. A setting is changed only when the change clearly betters the tightest SLO
there and the model then holds no less load than before; what does not matter stays as it was configured, and the reason
says so.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from gpuplan.plan import thresholds
from gpuplan.plan.capacity import requests_per_s_max
from gpuplan.plan.trials import Part, Trial, Trials
from gpuplan.scenario.demand import BatchingSpec, DeploymentSpec
from gpuplan.scenario.deployment import Deployment

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DELAYS_S = (0.0, 0.001, 0.002, 0.005, 0.01)
WORTH = 0.05
"""By how much a change must better the margin: less is the noise of a percentile."""


def recommend(trials: Trials, chosen: Trial) -> tuple[DeploymentSpec, dict[str, str]]:
    """The chosen deployment with its batching settled, and for each model why."""
    models = list(trials.scenario.models)
    settled = trials.workers.each(lambda model: _settle(trials, chosen.deployment, model), models)
    rules = {model: rule for model, (rule, _) in zip(models, settled, strict=True)}
    spec = msgspec.structs.replace(chosen.spec, batching={**chosen.spec.batching, **rules})
    return spec, {model: reason for model, (_, reason) in zip(models, settled, strict=True)}


def _settle(trials: Trials, deployment: Deployment, model: str) -> tuple[BatchingSpec, str]:
    rule = configured = deployment.batching[model]
    stress = thresholds.highest_held(trials, deployment, model)
    best = before = trials.part(deployment, model, factor=stress)
    seen_max = int(before.figures["models"][model]["batch_size"]["max"] or 1)
    larger = [size for size in SIZES if seen_max >= configured.max_batch_size < size]
    smaller = [size for size in SIZES if size < min(seen_max, configured.max_batch_size)]
    kinds: list[list[dict[str, Any]]] = [[{"max_batch_size": size} for size in (*reversed(smaller), *larger)]]
    if deployment.replicas_of(model)[0].role != "decoder":
        kinds.append([{"max_queue_delay": delay_s} for delay_s in DELAYS_S])
    for changes in kinds:
        candidates = [rule, *(msgspec.structs.replace(rule, **change) for change in changes)]
        rule, best = _best(trials, deployment, model, candidates, best, stress)
    held = thresholds.highest_held(trials, deployment.with_batching(model, rule), model)
    if held < stress:  # more room at that load and less load in all: not a bargain
        rule = configured
    if rule == configured:
        most = f"{stress:g} x the rate, the most it holds"
        why = f"kept: no other size or delay does better at {most}; {seen_max} ran at once"
    else:
        why = (
            f"holds up to {held:g} x the rate, as configured {stress:g} x; at the latter its tightest SLO stands at "
            f"{best.margin:.2f} of the limit, as configured at {before.margin:.2f}"
        )
    depth, why_depth = _queue_limit(trials, deployment, model, rule)
    return msgspec.structs.replace(rule, max_queue_size=depth), f"{why}; {why_depth}"


def _best(
    trials: Trials, deployment: Deployment, model: str, rules: list[BatchingSpec], best: Part, stress: float
) -> tuple[BatchingSpec, Part]:
    """The first rule, whose part is `best`, or the last of the others that was clearly better than all before it."""
    # Beside one that holds, those that do not are out of the question, whatever their figures.
    ask = trials.part_if_holds if best.holds else trials.part
    rule, others = rules[0], [other for other in rules[1:] if other != rules[0]]
    parts = trials.workers.each(lambda r: ask(deployment.with_batching(model, r), model, factor=stress), others)
    for other, part in zip(others, parts, strict=True):
        if part is not None and _clearly_better(part, best):
            rule, best = other, part
    return rule, best


def _clearly_better(part: Part, best: Part) -> bool:
    if part.holds != best.holds:
        return part.holds
    return part.margin < best.margin * (1 - WORTH)


def _queue_limit(trials: Trials, deployment: Deployment, model: str, rule: BatchingSpec) -> tuple[int, str]:
    """A queue deeper than what drains within the tightest limit on waiting only holds requests that miss it."""
    limits_ms = [
        limit
        for c in trials.scenario.traffic_of(model)
        for metric, limit in c.limits_ms().items()
        if metric in ("ttft_ms", "e2el_ms")
    ]
    if not limits_ms:
        return rule.max_queue_size, "queue limit as configured: there is no latency SLO to derive one from"
    per_s = sum(
        requests_per_s_max(r, trials.times.timer(deployment, r), trials.demands[model], rule)
        for r in deployment.replicas_of(model)
    )
    depth = max(math.ceil(per_s * min(limits_ms) / 1e3), rule.max_batch_size)
    return depth, f"at {per_s:.3g} requests/s a queue deeper than {depth} cannot drain within {min(limits_ms):g} ms"
