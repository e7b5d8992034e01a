"""`tiny-chat`: a small Llama-style decoder with random layers, in the layout that Optimum exports.

The graph takes `input_ids`, `attention_mask`, `position_ids` and `past_key_values.N.key/value`, and gives `logits` and
`present.N.key/value`. Its layers are seeded noise, big enough that one sequence waits for the weights to be read and
sixteen together cost little more. What it says is babble, but can be read: the output head knows which letter follows
which in a few sentences, and the layers' noise makes of that a different text for every prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from gpuplan.hardware.shapes import ModelShape, shape

NAME = "tiny-chat"
BYTES = 256
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
"""Tokens after the 256 bytes, in this order."""
END_ID = BYTES
VOCABULARY = BYTES + len(SPECIAL)

_SENTENCES = (
    "the answer is here and it is short. there is a way to do this with care, and then there is the other one. "
    "you can ask for more and wait a little while the cards are busy. what would help is to write it down, read it "
    "again and see where the time has gone. some of them are small and some are large, but all of them want to run. "
    "a queue that grows is a sign that something is slower than it should be; look at that first. "
)
_UNSEEN = -6.0
"""The head's word on a letter that never follows in the sentences; for all that cannot be printed it is twice that."""
_CERTAINTY = 2.0
"""How much louder the head speaks of letters seen: at temperature 1 most of what is drawn can be read."""
_LAYERS_SHARE = 0.35
"""How much each layer adds to what the last letter alone would say."""


def token_ids(text: str) -> Sequence[int]:
    """One id for a byte of the text's UTF-8."""
    ids: Sequence[int] = vocabulary().encode(text).ids
    return ids


def end_ids() -> frozenset[int]:
    """The tokens that end a text."""
    return frozenset({END_ID})


