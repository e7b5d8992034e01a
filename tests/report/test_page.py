"""The page as text: every odd run gives a whole page, nothing of a user becomes markup, same input gives same bytes."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from gpuplan.record.intervals import main_figures, over_seeds
from gpuplan.record.run import Run
from gpuplan.record.summary import summarize
from gpuplan.report import page
from gpuplan.scenario import deployment, files
from gpuplan.scenario.schedule import build_schedule
from gpuplan.sim.service_times import ServiceTimes
from gpuplan.sim.simulator import simulate

from .conftest import QUICKSTART

PlanFor = Callable[..., dict[str, Any]]
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Outline(HTMLParser):
    """Tags in order, checked for balance; ids, headings and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.levels: list[int] = []
        self.words: list[str] = []
        self.urls: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"a handler on {tag}"
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href"):
                self.urls.append(value or "")
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.levels.append(int(tag[1]))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.mark.parametrize("planned", [False, True])
def test_every_run_gives_a_whole_page(odd_run: Run, planned: bool, make_plan: PlanFor) -> None:
    plan = make_plan(odd_run) if planned else None
    text = page.render(odd_run, summarize(odd_run), plan)
    outline = Outline(text)

    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"\bnan\b|\binf\b|Undefined|None(?!:)", outline.text, re.IGNORECASE if "NaN" in text else 0)
    assert not re.search(r'[ "]nan|nan[ "]', text), "a drawing with a hole in it"
    assert len(outline.ids) == len(set(outline.ids))
    assert {u[1:] for u in outline.urls if u.startswith("#")} <= set(outline.ids)
    assert outline.levels[0] == 1
    assert all(b - a <= 1 for a, b in zip(outline.levels, outline.levels[1:], strict=False)), (
        "a heading level is skipped"
    )
    assert "script" not in outline.tags
    assert all(u.startswith(("#", "data:")) for u in outline.urls)
    assert len(text) < 1_500_000


def test_a_page_says_what_held_the_cards_back(quickstart: Run) -> None:
    meta = msgspec.structs.replace(quickstart.meta, telemetry_source="prometheus")
    rows = quickstart.telemetry.assign(throttle_reasons="sw_power_cap", temperature_c=81.0, sm_clock_mhz=1100.0)
    run = replace(quickstart, meta=meta, telemetry=rows)
    text = Outline(page.render(run, summarize(run), None)).text
    assert "Throttled in 100 % of the readings : sw power cap 100 %." in text
    assert "Temperature up to 81.0 °C. SM clock 1,100 MHz on average, 1,100 at least." in " ".join(text.split())
    assert "read from an exporter" in text
    assert "No figure on this page was measured on a GPU" not in text, "these figures were"
    idle = replace(run, telemetry=rows.assign(throttle_reasons="gpu_idle"))
    assert "Never throttled." in Outline(page.render(idle, summarize(idle), None)).text


def test_a_page_says_where_its_numbers_come_from(quickstart: Run, make_run: Callable[[str], Run]) -> None:
    simulated = Outline(page.render(quickstart, summarize(quickstart), None)).text
    assert "No figure on this page was measured on a GPU" in simulated
    assert "GPU telemetry is emulated" in simulated
    foreign = make_run("no server-side times")
    text = Outline(page.render(foreign, summarize(foreign), None)).text
    assert "the server does not say what it runs on" in text
    assert "There is no GPU telemetry" in text
    assert "No figure on this page" not in text


def test_interruption_and_failure_are_said_at_the_top(make_run: Callable[[str], Run]) -> None:
    run = make_run("interrupted")
    text = Outline(page.render(run, summarize(run), None)).text
    assert text.index("The run was interrupted") < text.index("The answer")
    assert text.index("the server died") < text.index("The answer")


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("zero requests", "No request was counted."),
        ("all errors", "No request was completed."),
        ("no slos", "No class asks for any."),
        ("no server-side times", "The server says nothing of its queues"),
        ("50 classes", "The 12 classes with most requests"),
    ],
)
def test_odd_runs_are_explained(case: str, said: str, make_run: Callable[[str], Run]) -> None:
    run = make_run(case)
    assert said in Outline(page.render(run, summarize(run), None)).text


