"""From a Run to service times, and how wrong a simulation with them is.

`fit` takes a run's batch rows and gives `ServiceTimes`: for each model and slice, non-negative least squares of step
time on the roofline (or, where there is none, on tokens and samples), weighted so that every step counts by its
relative error. `backtest` fits on the first half of a run and predicts the second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gpuplan.errors import RunError
from gpuplan.hardware.roofline import StepLoad
from gpuplan.policy.cost import step_costs
from gpuplan.record import summary
from gpuplan.record.run import Run
from gpuplan.scenario import files
from gpuplan.scenario.demand import SlowFault
from gpuplan.scenario.deployment import Deployment, place_of, resolve
from gpuplan.scenario.schedule import Schedule, ScheduledRequest
from gpuplan.sim import profiles
from gpuplan.sim.service_times import Fit, ServiceTimes
from gpuplan.sim.simulator import simulate

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

STEPS_MIN = 20
"""Fewer steps than this say too little of a spread to fit."""
ROUNDS = 4
"""Of weighted least squares: the weights are the last round's times, so that errors are relative and unbiased."""
PULL = 1e-4
HICCUP = 2.0
"""A step this many times its usual length was held up by the host: in the last round it counts no further, and it stays
in the spread."""
RANKS = 64
"""How many evenly spaced ranks keep a fit's spread."""
CLOCK_S = 1e-5
"""No step is shorter than this: below it the measurement is the clock's."""
SAMPLES_FOR = {"p50": 10, "p95": 60, "p99": 300}
"""How many requests a percentile needs before its error is worth saying: about three beyond it."""


def fit(run: Run, *, until_s: float = float("inf")) -> ServiceTimes:
    """Service times from the steps begun before `until_s`, and from the scenario's table where nothing was measured."""
    scenario = files.from_builtins(run.meta.scenario)
    deployment = resolve(scenario)
    by_id = {r.id: r for r in deployment.every_replica()}
    steps = run.batches[~run.batches["failed"].astype(bool) & (run.batches["started_s"] < until_s)]
    steps = steps[~_slowed(steps, deployment, begun_s=float(run.requests["arrived_s"].min()))]
    groups: dict[tuple[str, str], list[pd.DataFrame]] = {}
    for replica_id, rows in steps.groupby("replica"):
        replica = by_id.get(place_of(str(replica_id)))
        if replica is not None:
            groups.setdefault((replica.model, replica.slice.name), []).append(rows)
    fits = {}
    for (model, slice_name), parts in groups.items():
        replica = next(r for r in by_id.values() if (r.model, r.slice.name) == (model, slice_name))
        loads, seconds = _loads([row for rows in parts for row in rows.itertuples(index=False)])
        costs = step_costs(deployment, replica)
        if len(loads) >= STEPS_MIN:
            fits[(model, slice_name)] = _fit(loads, seconds, [costs.step_s(load) for load in loads] if costs else None)
    uplink_s, downlink_s = _overheads(run, until_s)
    elsewhere = profiles.service_times(scenario)
    if run.meta.source == "simulate":  # its steps took what the table says: that is no measurement of its own
        fits = {key: fit for key, fit in fits.items() if key[0] not in {model for model, *_ in elsewhere.measured}}
    return ServiceTimes(fits, uplink_s, downlink_s, elsewhere.measured)


def backtest(run: Run) -> dict[str, Any] | None:
    """How far a simulation is from what was measured, on time it has not seen; None where nothing can be predicted.

    Step times come from the steps before the moment by which half of the requests were scheduled, the whole schedule
    is simulated, and the requests after that moment are compared. Positive errors are predictions above the
    measurement.
    """
    scenario = files.from_builtins(run.meta.scenario)
    counted = run.requests[run.requests["sent_s"].notna() & ~run.requests["warmup"].astype(bool)]
    if counted.empty:
        return None
    half_s = float(counted["scheduled_s"].median())
    times = fit(run, until_s=half_s)
    try:
        predicted_run = simulate(
            scenario, resolve(scenario), schedule_of(run), times, seed=run.meta.seed, keep_telemetry=False
        )
    except RunError:
        return None
    measured, predicted = (summary.summarize(r, since_s=half_s) for r in (run, predicted_run))
    pairs = {
        path: (value, guess)
        for path, value in _comparable(measured).items()
        if value and (guess := _comparable(predicted).get(path)) is not None
    }
    if not pairs:
        return None
    errors = {path: (guess - value) / value * 100 for path, (value, guess) in pairs.items()}
    what = "step times fitted on" if times.fits else "roofline alone; nothing fitted on"
    return {
        "error_percent": errors,
        "measured": {path: value for path, (value, _) in pairs.items()},
        "predicted": {path: guess for path, (_, guess) in pairs.items()},
        "basis": f"{what} the first half of this run (steps begun before {half_s:.1f} s); "
        "compared on the requests scheduled after it",
        "worst": max(errors, key=lambda path: abs(errors[path])),
        "worst_percent": max(map(abs, errors.values())),
        "median_percent": float(np.median(np.abs(list(errors.values())))),
        "requests": measured["overall"]["requests"],
    }


