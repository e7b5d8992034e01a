"""The KV cache of several sequences, and moving their rows between such blocks on the session's own device.

A `Block` is what a decoder gives back after a run: for each layer keys and values, [rows, heads, columns, head size].
Row i holds its tokens in columns `starts[i]` to `starts[i] + lengths[i]`; the rest of its columns is padding. Blocks do
not change: a step makes new ones, and what they replace goes when nobody holds it.

`Surgeon` makes a block of some rows of others, with as few columns as they need. It is an ONNX graph of the package's
own (a Gather for each layer and source, a Concat for each layer), run on the model's provider, so the cache stays where
it is and CPU and CUDA take the same way. Padding is filled with the row's own tokens, which are finite numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gpuplan.serve.engines.session import CUDA_PROVIDER, EngineSpec, open_session

Layout = Literal["append", "prefix", "equal"]
"""Where a model puts the next token's key. `append`: behind the last column, so rows end there, and what is before a
row's first token is masked. `prefix`: behind the row's own last token, which the mask's sum tells (ONNX Runtime's
GroupQueryAttention), so rows begin at column 0. `equal`: behind the last column, and a token's position is its column
(models without `position_ids`), so only rows of one length run together."""

SLOTS = (1, 2, 8)
"""Sources that one run of the graph takes; there is a session for each, opened when first needed."""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Rows of cache. `tensors` are OrtValues in the order of the model's `past_key_values` inputs."""

    request_ids: tuple[int, ...]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    columns: int
    tensors: tuple[Any, ...]

    def row(self, request_id: int) -> int:
        """The row of a request that is in the block."""
        return self.request_ids.index(request_id)

    def in_place(self, layout: Layout) -> bool:
        """Whether every row is where the model expects it."""
        if layout == "prefix":
            return not any(self.starts)
        return all(start + length == self.columns for start, length in zip(self.starts, self.lengths, strict=True))


@dataclass(frozen=True, slots=True)
class PastTensor:
    """One `past_key_values` input: its name, ONNX element type, heads and head size."""

    name: str
    element_type: int
    heads: int
    head: int


def device_of(spec: EngineSpec) -> tuple[str, int]:
    """Where the provider keeps its tensors, as IO binding names it."""
    return ("cuda", 0) if spec.provider == CUDA_PROVIDER else ("cpu", 0)


class Surgeon:
    """Makes blocks of other blocks' rows. `operations` counts the runs of its graph."""

    def __init__(self, spec: EngineSpec, past: Sequence[PastTensor], layout: Layout) -> None:
        self._spec, self._past, self._layout = spec, past, layout
        self._heads = sorted({tensor.heads for tensor in past})
        self._sessions: dict[int, Any] = {}
        self.operations = 0

    def arranged(self, rows: Sequence[tuple[int, Block]]) -> Block:
        """A block of these requests, each with the block that holds it. Without copying where one block holds exactly
        these; the order of rows is the surgeon's."""
        wanted: dict[int, tuple[Block, list[int]]] = {}
        for request_id, block in rows:
            wanted.setdefault(id(block), (block, []))[1].append(request_id)
        sources = list(wanted.values())
        if len(sources) == 1:
            block, request_ids = sources[0]
            if len(request_ids) == len(block.request_ids) and block.in_place(self._layout):
                return block
        while len(sources) > SLOTS[-1]:
            joined = self._joined(sources[-SLOTS[-1] :])
            sources = [*sources[: -SLOTS[-1]], (joined, list(joined.request_ids))]
        return self._joined(sources)

    def warm_up(self, block: Block) -> None:
        """Opens the sessions and runs each once."""
        for slots in SLOTS:
            self._joined([(block, [block.request_ids[0]])] * slots)
        self.operations = 0

    def _joined(self, sources: list[tuple[Block, list[int]]]) -> Block:
        picked = [(block, [block.row(request_id) for request_id in ids]) for block, ids in sources]
        lengths = [block.lengths[row] for block, rows in picked for row in rows]
        columns = max(lengths)
        starts = [0 if self._layout == "prefix" else columns - length for length in lengths]
        slots = next(slots for slots in SLOTS if slots >= len(sources))
        session = self._session(slots)
        binding = session.io_binding()
        first = 0
        for slot in range(slots):
            # Slots that are not needed give no rows of the first block.
            block, rows = picked[slot] if slot < len(picked) else (picked[0][0], [])
            for heads in self._heads:
                index = _index(block, rows, starts[first : first + len(rows)], columns, heads)
                binding.bind_cpu_input(f"index.{slot}.{heads}", index)
            for tensor, value in zip(self._past, block.tensors, strict=True):
                binding.bind_ortvalue_input(f"{slot}.{tensor.name}", value)
            first += len(rows)
        device, number = device_of(self._spec)
        for tensor in self._past:
            binding.bind_output(tensor.name, device, number)
        session.run_with_iobinding(binding)
        self.operations += 1
        request_ids = tuple(request_id for _, ids in sources for request_id in ids)
        return Block(request_ids, tuple(starts), tuple(lengths), columns, tuple(binding.get_outputs()))

    def _session(self, slots: int) -> Any:
        if slots not in self._sessions:
            self._sessions[slots] = open_session(_graph(self._past, self._heads, slots), self._spec)
        return self._sessions[slots]


