"""Tokens from logits: greedy, drawn, and what their probabilities are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuplan.serve.engines import GREEDY, Sampling
from gpuplan.serve.engines.sampling import Draw, choose

ROW = np.log([[0.5, 0.25, 0.15, 0.1]]).astype(np.float32)


def drawn(sampling: Sampling, count: int, row: object = ROW) -> list[int]:
    chosen = [choose(row, [Draw(sampling, 5, n)])[0] for n in range(count)]
    return [c.token_id for c in chosen if c is not None]


def test_greedy_takes_the_first_of_the_highest() -> None:
    rows = np.array([[0, 2, 2], [3, 1, 0], [-np.inf, 0, -np.inf]], dtype=np.float16)
    assert [c and c.token_id for c in choose(rows, [Draw(GREEDY, 0, 0)] * 3)] == [1, 0, 1]


@pytest.mark.parametrize("bad", [[0, np.nan, 9], [0, np.inf, 9], [-np.inf] * 3, [np.nan, np.inf, 0]])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, top_p=0.5, logprobs=2)])
def test_a_row_that_is_no_distribution_gives_no_token(bad: list[float], sampling: Sampling) -> None:
    rows = np.array([[1, 2, 3], bad, [3, 2, 1]], dtype=np.float32)
    chosen = choose(rows, [Draw(sampling, 0, 0)] * 3)
    assert chosen[1] is None
    assert chosen[0] is not None and chosen[2] is not None


def test_what_is_drawn_follows_the_probabilities() -> None:
    counts = np.bincount(drawn(Sampling(temperature=1.0), 4000), minlength=4) / 4000
    assert counts == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=0.03)


def test_temperature_sharpens() -> None:
    counts = np.bincount(drawn(Sampling(temperature=0.5), 4000), minlength=4) / 4000
    squares = np.array([0.25, 0.0625, 0.0225, 0.01])
    assert counts == pytest.approx(squares / squares.sum(), abs=0.03)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.0, {0}), (0.4, {0}), (0.6, {0, 1}), (0.8, {0, 1, 2}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_is_the_smallest_set_that_reaches_it(top_p: float, kept: set[int]) -> None:
    assert set(drawn(Sampling(temperature=1.0, top_p=top_p), 400)) == kept


@given(seed=st.integers(-(2**63), 2**63), rows=st.integers(1, 5), at=st.integers(0, 4))
def test_a_draw_does_not_depend_on_the_batch(seed: int, rows: int, at: int) -> None:
    logits = np.random.default_rng(1).normal(size=(rows, 50)).astype(np.float32)
    rule = Sampling(temperature=1.0, top_p=0.9, seed=seed)
    together = choose(logits, [Draw(rule, seed, 3)] * rows)[at % rows]
    assert together == choose(logits[at % rows : at % rows + 1], [Draw(rule, seed, 3)])[0]


def test_log_probabilities_are_those_of_the_model() -> None:
    chosen = choose(ROW + 7, [Draw(Sampling(temperature=0.2, logprobs=3), 0, 0)])[0]
    assert chosen is not None
    assert [i for i, _ in chosen.top] == [0, 1, 2]
    assert np.exp([logprob for _, logprob in chosen.top]) == pytest.approx([0.5, 0.25, 0.15], rel=1e-4)
    assert chosen.logprob == chosen.top[chosen.token_id][1]


def test_more_alternatives_than_words_are_all_words() -> None:
    chosen = choose(ROW, [Draw(Sampling(logprobs=20), 0, 0)])[0]
    assert chosen is not None and sum(np.exp(logprob) for _, logprob in chosen.top) == pytest.approx(1.0)
    assert choose(ROW, [Draw(Sampling(logprobs=0), 0, 0)])[0] is not None
