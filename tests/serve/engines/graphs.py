"""Small graphs with the contract of a single-step model, and one call from texts to outputs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

from gpuplan.hardware.roofline import StepLoad
from gpuplan.policy.vocabulary import Prefill, RunStep
from gpuplan.serve.engines import Output, Prompt
from gpuplan.serve.engines.session import EngineSpec
from gpuplan.serve.engines.single_step import SingleStepEngine

WORDS = {"[PAD]": 0, "good": 1, "bad": 2, "nothing": 3, "[UNK]": 4}
TABLE = [[9.0, -9.0], [0, 1], [1, 0], [0, 0], [0, 0]]
"""A row of scores for each word. The padding's is wild: whoever does not mask it answers wrongly."""


def step_of(prompts: dict[int, Prompt]) -> RunStep:
    prefills = tuple(Prefill(i, len(p.token_ids), True) for i, p in prompts.items())
    return RunStep("m-0", 1, prefills, (), StepLoad(0, 0, 0, 0, len(prompts)), 0)


def answered(engine: SingleStepEngine, *prompts: str | Sequence[int]) -> list[Output]:
    """One batch through a loaded engine. Ids are out of order, as a queue may have them."""

    encode = engine._files.encode
    given = {1000 - i: Prompt("", encode(p) if isinstance(p, str) else p) for i, p in enumerate(prompts)}
    outputs = engine.run(step_of(given), given)
    assert sorted(outputs) == sorted(given)
    return [outputs[1000 - i] for i in range(len(prompts))]


def loaded(source: Any, role: Any = "classifier", **spec: Any) -> SingleStepEngine:
    engine = SingleStepEngine(EngineSpec(source=str(source), role=role, **spec))
    engine.load()
    return engine


def votes(
    folder: Path,
    *,
    batch: int | str = "batch",
    tokens: int | str = "tokens",
    dtype: int = TensorProto.INT64,
    table: list[list[float]] | None = None,
    mask: bool = True,
    types: bool = False,
    hidden: bool = False,
    **config: Any,
) -> Path:
    """A model that adds up its words' rows (or, `hidden`, gives them one by one), with tokenizer and config beside."""
    rows = np.array(TABLE if table is None else table, dtype=np.float32)
    names = ["input_ids", *(["attention_mask"] if mask else []), *(["token_type_ids"] if types else [])]
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["rows"])]
    last = "rows"
    if types:  # anything but zeros would show
        nodes.append(helper.make_node("Cast", ["token_type_ids"], ["types"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Unsqueeze", ["types", "last_axis"], ["types_wide"]))
        nodes.append(helper.make_node("Add", [last, "types_wide"], ["typed"]))
        last = "typed"
    if mask and not hidden:
        nodes.append(helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Unsqueeze", ["mask", "last_axis"], ["mask_wide"]))
        nodes.append(helper.make_node("Mul", [last, "mask_wide"], ["kept"]))
        last = "kept"
    width = rows.shape[1]
    if hidden:
        nodes.append(helper.make_node("Identity", [last], ["last_hidden_state"]))
        shape: list[Any] = [batch, tokens, width]
    else:
        nodes.append(helper.make_node("ReduceSum", [last, "token_axis"], ["logits"], keepdims=0))
        shape = [batch, width]
    output = helper.make_tensor_value_info("last_hidden_state" if hidden else "logits", TensorProto.FLOAT, shape)
    axes = {"last_axis": np.array([-1]), "token_axis": np.array([1])}
    return saved(
        folder,
        nodes,
        [helper.make_tensor_value_info(name, dtype, [batch, tokens]) for name in names],
        [output],
        {"table": rows, **axes},
        **config,
    )


def saved(
    folder: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: dict[str, Any], **config: Any
) -> Path:
    """A model folder."""
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "small", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "model.onnx"
