"""Every number, from rows, once. What 'p99' or 'goodput' means is said here and nowhere else.

Definitions are those of vLLM's `bench serve` where it has one: TPOT = (E2EL - TTFT) / (tokens - 1) with requests of
one token left out, ITL pooled over all gaps, percentiles interpolated linearly. On purpose different: latencies count
from the *scheduled* time, so neither a stalled generator nor a stalled server can hide waiting (the figure from the
sent time stands beside it as `*_from_sent_ms`); rejected and failed requests miss every SLO. Requests sent in the
warm-up are left out, and so are those still open when a run was interrupted.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from gpuplan.record.run import Run
from gpuplan.scenario import files
from gpuplan.scenario.demand import Scenario, TrafficClass, quantile_of

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

Summary = dict[str, Any]
T = TypeVar("T", float, "Floats")

STATISTICS = ("mean", "p50", "p90", "p95", "p99", "p999", "max")
LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms")

ROUNDING = 1e-9
"""Of 1 - q: without it ten lost of a hundred would be more than p90 allows, and five no more than p95 does."""

NOT_THROTTLED = ("gpu_idle", "applications_clocks_setting", "display_clock_setting")
"""Reasons for a clock below its maximum that hold nobody back: nothing to do, or as somebody has set it."""


def summarize(run: Run, *, since_s: float | None = None) -> Summary:
    """`summary.json`: overall, per class and telemetry. `since_s` leaves out requests scheduled before it."""
    scenario = files.from_builtins(run.meta.scenario)
    asked = counted(run)
    first_s = scenario.warmup
    if since_s is not None:
        asked = asked[asked["scheduled_s"] >= since_s]
        first_s = max(first_s, since_s)
    measured_s = max(run.meta.measured_s - first_s, 1e-9)
    parts = [(c, asked[asked["traffic_class"] == c.name]) for c in scenario.traffic]
    good_by_class = {c.name: int(good(rows, c).sum()) for c, rows in parts}
    classes = {
        c.name: {
            **_figures(rows, good_by_class[c.name], measured_s),
            "model": c.model,
            "slos": slo_verdicts(rows, c),
        }
        for c, rows in parts
    }
    return {
        "schema_version": 1,
        "source": run.meta.source,
        "provenance": run.meta.provenance,
        "measured_s": measured_s,
        "interrupted": run.meta.interrupted,
        "unfinished": int((run.requests["status"] == "interrupted").sum()),
        "overall": _figures(asked, sum(good_by_class.values()), measured_s),
        "classes": classes,
        "models": {name: _model_figures(run, scenario, name, first_s) for name in scenario.models},
        "telemetry": _telemetry_figures(run, first_s),
        "meets_slos": all(v["met"] is not False for c in classes.values() for v in c["slos"]),
    }


def counted(run: Run) -> pd.DataFrame:
    """The requests that summaries count: not of the warm-up, and not still open when the run was interrupted."""
    rows = run.requests
    return rows[~rows["warmup"].astype(bool) & (rows["status"] != "interrupted")]


def statistics(values: Floats) -> dict[str, float | None]:
    """`{mean,p50,p90,p95,p99,p999,max}` of the values, all null when there are none."""
    if not len(values):
        return dict.fromkeys(STATISTICS)
    quantiles = np.percentile(values, [50, 90, 95, 99, 99.9])
    numbers = (float(values.mean()), *map(float, quantiles), float(values.max()))
    return dict(zip(STATISTICS, numbers, strict=True))


def latencies_ms(requests: pd.DataFrame) -> dict[str, Floats]:
    """Each latency of the completed requests. TTFT only of those that stream, TPOT of those with 2 tokens or more."""
    done = requests[requests["status"] == "completed"]
    scheduled, sent = _column(done, "scheduled_s"), _column(done, "sent_s")
    first, last, tokens = _column(done, "first_token_s"), _column(done, "done_s"), _column(done, "tokens")
    several = tokens >= 2
    with_first = ~np.isnan(first)
    gaps = [np.asarray(g, dtype=np.float64) for g in done.get("gaps_ms", ()) if g is not None and len(g)]
    return {
        "ttft_ms": latency_ms(scheduled, first)[with_first],
        "tpot_ms": tpot_ms(first[several], last[several], tokens[several]),
        "itl_ms": np.concatenate(gaps) if gaps else np.empty(0),
        "e2el_ms": latency_ms(scheduled, last),
        "ttft_from_sent_ms": (first - sent)[with_first] * 1e3,
        "e2el_from_sent_ms": (last - sent) * 1e3,
    }


def latency_ms(scheduled_s: T, until_s: T) -> T:
    """TTFT until the first token, E2E latency until the last byte: of one request, or of a column of them."""
    return (until_s - scheduled_s) * 1e3


def tpot_ms(first_token_s: T, done_s: T, tokens: T) -> T:
    """Time per output token after the first, of requests with two tokens or more."""
    return (done_s - first_token_s) / (tokens - 1) * 1e3


def send_lag_ms(requests: pd.DataFrame) -> Floats:
    """The load generator's own delay of every request that was sent."""
    lag = (_column(requests, "sent_s") - _column(requests, "scheduled_s")) * 1e3
    return lag[~np.isnan(lag)]


