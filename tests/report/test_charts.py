"""Drawings: well formed, recolourable, of bounded size, the same from any thread; none where nothing is to draw."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gpuplan.record.run import Run
from gpuplan.record.summary import summarize
from gpuplan.report import charts
from gpuplan.report.charts import Chart


def drawn(run: Run) -> list[Chart]:
    figures = summarize(run)
    return [
        *charts.over_time(run, figures),
        *charts.of_telemetry(run),
        *(c for _, c in charts.of_latency(run, figures)),
    ]


def test_drawings_are_well_formed_and_named(odd_run: Run) -> None:
    ids: list[str] = []
    for chart in drawn(odd_run):
        root = ET.fromstring(chart.svg)
        assert root.get("role") == "img" and root.get("aria-label")
        assert "width" not in root.attrib, "the page scales it"
        mine = {e.get("id") for e in root.iter()} - {None}
        ids += [i for i in mine if i]
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', chart.svg)) <= mine
        assert len(chart.svg) < 40_000
    assert len(ids) == len(set(ids)), "one page holds them all"


@pytest.mark.parametrize(
    ("case", "time", "telemetry", "latency"),
    [
        ("quickstart", 3, 3, 3),
        ("zero requests", 0, 3, 0),  # cards that idle still say so
        ("one request", 3, 3, 1),
        ("all errors", 2, 3, 0),
        ("no telemetry", 3, 0, 3),
        ("no server-side times", 2, 0, 3),
        ("50 classes", 3, 3, charts.CLASSES_DRAWN),
    ],
)
def test_what_has_no_data_is_not_drawn(
    case: str, time: int, telemetry: int, latency: int, make_run: Callable[[str], Run]
) -> None:
    run = make_run(case)
    figures = summarize(run)
    assert len(charts.over_time(run, figures)) == time
    assert len(charts.of_telemetry(run)) == telemetry
    assert len(charts.of_latency(run, figures)) == latency


def test_a_card_s_clock_and_memory_are_drawn_where_they_were_read(quickstart: Run) -> None:
    rows = quickstart.telemetry.assign(sm_clock_mhz=1410.0, memory_utilization=0.25)
    titles = [chart.title for chart in charts.of_telemetry(replace(quickstart, telemetry=rows))]
    assert "SM clock, MHz (emulated)" in titles and "GPU memory utilisation (emulated)" in titles


def test_ink_and_series_follow_the_page(quickstart: Run) -> None:
    for chart in drawn(quickstart):
        tags = " ".join(re.findall(r"<[^>]+>", chart.svg))
        assert "currentColor" in tags and "var(--series-1" in tags
        assert "#010101" not in tags and "#000000" not in tags
        assert "<style" not in chart.svg and "<metadata" not in chart.svg and "font-family" not in tags
        assert "<text" in chart.svg, "text stays text"


def test_any_thread_draws_the_same(quickstart: Run) -> None:
    alone = drawn(quickstart)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(drawn, [quickstart] * 4)) == [alone] * 4


def test_drawing_leaves_matplotlib_as_it_was(quickstart: Run) -> None:
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "mine"
    drawn(quickstart)
    assert matplotlib.rcParams["svg.hashsalt"] == "mine"


def test_text_of_users_is_no_markup_and_no_mathematics(
    hostile_run: tuple[Run, dict[str, Any], dict[str, Any]], hostile_names: dict[str, str]
) -> None:
    run, figures, plan = hostile_run
    model = hostile_names["assistant"]
    scaling = charts.of_scaling(model, plan["autoscale"][model], 0)
    assert scaling is not None
    found = [scaling, *charts.over_time(run, figures), *charts.of_telemetry(run)]
    found += [c for _, c in charts.of_latency(run, figures)]
    for chart in found:
        root = ET.fromstring(chart.svg)
        assert {e.tag.rpartition("}")[2] for e in root.iter()} <= {
            "svg",
            "defs",
            "g",
            "path",
            "text",
            "use",
            "clipPath",
            "rect",
        }
    assert model in (ET.fromstring(scaling.svg).get("aria-label") or "")
    assert {m.label for c in found for m in c.legend} >= {model, hostile_names["gpu0"]}


def test_failed_requests_are_missing_at_the_top(make_run: Callable[[str], Run]) -> None:
    run = make_run("quickstart")
    rows = run.requests.copy()
    failed = rows.index[rows["traffic_class"] == "summary"][5:10]
    rows.loc[failed, "status"] = "error"
    run = replace(run, requests=rows)
    notes = {name: c.note for name, c in charts.of_latency(run, summarize(run))}
    assert "5 requests failed or were rejected" in notes["summary"]
    assert "failed" not in notes["essay"]


@pytest.mark.parametrize("evidence", [None, [], [{"rate_factor": 1.0, "queue_depth_per_replica": None}]])
def test_no_evidence_no_chart(evidence: Any) -> None:
    assert charts.of_scaling("m", {"evidence": evidence, "scale_up_at": 1}, 0) is None


def test_evidence_of_one_load_or_without_attainment_is_drawn() -> None:
    row = {"rate_factor": 1.0, "queue_depth_per_replica": 0.0, "slo_attainment": None, "meets_slos": True}
    chart = charts.of_scaling("m", {"evidence": [row], "scale_up_at": None}, 0)
    assert chart is not None and "nan" not in chart.svg


def test_thinning_keeps_both_ends() -> None:
    values = np.arange(10_001.0)
    thin = charts._thin(values)
    assert (len(thin), thin[0], thin[-1]) == (charts.POINTS, 0.0, 10_000.0)
    assert charts._thin(values[:5]).tolist() == [0, 1, 2, 3, 4]
