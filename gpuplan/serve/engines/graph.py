"""What a single-step graph takes and gives, read off its inputs and outputs before anything runs.

Inputs: `input_ids` and, where the graph has them, `attention_mask` and `token_type_ids`, [batch, tokens], int64 or
int32. Output of a classifier: logits [batch, labels], the first output. Output of an embedder: `sentence_embedding`
[batch, width] as it is, or the last hidden state [batch, tokens, width], which is pooled here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from msgspec import Struct

from gpuplan.errors import RunError
from gpuplan.scenario.deployment import Role

Dtype = Literal["int64", "int32"]

IDS, MASK, TYPES = "input_ids", "attention_mask", "token_type_ids"
_DTYPES: dict[str, Dtype] = {"tensor(int64)": "int64", "tensor(int32)": "int32"}
_FLOATS = ("tensor(float)", "tensor(float16)", "tensor(double)")
_EMBEDDINGS = ("sentence_embedding", "last_hidden_state", "token_embeddings")
"""Outputs by the names that exporters give them, the first one there is taken."""


class Argument(Protocol):
    """An input or output, as ONNX Runtime tells of it: a dimension that is no number varies."""

    @property
    def name(self) -> str: ...
    @property
    def type(self) -> str: ...
    @property
    def shape(self) -> Sequence[int | str | None]: ...


class Graph(Struct, frozen=True):
    """`batch` and `tokens` are fixed dimensions of the inputs, None where they vary; `output` is the one that is read;
    `width` its last dimension (labels, or elements of a vector) where the graph tells it."""

    inputs: dict[str, Dtype]
    output: str
    pooled: bool
    batch: int | None = None
    tokens: int | None = None
    width: int | None = None


def read(inputs: Sequence[Argument], outputs: Sequence[Argument], role: Role) -> Graph:
    """The graph's contract for a classifier or an embedder. Raises RunError in one line for one that has another."""
    if unknown := [given.name for given in inputs if given.name not in (IDS, MASK, TYPES)]:
        raise RunError(f"the model wants inputs that gpuplan does not feed: {', '.join(unknown)}")
    if all(given.name != IDS for given in inputs):
        raise RunError(f"the model has no input {IDS}")
    for given in inputs:
        if given.type not in _DTYPES:
            raise RunError(f"the model's {given.name} is {given.type}, not int64 or int32")
        if len(given.shape) != 2:
            raise RunError(f"the model's {given.name} is {_shape(given)}, not [batch, tokens]")
    output = _chosen(outputs, role)
    if output.type not in _FLOATS:
        raise RunError(f"the model's {output.name} is {output.type}, not floating point")
    wanted = (2,) if role == "classifier" else (2, 3)
    if len(output.shape) not in wanted:
        hint = "; set task: embed" if role == "classifier" and len(output.shape) == 3 else ""
        raise RunError(f"the model's {output.name} is {_shape(output)}, not {_WANTED[role]}{hint}")
    return Graph(
        inputs={given.name: _DTYPES[given.type] for given in inputs},
        output=output.name,
        pooled=len(output.shape) == 3,
        batch=_fixed(inputs, 0, "batch"),
        tokens=_fixed(inputs, 1, "tokens"),
        width=_number(output.shape[-1]),
    )


_WANTED = {"classifier": "[batch, labels]", "embedder": "[batch, width] or [batch, tokens, width]"}


def _chosen(outputs: Sequence[Argument], role: Role) -> Argument:
    if not outputs:
        raise RunError("the model has no output")
    names = {output.name: output for output in outputs}
    known = (names[name] for name in _EMBEDDINGS if name in names)
    return next(known, outputs[0]) if role == "embedder" else outputs[0]


def _fixed(inputs: Sequence[Argument], axis: int, what: str) -> int | None:
    """The number that an axis is fixed to in any input; two different ones cannot be fed."""
    numbers = {number for given in inputs if (number := _number(given.shape[axis])) is not None}
    if len(numbers) > 1:
        raise RunError(f"the model's inputs differ in {what}: {', '.join(map(str, sorted(numbers)))}")
    return numbers.pop() if numbers else None


def _number(dimension: int | str | None) -> int | None:
    return dimension if isinstance(dimension, int) and dimension > 0 else None


def _shape(argument: Argument) -> str:
    return f"[{', '.join('?' if d is None else str(d) for d in argument.shape)}]"