def good(requests: pd.DataFrame, traffic: TrafficClass) -> NDArray[np.bool_]:
    """Per request asked for: completed, and within all of its class's limits (ITL is judged pooled, not here)."""
    ok = (requests["status"] == "completed").to_numpy(dtype=bool, copy=True)
    limits = traffic.limits_ms()
    first, last, scheduled = (_column(requests, n) for n in ("first_token_s", "done_s", "scheduled_s"))
    tokens = _column(requests, "tokens")
    with np.errstate(invalid="ignore", divide="ignore"):
        if "ttft_ms" in limits:
            ok &= latency_ms(scheduled, first) <= limits["ttft_ms"]
        if "e2el_ms" in limits:
            ok &= latency_ms(scheduled, last) <= limits["e2el_ms"]
        if "tpot_ms" in limits:
            ok &= (tokens < 2) | (tpot_ms(first, last, tokens) <= limits["tpot_ms"])
    return ok


def slo_verdicts(requests: pd.DataFrame, traffic: TrafficClass) -> list[dict[str, Any]]:
    """Per SLO of the class: the limit, the value, and whether it is met with failures counted as infinitely slow.

    `value_ms` is over completed requests, as elsewhere; `met` is stricter when requests failed: of all that were
    asked for, the percentile's share has to be within the limit. Where nothing was asked for, `met` is None.
    """
    by_metric = latencies_ms(requests)
    verdicts = []
    for metric, limits in traffic.slo.items():
        values = by_metric[metric]
        lost = int((requests["status"] != "completed").sum())
        answered = len(values) if metric != "itl_ms" else len(requests) - lost
        for statistic, limit_ms in limits.items():
            value = statistics(values)[statistic]
            met = slo_met(values, statistic, limit_ms, lost=lost, answered=answered) if len(requests) else None
            verdicts.append(
                {"metric": metric, "statistic": statistic, "limit_ms": limit_ms, "value_ms": value, "met": met}
            )
    return verdicts


def slo_met(values_ms: Floats, statistic: str, limit_ms: float, *, lost: int, answered: int) -> bool:
    """Whether an SLO holds for `answered` requests with these latencies and `lost` ones that were infinitely slow."""
    if not len(values_ms):
        return lost == 0
    if statistic == "mean":
        return lost == 0 and float(values_ms.mean()) <= limit_ms
    q = quantile_of(statistic)
    share = lost / (lost + answered)
    return share <= 1 - q + ROUNDING and bool(np.quantile(values_ms, min(q / (1 - share), 1.0)) <= limit_ms)


def worst_margin(summary: Summary) -> float:
    """The largest value / limit over all SLOs: below 1 all are met, by how much it says. Infinite where one is missed
    for want of completed requests."""
    ratios = [0.0]
    for figures in summary["classes"].values():
        for verdict in figures["slos"]:
            ratio = (verdict["value_ms"] or 0.0) / verdict["limit_ms"]
            missed = 2.0 - (figures["slo_attainment"] or 0.0)
            ratios.append(max(ratio, missed) if verdict["met"] is False else ratio)
    return max(ratios)


# --- series over time, for charts ---------------------------------------------------------------------------------


def queue_depth(requests: pd.DataFrame, model: str, times_s: Floats) -> Floats | None:
    """Requests waiting in the model's queue at each time, from what the server tells; None where it tells nothing."""
    mine = requests[(requests["model"] == model) & requests["arrived_s"].notna()]
    if mine.empty or mine["started_s"].isna().all():
        return None
    left = mine["started_s"].fillna(mine["finished_s"])
    arrived = np.sort(_column(mine, "arrived_s"))
    started = np.sort(left[left.notna()].to_numpy(dtype=np.float64))
    return (np.searchsorted(arrived, times_s, "right") - np.searchsorted(started, times_s, "right")).astype(np.float64)


def in_flight(requests: pd.DataFrame, times_s: Floats) -> Floats:
    """Requests sent and not yet done at each time."""
    sent = np.sort(_column(requests[requests["sent_s"].notna()], "sent_s"))
    done = np.sort(_column(requests[requests["done_s"].notna()], "done_s"))
    return (np.searchsorted(sent, times_s, "right") - np.searchsorted(done, times_s, "right")).astype(np.float64)


def rate_per_s(times_s: Floats, edges_s: Floats) -> Floats:
    """Events per second in each bin between `edges_s`."""
    counts, _ = np.histogram(times_s, edges_s)
    return counts / np.diff(edges_s)


