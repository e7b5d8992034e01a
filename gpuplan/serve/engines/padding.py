"""Sequences of token ids laid into rectangles: the shapes a session is run with, and the memory it reads them from.

Every input has one buffer, as large as the largest batch; a smaller one is its beginning, reshaped, so that each id is
written once and no array is made or copied for it. Shapes come in buckets, since a session keeps a memory plan for
every shape it has seen, and CUDA chooses its kernels by shape:

- Tokens: on CUDA powers of two; on the CPU, where padding is computed like any other token, four steps to an octave.
- Rows: on CUDA powers of two; on the CPU as many as there are, for the same reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from gpuplan.serve.engines.graph import IDS, MASK, Dtype

TOKENS_MIN = 16
"""The smallest bucket: below it a step costs what it costs."""


def token_buckets(tokens_max: int, *, fine: bool) -> list[int]:
    """Rising lengths up to and with `tokens_max`."""
    steps = (1.0, 1.25, 1.5, 1.75) if fine else (1.0,)
    octaves = itertools.takewhile(lambda size: size < tokens_max, (TOKENS_MIN << i for i in itertools.count()))
    sizes = (int(octave * step) for octave in octaves for step in steps)
    return [*itertools.takewhile(lambda size: size < tokens_max, sizes), tokens_max]


def row_buckets(rows_max: int) -> list[int]:
    """Powers of two up to and with `rows_max`."""
    return [*itertools.takewhile(lambda size: size < rows_max, (1 << i for i in itertools.count())), rows_max]


class Inputs:
    """The inputs of a session, written in place."""

    def __init__(self, dtypes: Mapping[str, Dtype], *, rows_max: int, tokens_max: int, pad_id: int) -> None:
        import numpy as np

        self._pad_id = pad_id
        self._positions = np.arange(tokens_max, dtype=np.int64)
        # What is neither ids nor mask (the segments of BERT's sentence pairs) stays zero.
        self._buffers = {name: np.zeros(rows_max * tokens_max, dtype=dtype) for name, dtype in dtypes.items()}

    def write(self, sequences: Sequence[Sequence[int]], *, rows: int, tokens: int) -> tuple[dict[str, Any], Any]:
        """The inputs as [rows, tokens] arrays, valid until the next call, and a mask of the same shape (bool). Rows
        past the sequences hold a single padding token, so that no row attends to nothing."""
        import numpy as np

        lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
        ids = np.fromiter(itertools.chain.from_iterable(sequences), np.int64, int(lengths.sum()))
        if rows > len(sequences):
            lengths = np.concatenate((lengths, np.ones(rows - len(sequences), dtype=np.int64)))
            ids = np.concatenate((ids, np.full(rows - len(sequences), self._pad_id, dtype=np.int64)))
        views = {name: buffer[: rows * tokens].reshape(rows, tokens) for name, buffer in self._buffers.items()}
        real = self._positions[:tokens] < lengths[:, None]
        views[IDS].fill(self._pad_id)
        views[IDS][real] = ids  # row by row, as they were chained
        if MASK in views:
            views[MASK][:] = real
        return views, real
