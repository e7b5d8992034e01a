"""From logits to tokens: greedy, or drawn by temperature and top-p. Pure numpy, no state.

The n-th token of a sequence is drawn with a number that follows from its seed and n alone, so the same seed gives the
same tokens whatever ran beside it, and a step that is run again draws again what it drew. Log-probabilities are the
model's own, before temperature and top-p, as in vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec import Struct

from gpuplan.serve.engines import Sampling


class Draw(Struct, frozen=True):
    """What one row of logits is drawn for: the sequence's rule, its seed, and how many tokens it has."""

    sampling: Sampling
    seed: int
    count: int


class Chosen(Struct, frozen=True):
    """A token with, where asked for, its natural-log probability and the likeliest tokens as (id, log-probability)."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def choose(logits: Any, draws: Sequence[Draw]) -> list[Chosen | None]:
    """A token for each row of `logits` [rows, vocabulary]; None for a row that is no distribution (a NaN, plus
    infinity, or minus infinity throughout; single tokens at minus infinity are merely impossible)."""
    rows = np.asarray(logits, dtype=np.float32)
    # argmax answers the first NaN if there is one, so the highest value tells of every kind of bad row.
    best = rows.argmax(axis=1)
    sound = np.isfinite(rows[np.arange(len(rows)), best]).tolist()
    return [
        _chosen(rows[i], token_id, draw) if sound[i] else None
        for i, (token_id, draw) in enumerate(zip(best.tolist(), draws, strict=True))
    ]


def _chosen(row: Any, best: int, draw: Draw) -> Chosen:
    sampling = draw.sampling
    token_id = best if sampling.temperature <= 0 else _drawn(row, draw)
    if sampling.logprobs is None:
        return Chosen(token_id)
    high = row.astype(np.float64) - float(row[best])
    logprobs = high - np.log(np.exp(high).sum())
    return Chosen(token_id, float(logprobs[token_id]), _likeliest(logprobs, sampling.logprobs))


def _drawn(row: Any, draw: Draw) -> int:
    sampling = draw.sampling
    high = (row.astype(np.float64) - float(row.max())) / sampling.temperature
    shares = np.exp(high)
    shares /= shares.sum()
    number = np.random.default_rng((draw.seed & (2**64 - 1), draw.count)).random()
    if sampling.top_p >= 1.0:
        return _at(np.cumsum(shares), number)
    # What is below this cannot be in the nucleus: all such tokens together are less than what top_p leaves out.
    (candidates,) = np.nonzero(shares >= (1.0 - sampling.top_p) / len(shares))
    order = candidates[np.argsort(-shares[candidates], kind="stable")]
    sums = np.cumsum(shares[order])
    # The smallest set that reaches top_p (Holtzman et al., 2020); the likeliest token is always in it.
    nucleus = min(int(np.searchsorted(sums, sampling.top_p)) + 1, len(sums))
    return int(order[_at(sums[:nucleus], number)])


def _at(sums: Any, number: float) -> int:
    """Where `number` of [0, 1) falls among running sums."""
    return min(int(np.searchsorted(sums, number * sums[-1], side="right")), len(sums) - 1)


def _likeliest(logprobs: Any, count: int) -> tuple[tuple[int, float], ...]:
    count = min(count, len(logprobs))
    if count <= 0:
        return ()
    some = np.sort(np.argpartition(-logprobs, count - 1)[:count])
    order = some[np.argsort(-logprobs[some], kind="stable")]
    return tuple((int(i), float(logprobs[i])) for i in order)