def telemetry_series(run: Run, column: str) -> dict[str, tuple[Floats, Floats]]:
    """Per whole card: the times and the readings of a telemetry column; readings that were not to be had left out."""
    cards = run.telemetry[run.telemetry["slice"].isna()]
    series = {}
    for name, rows in cards.groupby("gpu"):
        present = rows[rows[column].notna()]
        if len(present):
            series[str(name)] = (_column(present, "time_s"), _column(present, column))
    return series


# --- parts of a summary -------------------------------------------------------------------------------------------


def _figures(requests: pd.DataFrame, goods: int, measured_s: float) -> dict[str, Any]:
    completed = requests[requests["status"] == "completed"]
    failed = requests[requests["status"] == "error"]
    by_metric = latencies_ms(requests)
    return {
        "requests": len(requests),
        "completed": len(completed),
        "errors": {str(k): int(n) for k, n in failed["error"].value_counts().items() if n},
        "rejected": int((requests["status"] == "rejected").sum()),
        "request_throughput": len(completed) / measured_s,
        "output_throughput": float(completed["tokens"].sum()) / measured_s,
        "goodput": goods / measured_s,
        "slo_attainment": goods / len(requests) if len(requests) else None,
        **{metric: statistics(values) for metric, values in by_metric.items()},
        "send_lag_ms": statistics(send_lag_ms(requests)),
        "queue_ms": statistics(_waits_ms(completed)),
        "merged_token_share": float(completed["merged_tokens"].sum() / max(completed["tokens"].sum(), 1)),
    }


def _model_figures(run: Run, scenario: Scenario, model: str, first_s: float) -> dict[str, Any]:
    depth = queue_depth(run.requests, model, np.arange(first_s, run.meta.measured_s, 0.05))
    if run.steps is not None:
        counts = run.steps[model]
        sizes = np.repeat(*np.array(sorted(counts.by_size.items()), dtype=np.int64).reshape(-1, 2).T)
        steps_ms, busy_s = np.empty(0), counts.busy_s
    else:
        steps = run.batches[(run.batches["model"] == model) & (run.batches["started_s"] >= first_s)]
        sizes, steps_ms = _column(steps, "batch_size"), (_column(steps, "done_s") - _column(steps, "started_s")) * 1e3
        busy_s = float(steps_ms.sum()) / 1e3
    replicas = sum(r["model"] == model for r in run.meta.deployment["replicas"])
    span_s = max(run.meta.measured_s - first_s, 1e-9)
    return {
        "steps": len(sizes),
        "batch_size": statistics(sizes),
        "step_ms": statistics(steps_ms),
        "queue_depth": statistics(depth) if depth is not None else None,
        "busy": min(busy_s / (span_s * replicas), 1.0) if len(sizes) and replicas else None,
    }


def _telemetry_figures(run: Run, first_s: float) -> dict[str, Any]:
    figures: dict[str, Any] = {"source": run.meta.telemetry_source}
    rows = run.telemetry[run.telemetry["slice"].isna() & (run.telemetry["time_s"] >= first_s)]
    for column in ("gpu_utilization", "memory_utilization", "memory_used_bytes", "power_w", "temperature_c"):
        values = _column(rows[rows[column].notna()], column)
        figures[column] = {"mean": float(values.mean()), "max": float(values.max())} if len(values) else None
    clocks = _column(rows[rows["sm_clock_mhz"].notna()], "sm_clock_mhz")
    figures["sm_clock_mhz"] = (
        {"mean": float(clocks.mean()), "min": float(clocks.min()), "max": float(clocks.max())} if len(clocks) else None
    )
    figures["throttled"] = _throttled(rows)
    spent = [
        float(r["energy_j"].max() - r["energy_j"].min()) for _, r in rows.groupby("gpu") if r["energy_j"].notna().any()
    ]
    figures["energy_j"] = sum(spent) if spent else None
    return figures


def _throttled(rows: pd.DataFrame) -> dict[str, Any] | None:
    """The share of readings in which a card was held back, and by what; None where none could be read."""
    told = rows["throttle_reasons"][rows["throttle_reasons"].notna()]
    if not len(told):
        return None
    held = [set(reasons.split("|")) - {"", *NOT_THROTTLED} for reasons in told]
    counts = Counter(reason for reasons in held for reason in reasons)
    return {
        "share": sum(map(bool, held)) / len(told),
        "reasons": {reason: count / len(told) for reason, count in counts.most_common()},
    }


def _waits_ms(completed: pd.DataFrame) -> Floats:
    waits = (_column(completed, "started_s") - _column(completed, "arrived_s")) * 1e3
    return waits[~np.isnan(waits)]


def _column(table: pd.DataFrame, name: str) -> Floats:
    return table[name].to_numpy(dtype=np.float64, na_value=np.nan)
