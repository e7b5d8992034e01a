"""Figures over several seeds: the mean, and how far off it may be.

Takes each seed's summary, gives `seeds` of `summary.json`. Seeds are independent repetitions, so the mean's confidence
interval is Student's: mean +- t(n - 1) * s / sqrt(n), s being the standard deviation between seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from gpuplan.record.summary import Summary

CONFIDENCE = 0.95
RATES = ("request_throughput", "output_throughput", "goodput", "slo_attainment")
LATENCIES = {"ttft_ms": ("mean", "p95"), "tpot_ms": ("mean", "p95"), "e2el_ms": ("mean", "p50", "p95", "p99")}


class SeedFigures(msgspec.Struct, frozen=True):
    """The main figures of one seed, by dotted path into its summary."""

    seed: int
    meets_slos: bool
    figures: dict[str, float]


def main_figures(seed: int, summary: Summary) -> SeedFigures:
    """What of a summary is compared over seeds."""
    return SeedFigures(seed, bool(summary["meets_slos"]), dict(_figures(summary)))


def over_seeds(seeds: Sequence[SeedFigures]) -> dict[str, Any]:
    """`seeds` of a summary: how many met all SLOs, and of every figure that all seeds have its mean and interval."""
    common = [path for path in seeds[0].figures if all(path in s.figures for s in seeds)] if seeds else []
    return {
        "count": len(seeds),
        "seeds": [s.seed for s in seeds],
        "met_slos": sum(s.meets_slos for s in seeds),
        "confidence": CONFIDENCE,
        "figures": {
            path: interval([s.figures[path] for s in seeds], most=1.0 if path.endswith("slo_attainment") else math.inf)
            for path in common
        },
    }


def interval(values: Sequence[float], *, most: float = math.inf) -> dict[str, float | None]:
    """`{mean, low, high}` of independent values between 0 and `most`: Student's interval for their mean, cut to what
    can be; no bounds for a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    half = student_t(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return {"mean": mean, "low": max(mean - half, 0.0), "high": min(mean + half, most)}


def student_t(freedom: int) -> float:
    """The quantile of Student's distribution that CONFIDENCE lies within, on both sides."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def _figures(summary: Summary) -> Iterator[tuple[str, float]]:
    """By dotted path: rates, latencies, and whatever an SLO is on."""
    for where, part in (("overall", summary["overall"]), *_classes(summary)):
        asked = [(v["metric"], v["statistic"]) for v in part.get("slos", ())]
        latencies = [(metric, statistic) for metric, names in LATENCIES.items() for statistic in names]
        values = {rate: part[rate] for rate in RATES}
        values |= {f"{m}.{s}": part[m][s] for m, s in dict.fromkeys([*latencies, *asked])}
        for name, value in values.items():
            if value is not None:
                yield f"{where}.{name}", float(value)


def _classes(summary: Summary) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, part in summary["classes"].items():
        yield f"classes.{name}", part
