"""Words for percentiles, and means of distributions."""

from __future__ import annotations

import random
from statistics import fmean
from typing import Any

import pytest

from gpuplan.scenario import files
from gpuplan.scenario.demand import Lengths, mean_tokens, quantile_of, quantile_points
from gpuplan.scenario.schedule import draw


@pytest.mark.parametrize(
    ("word", "probability"),
    [
        ("min", 0.0),
        ("max", 1.0),
        ("p50", 0.5),
        ("p5", 0.05),  # up to two digits are percent
        ("p95", 0.95),
        ("p99", 0.99),
        ("p999", 0.999),  # three digits and more: what users write for 99.9
        ("p9999", 0.9999),
        ("p99.9", 0.999),  # the same with a point
        ("p2.5", 0.025),
    ],
)
def test_quantile_of(word: str, probability: float) -> None:
    assert quantile_of(word) == pytest.approx(probability)


@pytest.mark.parametrize("word", ["", "p", "q50", "median", "p5x", "p-5", "p1.2.3", "mean"])
def test_other_words_are_no_quantiles(word: str) -> None:
    with pytest.raises(ValueError, match="is not min, max or pNN"):
        quantile_of(word)


@pytest.mark.parametrize("quantiles", [{"min": 1.0}, {"p50": 3.0}, {"min": 2.0, "max": 1.0}])
def test_quantiles_need_both_ends_and_rise(quantiles: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"needs min and max|must not fall"):
        quantile_points(quantiles)


@pytest.mark.parametrize(
    "lengths",
    [
        7,
        {"uniform": {"min": 3, "max": 9}},
        {"lognormal": {"p50": 100, "p95": 400}},
        {"quantiles": {"min": 10, "p50": 50, "p90": 200, "max": 1000}},
    ],
)
def test_the_mean_is_that_of_the_draws(lengths: Any) -> None:
    built = lengths if isinstance(lengths, int) else files.build(lengths, Lengths)
    rng = random.Random(5)
    assert mean_tokens(built) == pytest.approx(fmean(draw(built, rng) for _ in range(20_000)), rel=0.03)


def test_nothing_streamed_means_no_tokens() -> None:
    assert mean_tokens(None) == 0.0
    assert draw(None, random.Random(0)) == 0
