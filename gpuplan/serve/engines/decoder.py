"""One decoder in the layout that Optimum and onnx-community publish, seen as a function: cache and tokens in, logits
and cache out.

Inputs: `input_ids` [rows, tokens], `attention_mask` [rows, past + tokens], `position_ids` [rows, tokens] where the
graph has it, `past_key_values.N.key/value` [rows, heads, past, head size]. Outputs: `logits` [rows, tokens, vocabulary]
and `present.N.key/value`. The cache is bound to the session's device and never visits the host; only the logits of
each row's last token do. Whatever has other shapes than these is a RunError, at load where the graph says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpuplan.errors import RunError
from gpuplan.serve.engines.kv_cache import Block, Layout, PastTensor, device_of
from gpuplan.serve.engines.session import EngineSpec, first_line, open_session

_PAST = re.compile(r"past_key_values\.(\d+\.(?:key|value))")
_INTEGERS = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
_LOGITS_BYTES_MAX = 256 << 20
"""Of one run. The graphs give logits for every token of a prompt: 8,192 tokens of 128,000 words would be 4 GB."""


class Decoder:
    """A loaded decoder. `layout` says how rows must lie in its blocks."""

    def __init__(self, model: Path | bytes, spec: EngineSpec) -> None:
        self._spec = spec
        self.session = open_session(model, spec)
        given = {value.name: value for value in self.session.get_inputs()}
        answers = {value.name: value for value in self.session.get_outputs()}
        for name in ("input_ids", "attention_mask"):
            if name not in given:
                raise RunError(f"the model has no input {name}: not a decoder that Optimum would export")
        if "logits" not in answers:
            raise RunError("the model has no output logits: not a decoder that Optimum would export")
        self.past = tuple(_past_tensor(value) for name, value in given.items() if _PAST.fullmatch(name))
        if not self.past:
            raise RunError("the model has no past_key_values.N.key/value: it must be exported with its KV cache")
        self._integers = {n: given[n] for n in ("input_ids", "attention_mask", "position_ids") if n in given}
        if others := [n for n in given if n not in self._integers and not _PAST.fullmatch(n)]:
            raise RunError(f"the model wants inputs that gpuplan does not feed: {', '.join(others)}")
        for name, value in self._integers.items():
            if value.type not in _INTEGERS or len(value.shape) != 2:
                raise RunError(f"the model's {name} is {value.type} {value.shape}, not two axes of integers")
        self._presents = tuple("present." + tensor.name.removeprefix("past_key_values.") for tensor in self.past)
        if missing := [name for name in self._presents if name not in answers]:
            raise RunError(f"the model gives no {', '.join(missing[:3])}: it must be exported with its KV cache")
        self._vocabulary = answers["logits"].shape[-1]
        if _has_group_query_attention(model):
            self.layout: Layout = "prefix"
        else:
            self.layout = "append" if "position_ids" in given else "equal"
        self._rows_session: Any = None
        self._logits_type = answers["logits"].type

    @property
    def kv_bytes_per_token(self) -> int:
        """Cache of one token of one sequence."""
        from onnx import helper

        sizes = {t.element_type: helper.tensor_dtype_to_np_dtype(t.element_type).itemsize for t in self.past}
        return sum(tensor.heads * tensor.head * sizes[tensor.element_type] for tensor in self.past)

    @property
    def run_tokens_max(self) -> int:
        """Rows times tokens of one run, so that its logits stay small."""
        words = self._vocabulary if isinstance(self._vocabulary, int) else 1 << 17
        return max(_LOGITS_BYTES_MAX // (4 * words), 1)

    def empty(self, request_ids: Sequence[int]) -> Block:
        """A block of sequences that have nothing yet."""
        import onnxruntime as ort
        from onnx import helper

        rows, nothing = len(request_ids), (0,) * len(request_ids)
        tensors = tuple(
            ort.OrtValue.ortvalue_from_numpy(
                np.zeros((rows, t.heads, 0, t.head), dtype=helper.tensor_dtype_to_np_dtype(t.element_type))
            )
            for t in self.past
        )
        return Block(tuple(request_ids), nothing, nothing, 0, tensors)

    def forward(self, past: Block, tokens: Sequence[Sequence[int]]) -> tuple[Any, Block]:
        """Each row reads its `tokens`: the logits after its last one, [rows, vocabulary], and the new block.

        Rows must be where `layout` wants them, and read equally many tokens unless `past` is empty (right-padding
        behind a first prompt is never looked at, as attention is causal).
        """
        rows, width = len(tokens), max(map(len, tokens))
        counts = np.array([len(row) for row in tokens], dtype=np.int64)
        lengths = np.array(past.lengths, dtype=np.int64)
        ends = np.array(past.starts, dtype=np.int64) + lengths + counts
        columns = np.arange(past.columns + width)
        starts = np.array(past.starts, dtype=np.int64)[:, None]
        ids = np.zeros((rows, width), dtype=np.int64)
        for i, row in enumerate(tokens):
            ids[i, : len(row)] = row
        fed = {
            "input_ids": ids,
            "attention_mask": (columns >= starts) & (columns < ends[:, None]),
            "position_ids": lengths[:, None] + np.arange(width),
        }
        logits, tensors = self._run(fed, past)
        self._check(logits, tensors, rows, width, past.columns + width)
        last = np.arange(rows) * width + counts - 1
        after = tuple((lengths + counts).tolist())
        block = Block(past.request_ids, past.starts, after, past.columns + width, tensors)
        return self._last_rows(logits, last, rows, width), block

    def _run(self, fed: dict[str, Any], past: Block) -> tuple[Any, tuple[Any, ...]]:
        binding = self.session.io_binding()
        for name, value in self._integers.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(fed[name], dtype=_INTEGERS[value.type]))
        for tensor, value in zip(self.past, past.tensors, strict=True):
            binding.bind_ortvalue_input(tensor.name, value)
        device, number = device_of(self._spec)
        # One token of each row comes straight to the host; of a prompt's logits only the last ones do, later.
        one_token = fed["input_ids"].shape[1] == 1
        binding.bind_output("logits", *(("cpu", 0) if one_token else (device, number)))
        for name in self._presents:
            binding.bind_output(name, device, number)
        self.session.run_with_iobinding(binding)
        logits, *tensors = binding.get_outputs()
        return logits, tuple(tensors)

    def _check(self, logits: Any, tensors: tuple[Any, ...], rows: int, width: int, columns: int) -> None:
        shape = logits.shape()
        if shape[:2] != [rows, width] or len(shape) != 3:
            raise RunError(f"the model's logits are {shape} for {rows} rows of {width} tokens")
        for tensor, value in zip(self.past, tensors, strict=True):
            if value.shape() != [rows, tensor.heads, columns, tensor.head]:
                raise RunError(
                    f"the model's present of {tensor.name} is {value.shape()} for {rows} rows of {columns} columns"
                )

    def _last_rows(self, logits: Any, last: Any, rows: int, width: int) -> Any:
        if width == 1:
            return logits.numpy().reshape(rows, -1)
        if self._rows_session is None:
            self._rows_session = open_session(_rows_graph(self._logits_type), self._spec)
        binding = self._rows_session.io_binding()
        binding.bind_ortvalue_input("logits", logits)
        binding.bind_cpu_input("rows", last)
        binding.bind_output("picked", "cpu")
        self._rows_session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()


def _past_tensor(value: Any) -> PastTensor:
    from onnx import TensorProto

    types = {"tensor(float)": TensorProto.FLOAT, "tensor(float16)": TensorProto.FLOAT16}
    shape = value.shape
    if value.type not in types:
        raise RunError(f"the model's {value.name} is {value.type}: gpuplan keeps caches of float and float16")
    if len(shape) != 4 or not all(isinstance(size, int) for size in (shape[1], shape[3])):
        raise RunError(f"the model's {value.name} is {shape}, not [rows, heads, past, head size] with both sizes fixed")
    return PastTensor(value.name, types[value.type], shape[1], shape[3])


def _has_group_query_attention(model: Path | bytes) -> bool:
    import onnx

    try:
        if isinstance(model, Path):
            loaded = onnx.load(str(model), load_external_data=False)
        else:
            loaded = onnx.load_from_string(model)
    except Exception as error:  # protobuf's; ONNX Runtime's own format is one that it cannot read
        raise RunError(f"cannot read the model's graph: {first_line(error)}") from None
    graphs = [loaded.graph.node, *(function.node for function in loaded.functions)]
    return any(node.op_type == "GroupQueryAttention" for nodes in graphs for node in nodes)


def _rows_graph(logits_type: str) -> bytes:
    """Some rows of logits, counted over all sequences: [rows, tokens, vocabulary] and indices in, [rows, vocabulary]
    out."""
    from onnx import TensorProto, helper

    element = TensorProto.FLOAT16 if logits_type == "tensor(float16)" else TensorProto.FLOAT
    nodes = [
        helper.make_node("Shape", ["logits"], ["vocabulary"], start=2, end=3),
        helper.make_node("Concat", ["all", "vocabulary"], ["flat_shape"], axis=0),
        helper.make_node("Reshape", ["logits", "flat_shape"], ["flat"]),
        helper.make_node("Gather", ["flat", "rows"], ["picked"], axis=0),
    ]
    graph = helper.make_graph(
        nodes,
        "last_rows",
        [
            helper.make_tensor_value_info("logits", element, [None, None, None]),
            helper.make_tensor_value_info("rows", TensorProto.INT64, [None]),
        ],
        [helper.make_tensor_value_info("picked", element, [None, None])],
        [helper.make_tensor("all", TensorProto.INT64, [1], [-1])],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    serialised: bytes = made.SerializeToString()
    return serialised