def test_the_plan_is_told(quickstart: Run, make_plan: PlanFor) -> None:
    text = Outline(page.render(quickstart, summarize(quickstart), make_plan(quickstart))).text
    for said in (
        "1 x a100-80gb meets every SLO",
        "$3.67",
        "at least $1.84",
        "gap 50 %",
        "7.40 %",
        "cells 4–7",
        "20.0 of 42.0 GiB",
        "4 more layouts",
        "the emulated GPU alone",
    ):
        assert said in text, said
    cpu = Outline(page.render(quickstart, summarize(quickstart), make_plan(quickstart, gpu="cpu"))).text
    assert "there is no card to cut" in cpu
    assert "no price is set" in cpu
    assert "No plan was made" in Outline(page.render(quickstart, summarize(quickstart), None)).text


def test_a_missed_slo_is_told_with_its_margin(quickstart: Run) -> None:
    figures = summarize(quickstart)
    figures["classes"]["summary"]["slos"][0] |= {"met": False, "value_ms": 1800.0}
    text = Outline(page.render(quickstart, figures, None)).text
    assert "missed, 50% over" in text
    assert "4 of 5 SLOs were met" in text


def test_names_and_messages_stay_text(
    hostile_run: tuple[Run, dict[str, Any], dict[str, Any]], hostile_names: dict[str, str]
) -> None:
    run, figures, plan = hostile_run
    text = page.render(run, figures, plan)
    outline = Outline(text)
    assert not {"script", "img", "iframe", "b"} & outline.tags
    assert all(u.startswith(("#", "data:")) for u in outline.urls)
    words = outline.text
    for name in hostile_names.values():
        assert re.sub(r"\s+", " ", name) in words, name
    assert "{{ 7 * 7 }}" in words
    assert "&lt;svg onload" in text


def test_same_input_same_bytes(quickstart: Run, make_plan: PlanFor) -> None:
    figures, plan = summarize(quickstart), make_plan(quickstart)
    assert page.render(quickstart, figures, plan) == page.render(quickstart, figures, plan)


def test_the_embedded_scenario_is_the_runs_own(quickstart: Run, tmp_path: Path) -> None:
    text = page.render(quickstart, summarize(quickstart), None)
    link = html.unescape(re.search(r'href="data:application/yaml;base64,([^"]+)"', text)[1])  # type: ignore[index]
    (tmp_path / "again.yaml").write_bytes(base64.b64decode(link))
    assert files.to_builtins(files.load(tmp_path / "again.yaml")) == quickstart.meta.scenario
    assert yaml.safe_load(base64.b64decode(link)) == quickstart.meta.scenario


def test_the_command_repeats_the_run_and_is_quoted(quickstart: Run) -> None:
    meta = msgspec.structs.replace(quickstart.meta, source="bench", target="http://a b/;rm", speed=2.0)
    run = Run(meta, quickstart.requests, quickstart.batches, quickstart.telemetry)
    words = Outline(page.render(run, summarize(run), None)).text
    assert "gpuplan bench quickstart.yaml --target 'http://a b/;rm' --speed 2" in words


def test_writing_replaces_the_page_at_once(quickstart: Run, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    page.write(quickstart, summarize(quickstart), None, path)
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_seeds_get_a_table_and_what_it_means(quickstart: Run) -> None:
    figures = summarize(quickstart)
    seeds = [main_figures(seed, figures) for seed in (3, 4)]
    text = Outline(page.render(quickstart, {**figures, "seeds": over_seeds(seeds)}, None)).text
    assert "Over 2 seeds" in text and "95 % confidence" in text and "All else on this page is of seed 0" in text
    assert "summary: TTFT p95" in text and "say nothing of how far the simulation itself is off" in text
    assert "confidence" not in Outline(page.render(quickstart, figures, None)).text


def test_a_simulation_without_rows_has_a_page_all_the_same() -> None:
    asked = files.load(QUICKSTART)
    run = simulate(asked, deployment.resolve(asked), build_schedule(asked), ServiceTimes({}), keep_rows=False)
    text = Outline(page.render(run, summarize(run), None)).text
    assert "nothing was served, every figure is a prediction" in text