def _index(block: Block, rows: list[int], starts: list[int], columns: int, heads: int) -> Any:
    """Where in a tensor of `block`, seen as a list of vectors of the head size, each vector of the new rows stands;
    [rows, heads, columns]."""
    held = np.array(rows, dtype=np.int64).reshape(-1, 1, 1)
    shift = np.array([block.starts[row] - start for row, start in zip(rows, starts, strict=True)], dtype=np.int64)
    low = np.array([block.starts[row] for row in rows], dtype=np.int64)
    high = low + np.array([block.lengths[row] - 1 for row in rows], dtype=np.int64)
    column = np.arange(columns) + shift.reshape(-1, 1)
    column = np.clip(column, low.reshape(-1, 1), high.reshape(-1, 1))
    return (held * heads + np.arange(heads).reshape(1, -1, 1)) * block.columns + column[:, None, :]


def _graph(past: Sequence[PastTensor], heads: Sequence[int], slots: int) -> bytes:
    """For each past tensor: Gather(slot's tensor as vectors, slot's index) for every slot, then Concat over rows."""
    from onnx import TensorProto, helper

    indices = [f"index.{slot}.{count}" for slot in range(slots) for count in heads]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, [None, None, None]) for name in indices]
    outputs, nodes, weights = [], [], []
    for size in sorted({tensor.head for tensor in past}):
        weights.append(helper.make_tensor(f"vectors.{size}", TensorProto.INT64, [2], [-1, size]))
    for tensor in past:
        shape = [None, tensor.heads, None, tensor.head]
        parts = []
        for slot in range(slots):
            name = f"{slot}.{tensor.name}"
            inputs.append(helper.make_tensor_value_info(name, tensor.element_type, shape))
            parts.append(f"rows.{name}" if slots > 1 else tensor.name)
            nodes.append(helper.make_node("Reshape", [name, f"vectors.{tensor.head}"], [f"vectors.{name}"]))
            index = f"index.{slot}.{tensor.heads}"
            nodes.append(helper.make_node("Gather", [f"vectors.{name}", index], [parts[-1]], axis=0))
        if slots > 1:
            nodes.append(helper.make_node("Concat", parts, [tensor.name], axis=0))
        outputs.append(helper.make_tensor_value_info(tensor.name, tensor.element_type, shape))
    graph = helper.make_graph(nodes, "kv_cache_rows", inputs, outputs, weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    serialised: bytes = made.SerializeToString()
    return serialised
