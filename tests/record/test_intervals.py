"""Figures over seeds: Student's interval, by the table and by repetition."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gpuplan.record import intervals
from gpuplan.record.intervals import SeedFigures, interval, main_figures, over_seeds
from gpuplan.record.summary import summarize

from .test_summary import LENIENT, answer, run_of, scenario


@pytest.mark.parametrize(("freedom", "t"), [(1, 12.706), (4, 2.776), (9, 2.262), (29, 2.045), (1000, 1.962)])
def test_student_s_quantiles_are_those_of_the_tables(freedom: int, t: float) -> None:
    assert intervals.student_t(freedom) == pytest.approx(t, abs=5e-4)


def test_an_interval_worked_out_by_hand() -> None:
    """1, 2, 3: s = 1, t(2) = 4.3027, so 2 +- 4.3027 / sqrt 3, which is 2.484; below zero there is nothing."""
    half = 4.302653 / math.sqrt(3)
    assert interval([11.0, 12.0, 13.0]) == pytest.approx({"mean": 12.0, "low": 12 - half, "high": 12 + half})
    assert interval([1.0, 2.0, 3.0])["low"] == 0.0
    assert interval([0.9, 1.0, 1.0], most=1.0)["high"] == 1.0
    assert interval([5.0]) == {"mean": 5.0, "low": None, "high": None}
    assert interval([5.0, 5.0]) == {"mean": 5.0, "low": 5.0, "high": 5.0}


def test_it_holds_the_mean_as_often_as_it_says() -> None:
    """Of 2000 intervals of five normal values each, 95 % hold the true mean; the standard error of that is 0.5 %."""
    draws = np.random.default_rng(1).normal(100.0, 10.0, (2000, 5))
    found = [interval(row.tolist()) for row in draws]
    held = sum(i["low"] <= 100.0 <= i["high"] for i in found if i["low"] is not None and i["high"] is not None)
    assert held / 2000 == pytest.approx(0.95, abs=0.015)


def test_figures_over_seeds_are_those_that_every_seed_has() -> None:
    seeds = [
        SeedFigures(7, True, {"overall.goodput": 10.0, "overall.slo_attainment": 1.0, "classes.a.ttft_ms.p95": 100.0}),
        SeedFigures(8, False, {"overall.goodput": 20.0, "overall.slo_attainment": 0.98}),  # nothing was completed of a
    ]
    told = over_seeds(seeds)
    assert (told["count"], told["seeds"], told["met_slos"], told["confidence"]) == (2, [7, 8], 1, 0.95)
    assert list(told["figures"]) == ["overall.goodput", "overall.slo_attainment"]
    assert told["figures"]["overall.goodput"]["mean"] == 15.0
    assert told["figures"]["overall.slo_attainment"]["high"] == 1.0


def test_main_figures_hold_what_the_slos_are_on() -> None:
    asked = scenario({"ttft_ms": {"p999": 1e6}})
    figures = main_figures(3, summarize(run_of([answer(1, 2.0, first=0.5, last=1.5, tokens=5)], asked)))
    assert figures.meets_slos and figures.seed == 3
    assert figures.figures["classes.talk.ttft_ms.p999"] == pytest.approx(500)
    assert figures.figures["overall.e2el_ms.p95"] == pytest.approx(1500)
    empty = main_figures(3, summarize(run_of([], scenario(LENIENT))))
    assert not any("_ms" in path for path in empty.figures), "what is not there is left out"
