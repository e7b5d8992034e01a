"""`sentiment`: the mean of word embeddings, then a two-layer perceptron.

The embedding's first column is a word's polarity from a small lexicon, and the perceptron carries it through to the
logits; the other columns hold seeded random values that only make the multiplications real.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from functools import cache

LABELS = ("negative", "positive")
ROWS, WIDTH, HIDDEN = 4096, 64, 1024

# The most common English words of liking and disliking; 2 and -2 for strong ones.
_LEXICON = {
    2: "amazing awesome beautiful brilliant delighted excellent fantastic great happy incredible love loved "
    "loves outstanding perfect superb terrific thrilled wonderful best joy masterpiece",
    1: "agree better bright calm clean clear comfortable cool easy enjoy enjoyed fair fast fine free fresh friendly "
    "fun funny gentle glad good grateful helpful hope impressive interesting kind like liked lovely nice pleasant "
    "pleased polite positive pretty proud reliable safe satisfied smart smile smooth solid strong success thank "
    "thanks useful warm welcome well win won works",
    -1: "annoyed annoying bad bland bored boring broken cold complain confusing crash cry damaged dark difficult dirty "
    "disappointed dull error expensive fail failed failure fault fear hard hurt ill lack late lost mean mess "
    "negative noisy pain poor problem rude sad sick slow sorry stupid tired trouble ugly unhappy upset useless "
    "weak worried wrong",
    -2: "angry awful despise disaster disgusting dreadful hate hated hates horrible miserable nightmare pathetic "
    "terrible tragic worst worthless",
}
_IDS = {word: i for i, word in enumerate((w for words in _LEXICON.values() for w in words.split()), start=1)}
_POLARITY = {_IDS[word]: float(weight) for weight, words in _LEXICON.items() for word in words.split()}


def token_ids(text: str) -> Sequence[int]:
    """One id for a word: the lexicon's words have their own, all others share hashed rows without polarity."""
    words = re.findall(r"[^\W_]+", text.lower())
    first = len(_IDS) + 1
    return [_IDS.get(word) or first + zlib.crc32(word.encode()) % (ROWS - first) for word in words]


@cache
def model() -> bytes:
    """The ONNX graph, serialised: `input_ids` and `attention_mask` [batch, tokens] in, `logits` [batch, 2] out."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(20260101)
    embedding = rng.normal(0.0, 0.02, (ROWS, WIDTH)).astype(np.float32)
    embedding[:, 0] = [_POLARITY.get(i, 0.0) for i in range(ROWS)]
    into = rng.normal(0.0, 0.02, (WIDTH, HIDDEN)).astype(np.float32)
    into[0] = np.where(np.arange(HIDDEN) % 2, 1.0, -1.0)  # every other unit feels the polarity with the other sign
    across = (rng.normal(0.0, 0.2, (HIDDEN, HIDDEN)) / HIDDEN + 4.0 * np.eye(HIDDEN)).astype(np.float32)
    out = np.where(np.arange(HIDDEN)[:, None] % 2 == np.arange(2), 1.0, -1.0).astype(np.float32) * (2.0 / HIDDEN)
    weights = {"embedding": embedding, "into": into, "across": across, "out": out}
    nodes = [
        helper.make_node("Gather", ["embedding", "input_ids"], ["words"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last_axis"], ["mask_wide"]),
        helper.make_node("Mul", ["words", "mask_wide"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "token_axis"], ["summed"], keepdims=0),
        helper.make_node("ReduceSum", ["mask_wide", "token_axis"], ["counted"], keepdims=0),
        helper.make_node("Max", ["counted", "one"], ["counted_safe"]),
        # Divided by the root of the length: a few strong words still count in a long text.
        helper.make_node("Sqrt", ["counted_safe"], ["length"]),
        helper.make_node("Div", ["summed", "length"], ["pooled"]),
        helper.make_node("MatMul", ["pooled", "into"], ["hidden_1"]),
        helper.make_node("Tanh", ["hidden_1"], ["active_1"]),
        helper.make_node("MatMul", ["active_1", "across"], ["hidden_2"]),
        helper.make_node("Tanh", ["hidden_2"], ["active_2"]),
        helper.make_node("MatMul", ["active_2", "out"], ["logits"]),
    ]
    axes = {"last_axis": np.array([-1]), "token_axis": np.array([1]), "one": np.array([1.0], dtype=np.float32)}
    graph = helper.make_graph(
        nodes,
        "sentiment",
        [
            helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "tokens"])
            for n in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(array, name) for name, array in {**weights, **axes}.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    serialised: bytes = made.SerializeToString()
    return serialised