def schedule_of(run: Run) -> Schedule:
    """The requests of a run that were really sent, as a schedule to simulate."""
    rows = run.requests[run.requests["sent_s"].notna()]
    columns = ("request_id", "scheduled_s", "traffic_class", "model", "prompt_tokens", "output_tokens")
    requests = (
        ScheduledRequest(int(i), float(s), str(c), str(m), int(p), int(o))
        for i, s, c, m, p, o in rows[list(columns)].itertuples(index=False)
    )
    return Schedule(tuple(sorted(requests, key=lambda r: r.scheduled_s)), run.meta.duration_s)


def _slowed(steps: pd.DataFrame, deployment: Deployment, *, begun_s: float) -> NDArray[np.bool_]:
    """Which steps an injected fault made slower: they say nothing of the card."""
    slowed, since_s = np.zeros(len(steps), dtype=bool), steps["started_s"].to_numpy() - begun_s
    for fault in deployment.faults:
        if isinstance(fault.kind, SlowFault):
            here = steps["replica"].map(place_of).to_numpy() == fault.replica_id
            slowed |= here & (since_s >= fault.at_s) & (since_s < fault.until_s)
    return slowed


def _loads(rows: list[Any]) -> tuple[list[StepLoad], NDArray[np.float64]]:
    loads = [
        StepLoad(int(r.prefill_tokens), int(r.attended_pairs), int(r.decodes), int(r.context_tokens), int(r.samples))
        for r in rows
    ]
    return loads, np.array([r.done_s - r.started_s for r in rows])


def _fit(loads: list[StepLoad], seconds: NDArray[np.float64], roofline_s: list[float] | None) -> Fit:
    from scipy.optimize import nnls

    ones, zeros = np.ones(len(loads)), np.zeros(len(loads))
    if roofline_s is not None:
        features = np.column_stack([ones, np.array(roofline_s), zeros, zeros])
    else:
        tokens, samples = (np.array([getattr(load, name) for load in loads]) for name in ("prefill_tokens", "samples"))
        features = np.column_stack([ones, zeros, tokens, samples])
    seconds = np.maximum(seconds, CLOCK_S)
    # The last row pulls the fixed cost to zero, so weakly that only steps which cannot tell it from the rest feel it: a
    # run of single requests must not teach that a batch of 64 costs the same.
    pull = np.array([[np.sqrt(PULL * len(loads)) / np.median(seconds), 0.0, 0.0, 0.0]])
    mean = target = seconds
    for round_ in range(ROUNDS):
        coefficients, _ = nnls(np.vstack([features / mean[:, None], pull]), np.append(target / mean, 0.0))
        mean = np.maximum(features @ coefficients, CLOCK_S)
        if round_ == ROUNDS - 2:
            target = np.minimum(seconds, HICCUP * mean * np.median(seconds / mean))
    ratios = np.quantile(seconds / mean, (np.arange(RANKS) + 0.5) / RANKS)
    error = float(np.mean(np.abs(seconds / mean - 1)))
    fixed_s, factor, per_token_s, per_sample_s = map(float, coefficients)
    return Fit(fixed_s, factor, per_token_s, per_sample_s, tuple(map(float, ratios)), len(loads), error)


def _overheads(run: Run, until_s: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What passes between client and core, at evenly spaced ranks: from the schedule to the arrival, and from the last
    step to the client's last byte. Zero where the server tells nothing."""
    done = run.requests[(run.requests["status"] == "completed") & (run.requests["scheduled_s"] < until_s)]
    if run.meta.source != "bench" or done.empty or done["arrived_s"].isna().all():
        return (0.0,), (0.0,)
    ranks = (np.arange(RANKS) + 0.5) / RANKS
    spans = (done["arrived_s"] - done["scheduled_s"], done["done_s"] - done["finished_s"])
    uplink_s, downlink_s = (np.quantile(s.dropna().to_numpy(dtype=np.float64), ranks).clip(min=0.0) for s in spans)
    return tuple(map(float, uplink_s)), tuple(map(float, downlink_s))


def _comparable(figures: dict[str, Any]) -> dict[str, float]:
    """The figures that a back-test compares, by dotted path; percentiles only of samples large enough for them."""
    found: dict[str, float] = {"overall.request_throughput": figures["overall"]["request_throughput"]}
    if figures["overall"]["output_throughput"]:
        found["overall.output_throughput"] = figures["overall"]["output_throughput"]
    for name, part in figures["classes"].items():
        metrics = ("ttft_ms", "tpot_ms", "e2el_ms") if part["ttft_ms"]["p50"] is not None else ("e2el_ms",)
        for metric in metrics:
            for statistic, samples in SAMPLES_FOR.items():
                if part["completed"] >= samples and part[metric][statistic] is not None:
                    found[f"classes.{name}.{metric}.{statistic}"] = part[metric][statistic]
    return found
