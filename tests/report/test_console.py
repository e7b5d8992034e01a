"""The terminal's answer: short, for every odd run, and deaf to markup and control characters."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from gpuplan.record.run import Run
from gpuplan.record.summary import summarize
from gpuplan.report.console import print_summary

PlanFor = Callable[..., dict[str, Any]]


def printed(run: Run, figures: dict[str, Any], plan: dict[str, Any] | None, width: int = 100) -> str:
    out = io.StringIO()
    print_summary(run, figures, plan, Console(file=out, width=width, force_terminal=True, color_system=None))
    return out.getvalue()


@pytest.mark.parametrize("planned", [False, True])
def test_every_run_is_told_in_few_lines(odd_run: Run, planned: bool, make_plan: PlanFor) -> None:
    plan = make_plan(odd_run) if planned else None
    text = printed(odd_run, summarize(odd_run), plan)
    assert "nan" not in text and "None" not in text
    assert len(text.splitlines()) <= 45
    assert ("no plan was made" in text) == (plan is None)


def test_the_answer_fits_80_columns(quickstart: Run, make_plan: PlanFor) -> None:
    text = printed(quickstart, summarize(quickstart), make_plan(quickstart), width=80)
    lines = text.splitlines()
    assert len(lines) <= 30
    assert any(line.startswith("moderation") and line.rstrip().endswith("met") for line in lines)
    for said in ("$3.67/h", "3g.40gb + 2g.20gb", "up at 2", "7.40 %", "No figure here was measured on a GPU"):
        assert said in " ".join(text.split()), said


def test_a_missed_slo_is_named(quickstart: Run) -> None:
    figures = summarize(quickstart)
    figures["classes"]["summary"]["slos"][0] |= {"met": False, "value_ms": 1800.0}
    assert "missed: TTFT p95 > 1,200" in printed(quickstart, figures, None, width=140)


def test_texts_are_neither_markup_nor_commands(
    hostile_run: tuple[Run, dict[str, Any], dict[str, Any]], hostile_names: dict[str, str]
) -> None:
    run, figures, plan = hostile_run
    plan["verdict"] = "\x1b]0;title\x07[bold]v[/bold]"
    text = printed(run, figures, plan, width=400)
    assert "\x1b" not in text and "\x07" not in text
    assert "[bold]v[/bold]" in text
    assert hostile_names["moderation"] in text
    assert hostile_names["moderator"] in text