@cache
def vocabulary() -> Any:
    """A byte-level `tokenizers.Tokenizer`: the id of a byte is the byte, special tokens come after them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from gpuplan.serve.engines.detokenize import BYTE_CHARACTERS

    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(BYTE_CHARACTERS)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return made


@cache
def model() -> bytes:
    """The ONNX graph of the built-in, serialised."""
    return graph(shape(NAME))


def graph(sizes: ModelShape, seed: int = 20260102) -> bytes:
    """A decoder of these sizes (gated FFN, fp32, `sizes.vocabulary` at least VOCABULARY), serialised."""
    from onnx import TensorProto, helper

    nodes = _Nodes(sizes, seed)
    nodes.decoder()
    past: list[str | int | None] = ["batch", sizes.kv_heads, "past", sizes.head]
    present: list[str | int | None] = ["batch", sizes.kv_heads, "past + tokens", sizes.head]
    names = [f"{i}.{kind}" for i in range(sizes.layers) for kind in ("key", "value")]
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "past + tokens"]),
        helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch", "tokens"]),
        *(helper.make_tensor_value_info(f"past_key_values.{n}", TensorProto.FLOAT, past) for n in names),
    ]
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "tokens", sizes.vocabulary]),
        *(helper.make_tensor_value_info(f"present.{n}", TensorProto.FLOAT, present) for n in names),
    ]
    made = helper.make_graph(nodes.made, sizes.name, inputs, outputs, nodes.weights)
    whole = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    serialised: bytes = whole.SerializeToString()
    return serialised


class _Nodes:
    """The graph's nodes and weights, collected layer by layer."""

    def __init__(self, sizes: ModelShape, seed: int) -> None:
        import numpy as np

        self._sizes = sizes
        self._rng = np.random.default_rng(seed)
        self.made: list[Any] = []
        self.weights: list[Any] = []
        self._constants: dict[tuple[Any, ...], str] = {}

    def decoder(self) -> None:
        """Everything from `input_ids` to `logits`."""
        import numpy as np

        sizes = self._sizes
        table = self._rng.standard_normal((sizes.vocabulary, sizes.hidden), dtype=np.float32)
        x = self._node("Gather", [self._weight("embedding", table), "input_ids"])
        rotation, allowed = self._rotation(), self._allowed()
        for i in range(sizes.layers):
            x = self._node("Add", [x, self._attention(i, self._normed(x, f"norm_attention.{i}"), rotation, allowed)])
            x = self._node("Add", [x, self._feed_forward(i, self._normed(x, f"norm_ffn.{i}"))])
        head, bias = self._head(table)
        product = self._node("MatMul", [self._normed(x, "norm"), self._weight("head", head)])
        self._node("Add", [product, self._weight("head_bias", bias)], "logits")

    def _attention(self, i: int, x: str, rotation: tuple[str, str], allowed: str) -> str:
        sizes = self._sizes
        heads, kv, head = sizes.heads, sizes.kv_heads, sizes.head
        qkv = self._linear(f"qkv.{i}", x, sizes.hidden, (heads + 2 * kv) * head)
        qkv = self._node("Reshape", [qkv, self._ints(0, 0, heads + 2 * kv, head)])
        q, k, v = self._split(self._node("Transpose", [qkv], perm=[0, 2, 1, 3]), 1, heads, kv, kv)
        k = self._node("Concat", [f"past_key_values.{i}.key", self._rotated(k, rotation)], f"present.{i}.key", axis=2)
        v = self._node("Concat", [f"past_key_values.{i}.value", v], f"present.{i}.value", axis=2)
        # The query heads of one key head stand side by side, so that keys and values need not be repeated.
        q = self._node("Reshape", [self._rotated(q, rotation), self._ints(0, kv, -1, head)])
        scores = self._node("MatMul", [q, self._node("Transpose", [k], perm=[0, 1, 3, 2])])
        scores = self._node("Mul", [scores, self._float(head**-0.5)])
        scores = self._node("Add", [self._node("Reshape", [scores, self._ints(0, heads, -1, 0)]), allowed])
        shares = self._node("Softmax", [scores], axis=-1)
        mixed = self._node("MatMul", [self._node("Reshape", [shares, self._ints(0, kv, -1, 0)]), v])
        mixed = self._node("Reshape", [mixed, self._ints(0, heads, -1, head)])
        mixed = self._node("Transpose", [mixed], perm=[0, 2, 1, 3])
        mixed = self._node("Reshape", [mixed, self._ints(0, 0, heads * head)])
        return self._linear(f"attention_out.{i}", mixed, heads * head, sizes.hidden, gain=4.0 * _LAYERS_SHARE)

    def _feed_forward(self, i: int, x: str) -> str:
        sizes = self._sizes
        both = self._linear(f"gate_up.{i}", x, sizes.hidden, 2 * sizes.ffn)
        gate, up = self._split(both, -1, sizes.ffn, sizes.ffn)
        active = self._node("Mul", [self._node("Mul", [gate, self._node("Sigmoid", [gate])]), up])
        return self._linear(f"down.{i}", active, sizes.ffn, sizes.hidden, gain=_LAYERS_SHARE)

    def _normed(self, x: str, name: str) -> str:
        import numpy as np

        square = self._node("Pow", [x, self._float(2.0)])
        mean = self._node("ReduceMean", [square], axes=[-1], keepdims=1)
        root = self._node("Sqrt", [self._node("Add", [mean, self._float(1e-6)])])
        scale = self._weight(name, np.ones(self._sizes.hidden, dtype=np.float32))
        return self._node("Mul", [self._node("Div", [x, root]), scale])

    def _rotation(self) -> tuple[str, str]:
        """Cosine and sine of every position, [batch, 1, tokens, head] (Su et al., RoFormer, 2021)."""
        import numpy as np

        sizes = self._sizes
        turns = 10000.0 ** (-np.arange(0, sizes.head, 2) / sizes.head)
        angles = np.tile(np.arange(sizes.context_tokens_max)[:, None] * turns, 2)
        tables = [self._weight(f.__name__, f(angles).astype(np.float32)) for f in (np.cos, np.sin)]
        cosine, sine = (
            self._node("Unsqueeze", [self._node("Gather", [table, "position_ids"]), self._ints(1)]) for table in tables
        )
        return cosine, sine

    def _rotated(self, x: str, rotation: tuple[str, str]) -> str:
        cosine, sine = rotation
        half = self._sizes.head // 2
        first, second = self._split(x, -1, half, half)
        turned = self._node("Concat", [self._node("Neg", [second]), first], axis=-1)
        return self._node("Add", [self._node("Mul", [x, cosine]), self._node("Mul", [turned, sine])])

    def _allowed(self) -> str:
        """What is added to scores [batch, heads, tokens, columns]: 0 where a query may look, else as good as minus
        infinity."""
        import numpy as np
        from onnx import TensorProto

        columns = self._node("Shape", ["attention_mask"], start=1, end=2)
        tokens = self._node("Shape", ["input_ids"], start=1, end=2)
        one, axis = self._scalar(1), self._ints(0)
        all_columns = self._node("Squeeze", [columns, axis])
        first = self._node("Squeeze", [self._node("Sub", [columns, tokens]), axis])
        keys = self._node("Range", [self._scalar(0), all_columns, one])
        queries = self._node("Unsqueeze", [self._node("Range", [first, all_columns, one]), self._ints(1)])
        causal = self._node("GreaterOrEqual", [queries, keys])
        present = self._node("Cast", ["attention_mask"], to=TensorProto.BOOL)
        both = self._node("And", [causal, self._node("Unsqueeze", [present, self._ints(1, 2)])])
        never = self._float(float(np.finfo(np.float32).min))
        return self._node("Where", [both, self._float(0.0), never])

    def _head(self, table: Any) -> tuple[Any, Any]:
        """Weights and bias that say which letter follows which; the embedding's rows are nearly orthogonal."""
        import numpy as np

        follows = np.full((self._sizes.vocabulary, self._sizes.vocabulary), _UNSEEN, dtype=np.float32)
        said = _SENTENCES.encode()
        counts = np.zeros_like(follows)
        np.add.at(counts, (list(said[:-1]), list(said[1:])), 1.0)
        seen = counts > 0
        follows[seen] = np.log(counts[seen])
        bias = follows.mean(axis=0)
        head = table.T @ (follows - bias) * (_CERTAINTY / self._sizes.hidden)
        bias[[i for i in range(len(bias)) if not 32 <= i < 127]] = 2 * _UNSEEN
        return head, bias

    # --- one node or constant ---------------------------------------------------------------------------------------

    def _linear(self, name: str, x: str, rows: int, columns: int, *, gain: float = 1.0) -> str:
        import numpy as np

        weight = self._rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(gain * rows**-0.5)
        return self._node("MatMul", [x, self._weight(name, weight)])

    def _split(self, x: str, axis: int, *sizes: int) -> list[str]:
        names = [f"t{len(self.made)}_{i}" for i in range(len(sizes))]
        self._append("Split", [x, self._ints(*sizes)], names, axis=axis)
        return names

    def _node(self, operator: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        name = output or f"t{len(self.made)}"
        self._append(operator, inputs, [name], **attributes)
        return name

    def _append(self, operator: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        from onnx import helper

        self.made.append(helper.make_node(operator, inputs, outputs, **attributes))

    def _weight(self, name: str, array: Any) -> str:
        from onnx import numpy_helper

        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def _ints(self, *values: int) -> str:
        import numpy as np

        return self._constant(("ints", *values), np.array(values, dtype=np.int64))

    def _scalar(self, value: int) -> str:
        import numpy as np

        return self._constant(("scalar", value), np.array(value, dtype=np.int64))

    def _float(self, value: float) -> str:
        import numpy as np

        return self._constant(("float", value), np.array(value, dtype=np.float32))

    def _constant(self, key: tuple[Any, ...], array: Any) -> str:
        if key not in self._constants:
            self._constants[key] = self._weight(f"constant_{len(self._constants)}", array)
        return self._constants[key]
