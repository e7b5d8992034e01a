"""`report.html`: one file that opens offline and can be forwarded. A Run, its summary and its plan in, HTML out.

Computes nothing: numbers come from `record.summary` and the plan, drawings from `charts`; here they get their words,
and the template their order. Every text of a user or a server is escaped (Jinja2 with autoescape; charts hold none),
and the page's policy forbids scripts and every request, so nothing in a run can act when its report is opened.
"""

from __future__ import annotations

import base64
import re
import shlex
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from gpuplan.record import store
from gpuplan.record.run import Run
from gpuplan.record.summary import Summary
from gpuplan.report import words

ALTERNATIVES_SHOWN = 12
SLOS_SHOWN = 12
MESSAGES_SHOWN = 8
MESSAGE_CHARS = 300


def write(run: Run, summary: Summary, plan: dict[str, Any] | None, path: Path) -> None:
    """Writes the page, whole or not at all."""
    store.write_text(path, render(run, summary, plan))


def render(run: Run, summary: Summary, plan: dict[str, Any] | None) -> str:
    """The page. `summary` is `summarize(run)`, `plan` the content of `plan.json`, or None where none was asked for."""
    import jinja2

    from gpuplan.report import charts

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gpuplan.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.ChainableUndefined,  # a plan of an older version lacks keys: a dash, not a crash
    )
    environment.filters |= words.FILTERS
    plan = plan or None
    slos = words.slo_rows(summary, plan)
    scaling = [(name, charts.of_scaling(name, row, i)) for i, (name, row) in enumerate(_scaling(plan).items())]
    template = environment.get_template("report.html")
    return template.render(
        meta=run.meta,
        scenario=run.meta.scenario,
        summary=summary,
        plan=plan,
        slos=slos,
        slos_shown=slos if len(slos) <= SLOS_SHOWN else [row for row in slos if row.missed],
        sources=words.sources(run.meta),
        no_gpu=words.no_gpu(run.meta),
        telemetry_words=words.TELEMETRY[run.meta.telemetry_source],
        ran="Simulated" if run.meta.source == "simulate" else "Measured",
        cards=_cards(plan),
        alternatives=_alternatives(plan),
        alternatives_shown=ALTERNATIVES_SHOWN,
        backtest=_backtest(plan),
        seed_rows=words.seed_rows(summary),
        unfinished=summary["unfinished"],
        error_kinds=_error_kinds(summary),
        messages=_messages(run),
        time_charts=charts.over_time(run, summary),
        telemetry_charts=charts.of_telemetry(run),
        latency_charts=charts.of_latency(run, summary),
        classes_drawn=charts.CLASSES_DRAWN,
        scaling_charts=[(name, chart) for name, chart in scaling if chart],
        metric_names=words.METRICS,
        scenario_yaml=(text := _yaml(run.meta.scenario)),
        scenario_link="data:application/yaml;base64," + base64.b64encode(text.encode()).decode(),
        file_name=(file_name := re.sub(r"[^A-Za-z0-9._-]+", "-", run.meta.name) + ".yaml"),
        command=_command(run, file_name),
    ).lstrip()


def _scaling(plan: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return (plan or {}).get("autoscale") or {}


def _cards(plan: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The plan's cards by what is on them: cards that are alike stand once, with their number."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for layout in ((plan or {}).get("mig") or {}).get("layouts") or []:
        places = sorted(layout.get("placements") or [], key=lambda p: (p.get("card", 0), p["start"]))
        for _, group in groupby(places, key=lambda p: p.get("card", 0)):
            parts = list(group)
            alike = (layout["gpu"], *((p["profile"], p["start"], p.get("model")) for p in parts))
            card = found.setdefault(alike, {"gpu": layout["gpu"], "count": 0, "parts": _with_gaps(parts)})
            # Placements without a card number describe one card, and `count` says how many there are.
            card["count"] += 1 if "card" in parts[0] else layout.get("count", 1)
    return list(found.values())


def _with_gaps(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The slices by start cell, and the cells that no slice covers as parts without a profile."""
    filled: list[dict[str, Any]] = []
    at = 0
    for part in parts:
        if part["start"] > at:
            filled.append({"start": at, "width": part["start"] - at, "cells": part["cells"]})
        filled.append(part)
        at = part["start"] + part["width"]
    if at < parts[-1]["cells"]:
        filled.append({"start": at, "width": parts[-1]["cells"] - at, "cells": parts[-1]["cells"]})
    return filled


def _alternatives(plan: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Nearest to winning first: those that meet the SLOs, then by room at the tightest one, unsimulated ones last."""

    def rank(row: Mapping[str, Any]) -> tuple[bool, float, float]:
        margin = row.get("worst_margin")
        return (not row.get("meets_slos"), row.get("cost_per_hour") or 0.0, float("inf") if margin is None else margin)

    return sorted((plan or {}).get("alternatives") or [], key=rank)


def _backtest(plan: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """A row for each figure compared, the worst first."""
    tested = (plan or {}).get("backtest") or {}
    rows = [
        {
            "figure": words.figure_name(path),
            "unit": "ms" if "_ms." in path else "/s",
            "measured": (tested.get("measured") or {}).get(path),
            "predicted": (tested.get("predicted") or {}).get(path),
            "error": error,
        }
        for path, error in (tested.get("error_percent") or {}).items()
    ]
    return sorted(rows, key=lambda row: -abs(row["error"] or 0.0))


def _error_kinds(summary: Summary) -> list[str]:
    return sorted({kind for figures in summary["classes"].values() for kind in figures["errors"]})


def _messages(run: Run) -> list[dict[str, Any]]:
    """What servers said, the most frequent first; a simulation without rows has no column for it."""
    if "message" not in run.requests:
        return []
    rows = run.requests[run.requests["message"].notna() & (run.requests["message"] != "")]
    counts = rows.groupby(["status", "error", "message"], dropna=False).size().sort_values(ascending=False)
    return [
        {"kind": words.text(kind) or str(status), "message": str(message)[:MESSAGE_CHARS], "count": int(count)}
        for (status, kind, message), count in _pairs(counts.head(MESSAGES_SHOWN).items())
    ]


def _pairs(items: Iterable[Any]) -> Iterable[tuple[tuple[Any, Any, Any], int]]:
    return items


def _yaml(data: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, width=100)


def _command(run: Run, file_name: str) -> str:
    """What repeats the run, but for `--rate`: the page says by what the rates were multiplied."""
    meta = run.meta
    words_ = ["gpuplan", meta.source, file_name]
    if meta.source == "bench":
        words_ += ["--target", meta.target]
    if meta.speed != 1.0:
        words_ += ["--speed", f"{meta.speed:g}"]
    return shlex.join(words_)
