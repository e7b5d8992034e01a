"""Numbers, names and origins in a reader's words, the same on the page and in the terminal. Pure; computes nothing.

A number that is not there is a dash: None, not-a-number and infinity alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gpuplan.record.run import RunMeta
from gpuplan.record.summary import Summary

DASH = "–"

METRICS = {
    "ttft_ms": "TTFT",
    "tpot_ms": "TPOT",
    "itl_ms": "ITL",
    "e2el_ms": "E2E",
    "queue_ms": "queue wait",
    "send_lag_ms": "send lag",
}

RATES = {
    "goodput": "goodput",
    "slo_attainment": "within SLOs",
    "request_throughput": "request throughput",
    "output_throughput": "output throughput",
}

PROVENANCE = {
    "hardware": ("measured on a GPU", "a real model ran on a real GPU"),
    "cpu": ("measured on the CPU", "a real model ran on this host's CPU, not on a GPU"),
    "emulated": (
        "emulated GPU",
        "a real server answered over real sockets, but step times were computed from the card's data sheet: "
        "no GPU was used",
    ),
    "simulated": ("simulated", "virtual time: nothing was served, every figure is a prediction"),
    "remote": ("remote server", "measured from outside; the server does not say what it runs on"),
}
TELEMETRY = {
    "nvml": "GPU telemetry was read from the card (NVML).",
    "emulated": "GPU telemetry is emulated: computed from the steps that ran, not read from a card; power rises in a "
    "straight line from an assumed idle power to the card's limit.",
    "prometheus": "GPU telemetry was read from an exporter's metrics, as old as the exporter's own readings are.",
    "none": "There is no GPU telemetry.",
}


@dataclass(frozen=True, slots=True)
class SloRow:
    """One SLO of a class: what was asked, what the run gave, what the plan predicts (None without a plan)."""

    traffic_class: str
    metric: str
    statistic: str
    limit_ms: float
    run: Mapping[str, Any]
    plan: Mapping[str, Any] | None

    @property
    def asked(self) -> str:
        return f"{METRICS.get(self.metric, self.metric)} {self.statistic} ≤ {general(self.limit_ms)} ms"

    @property
    def missed(self) -> bool:
        return self.run["met"] is False or (self.plan is not None and self.plan.get("met") is False)


def slo_rows(summary: Summary, plan: Mapping[str, Any] | None) -> list[SloRow]:
    """Every SLO of the run beside the plan's verdict on the same one."""
    predicted: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    summary_predicted = (plan or {}).get("predicted")
    if isinstance(summary_predicted, dict):
        for name, figures in summary_predicted["classes"].items():
            predicted |= {(name, v["metric"], v["statistic"]): v for v in figures["slos"]}
    return [
        SloRow(name, v["metric"], v["statistic"], v["limit_ms"], v, predicted.get((name, v["metric"], v["statistic"])))
        for name, figures in summary["classes"].items()
        for v in figures["slos"]
    ]


def verdict(slo: Mapping[str, Any] | None) -> str:
    """Whether an SLO is met and by what margin, in a few words."""
    if slo is None:
        return DASH
    value, limit = slo["value_ms"], slo["limit_ms"]
    if slo["met"] is None:
        return "not judged"
    if value is None:
        return "met" if slo["met"] else "missed: none completed"
    if slo["met"]:
        return f"met, {(limit - value) / limit:.0%} to spare"
    if value <= limit:
        return "missed: failed requests count"
    return f"missed, {(value - limit) / limit:.0%} over"


def sources(meta: RunMeta) -> list[dict[str, Any]]:
    """Where the models' times come from, and whose: a row for each origin."""
    models: dict[str, list[str]] = {}
    for model, kind in meta.provenance.items():
        models.setdefault(kind, []).append(model)
    return [
        {"kind": kind, "badge": PROVENANCE[kind][0], "words": PROVENANCE[kind][1], "models": names}
        for kind, names in models.items()
    ]


def no_gpu(meta: RunMeta) -> bool:
    """Whether it is certain that no figure of the run comes from a GPU."""
    read_from_cards = meta.telemetry_source in ("nvml", "prometheus")
    computed = set(meta.provenance.values()) <= {"cpu", "emulated", "simulated"}
    return bool(meta.provenance) and computed and not read_from_cards


def figure_name(path: str) -> str:
    """`classes.chat.v2.ttft_ms.p95` as `chat.v2: TTFT p95` (a class's name may hold dots)."""
    whole = path.startswith("overall.")
    rest = path.removeprefix("overall." if whole else "classes.")
    *name, metric, statistic = ["", "", *rest.rsplit(".", 2)][-3:]
    if metric in METRICS:
        figure = f"{METRICS[metric]} {statistic}"
    else:
        name, figure = [rest.rpartition(".")[0]], RATES.get(statistic, statistic.replace("_", " "))
    return f"{'.'.join(name)}: {figure}" if not whole and any(name) else figure


@dataclass(frozen=True, slots=True)
class SeedRow:
    """One figure over several seeds, in words. `interval` is a dash where there is none."""

    figure: str
    mean: str
    interval: str


def seed_rows(summary: Mapping[str, Any]) -> list[SeedRow]:
    """The figures over seeds that a reader asks for: the whole's rates, each class's attainment and what its SLOs are
    on; all of them are in summary.json."""
    figures = (summary.get("seeds") or {}).get("figures") or {}
    wanted = [f"overall.{rate}" for rate in RATES]
    for name, part in summary["classes"].items():
        wanted.append(f"classes.{name}.slo_attainment")
        wanted += [f"classes.{name}.{v['metric']}.{v['statistic']}" for v in part["slos"]]
    return [_seed_row(path, figures[path]) for path in wanted if path in figures]


def _seed_row(path: str, told: Mapping[str, Any]) -> SeedRow:
    worded, unit = (share, "") if path.endswith("slo_attainment") else (number, " ms" if "_ms." in path else " /s")
    low, high = told["low"], told["high"]
    bounds = DASH if low is None or high is None else f"{worded(low)} to {worded(high)}{unit}"
    return SeedRow(figure_name(path), f"{worded(told['mean'])}{unit}", bounds)


# --- numbers ------------------------------------------------------------------------------------------------------


def _number(form: Callable[[float], str]) -> Callable[[Any], str]:
    """`form` for finite numbers, a dash for anything else."""

    def worded(value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return DASH
        return form(float(value))

    return worded


def _three_digits(value: float) -> str:
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"


ms = _number(_three_digits)
number = _number(_three_digits)
count = _number(lambda v: f"{v:,.0f}")
general = _number(lambda v: f"{v:,.10g}")
share = _number(lambda v: f"{math.floor(v * 1000 + 1e-9) / 10:g} %")  # rounded down: 99.96 % is not 100 %
percent = _number(lambda v: f"{v:+.1f} %")
gib = _number(lambda v: f"{v / 2**30:.1f}")
money = _number(lambda v: f"${v:,.2f}")


def text(value: Any) -> str:
    """A table's text, or nothing where it holds a null."""
    return value if isinstance(value, str) else ""


def plain(value: Any) -> str:
    """Part of a scenario (arrivals, lengths, a model's source) in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{str(k).replace('_', ' ')} {plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(v) for v in value)
    return general(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


FILTERS: dict[str, Callable[..., str]] = {
    "ms": ms,
    "number": number,
    "count": count,
    "general": general,
    "share": share,
    "percent": percent,
    "gib": gib,
    "money": money,
    "plain": plain,
    "verdict": verdict,
    "figure_name": figure_name,
}
