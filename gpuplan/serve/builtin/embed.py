"""`embed`: a small transformer encoder whose vectors are near each other for texts that share words.

A word is the row that its stem hashes to, so `server`, `servers` and `serving` are one word; function words have short
rows and count little. The layers are real ones (layer norm, masked attention of four heads, a GELU feed-forward) with
seeded weights, whose share in the residual stream is kept small: they cost what such layers cost and blur the words'
directions only a little. Output: `last_hidden_state`, to be pooled over the mask.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

ROWS, WIDTH, HEADS, LAYERS, HIDDEN, TOKENS_MAX = 8192, 256, 4, 3, 1024, 512

_FUNCTION_WORDS = (
    "a about after all also an and any are as at be been before but by can could did do does for from had has have he "
    "her here his how i if in into is it its just like me more most my no not of on one or our out over she should so "
    "some than that the their them then there they this to too under up very was we were what when where which who "
    "will with would you your"
).split()
_SHORT = {word: i for i, word in enumerate(_FUNCTION_WORDS, start=1)}
_ENDINGS = ("ations", "ation", "ingly", "ings", "ing", "edly", "ers", "ies", "er", "ed", "es", "ly", "y", "e", "s")
_STEM_MIN = 3

_WORD_SCALE, _FUNCTION_SCALE, _POSITION_SCALE, _LAYER_SCALE = 1.0, 0.15, 0.1, 0.12
"""Lengths of a word's row, a function word's and a position's, and what a layer adds against a word's."""


def token_ids(text: str) -> Sequence[int]:
    """One id for a word: function words have their own, all others the row of their stem's hash."""
    first = len(_SHORT) + 1
    words = re.findall(r"[^\W_]+", text.lower())
    return [_SHORT.get(word) or first + zlib.crc32(_stem(word).encode()) % (ROWS - first) for word in words]


def _stem(word: str) -> str:
    """A word without its longest ending, unless too little is left."""
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= _STEM_MIN:
            return word[: -len(ending)]
    return word


@cache
def model() -> bytes:
    """The ONNX graph, serialised: `input_ids` and `attention_mask` [batch, tokens] in, `last_hidden_state` [batch,
    tokens, 256] out; at most 512 tokens."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(20260102)
    graph = _Nodes()
    graph.weights["embedding"] = _word_rows(rng)
    graph.weights["positions"] = _position_rows()
    words = graph.add("Gather", "embedding", "input_ids")
    length = graph.add("Shape", "input_ids", start=1, end=2)
    places = graph.add("Slice", "positions", graph.constant([0]), length, graph.constant([0]))
    stream = graph.add("Add", words, places)
    seen = graph.add("Cast", "attention_mask", to=TensorProto.FLOAT)
    wide = graph.add("Unsqueeze", seen, graph.constant([1, 2]))  # [batch, 1, 1, tokens]: over heads and queries
    hidden = graph.add("Sub", wide, graph.constant(1.0))
    bias = graph.add("Mul", hidden, graph.constant(1e4))
    for i in range(LAYERS):
        stream = graph.add("Add", stream, _attention(graph, rng, f"layer{i}", stream, bias))
        stream = graph.add("Add", stream, _feed_forward(graph, rng, f"layer{i}", stream))
    graph.add("Identity", stream, out="last_hidden_state")

    made = helper.make_graph(
        [helper.make_node(op, ins, [out], **options) for op, ins, out, options in graph.nodes],
        "embed",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "tokens"])
            for name in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", "tokens", WIDTH])],
        [numpy_helper.from_array(array, name) for name, array in graph.weights.items()],
    )
    whole = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    serialised: bytes = whole.SerializeToString()
    return serialised


class _Nodes:
    """A graph being written: nodes as (operator, inputs, output, attributes), and weights by name."""

    def __init__(self) -> None:
        self.nodes: list[tuple[str, list[str], str, dict[str, Any]]] = []
        self.weights: dict[str, np.ndarray[Any, Any]] = {}

    def add(self, op: str, *inputs: str, out: str | None = None, **options: Any) -> str:
        name = out or f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append((op, list(inputs), name, options))
        return name

    def constant(self, value: float | list[int]) -> str:
        import numpy as np

        name = f"constant_{value}"
        self.weights[name] = np.array(value, dtype=np.int64 if isinstance(value, list) else np.float32)
        return name

    def linear(self, x: str, name: str, rng: Any, shape: tuple[int, int], scale: float) -> str:
        """`x` times seeded weights that make a vector of unit elements one of elements about `scale`."""
        import numpy as np

        weights = rng.standard_normal(shape, dtype=np.float32) * np.float32(scale / shape[0] ** 0.5)
        self.weights[name] = weights
        return self.add("MatMul", x, name)

    def normed(self, x: str) -> str:
        import numpy as np

        self.weights["ones"] = np.ones(WIDTH, dtype=np.float32)
        return self.add("LayerNormalization", x, "ones", axis=-1)


def _attention(graph: _Nodes, rng: Any, name: str, stream: str, bias: str) -> str:
    head = WIDTH // HEADS
    x = graph.normed(stream)
    split = graph.constant([0, 0, HEADS, head])

    def heads(part: str, order: list[int]) -> str:
        projected = graph.linear(x, f"{name}_{part}", rng, (WIDTH, WIDTH), 1.0)
        return graph.add("Transpose", graph.add("Reshape", projected, split), perm=order)

    scores = graph.add("MatMul", heads("query", [0, 2, 1, 3]), heads("key", [0, 2, 3, 1]))
    scaled = graph.add("Mul", scores, graph.constant(head**-0.5))
    shares = graph.add("Softmax", graph.add("Add", scaled, bias), axis=-1)
    mixed = graph.add("MatMul", shares, heads("value", [0, 2, 1, 3]))
    joined = graph.add("Reshape", graph.add("Transpose", mixed, perm=[0, 2, 1, 3]), graph.constant([0, 0, WIDTH]))
    return graph.linear(joined, f"{name}_out", rng, (WIDTH, WIDTH), _LAYER_SCALE / WIDTH**0.5)


def _feed_forward(graph: _Nodes, rng: Any, name: str, stream: str) -> str:
    up = graph.linear(graph.normed(stream), f"{name}_up", rng, (WIDTH, HIDDEN), 1.0)
    bent = graph.add("Erf", graph.add("Mul", up, graph.constant(0.5**0.5)))
    share = graph.add("Mul", graph.add("Add", bent, graph.constant(1.0)), graph.constant(0.5))
    active = graph.add("Mul", up, share)
    return graph.linear(active, f"{name}_down", rng, (HIDDEN, WIDTH), _LAYER_SCALE / WIDTH**0.5)


def _word_rows(rng: Any) -> Any:
    """Seeded directions, almost at right angles to each other; the first row pads."""
    import numpy as np

    rows = rng.standard_normal((ROWS, WIDTH), dtype=np.float32)
    rows *= _WORD_SCALE / np.linalg.norm(rows, axis=1, keepdims=True)
    rows[1 : len(_SHORT) + 1] *= _FUNCTION_SCALE / _WORD_SCALE
    rows[0] = 0.0
    return rows


def _position_rows() -> Any:
    """Sines and cosines of falling frequency (Vaswani et al. 2017), short beside a word."""
    import numpy as np

    angles = np.arange(TOKENS_MAX)[:, None] / 10_000.0 ** (np.arange(WIDTH // 2) * 2 / WIDTH)
    rows = np.concatenate((np.sin(angles), np.cos(angles)), axis=1)
    return (rows * (_POSITION_SCALE / (WIDTH / 2) ** 0.5)).astype(np.float32)
