"""Small decoders in every layout that the engine knows, and a driver that gives them steps as the core would."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gpuplan.hardware.roofline import StepLoad
from gpuplan.hardware.shapes import ModelShape
from gpuplan.policy.vocabulary import Prefill, RunStep
from gpuplan.serve.builtin import tiny_chat
from gpuplan.serve.engines import Output, Prompt, Sampling
from gpuplan.serve.engines.generation import GenerationEngine
from gpuplan.serve.engines.session import EngineSpec

SMALL = ModelShape("small", "decoder", 2, 64, 4, 2, 96, True, tiny_chat.VOCABULARY, 512)
TOLD = Sampling(ignore_eos=True, logprobs=2)


def small_model(kind: str = "append") -> onnx.ModelProto:
    """`append`: as Optimum exports. `equal`: without position_ids. `half`: with an fp16 cache. `prefix`: with ONNX
    Runtime's GroupQueryAttention."""
    if kind == "prefix":
        return _group_query_model()
    model = onnx.load_from_string(tiny_chat.graph(SMALL, seed=3))
    if kind == "equal":
        _derive_positions(model.graph)
    if kind == "half":
        _halve_cache(model.graph)
    return model


def _derive_positions(graph: Any) -> None:
    kept = [value for value in graph.input if value.name != "position_ids"]
    del graph.input[:]
    graph.input.extend(kept)
    nodes = [
        helper.make_node("Shape", ["attention_mask"], ["p_all"], start=1, end=2),
        helper.make_node("Shape", ["input_ids"], ["p_new"], start=1, end=2),
        helper.make_node("Sub", ["p_all", "p_new"], ["p_past"]),
        helper.make_node("Squeeze", ["p_past"], ["p_first"]),
        helper.make_node("Squeeze", ["p_all"], ["p_end"]),
        helper.make_node("Range", ["p_first", "p_end", "p_one"], ["p_range"]),
        helper.make_node("Unsqueeze", ["p_range", "p_axis"], ["position_ids"]),
    ]
    graph.initializer.extend(
        [numpy_helper.from_array(np.array(1), "p_one"), numpy_helper.from_array(np.array([0]), "p_axis")]
    )
    for i, node in enumerate(nodes):
        graph.node.insert(i, node)


def _halve_cache(graph: Any) -> None:
    past = [value for value in graph.input if value.name.startswith("past")]
    present = [value for value in graph.output if value.name.startswith("present")]
    names = {value.name: f"full.{value.name}" for value in [*past, *present]}
    for value in [*past, *present]:
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    for node in graph.node:
        for names_of in (node.input, node.output):
            names_of[:] = [names.get(name, name) for name in names_of]
    for i, value in enumerate(past):
        graph.node.insert(i, helper.make_node("Cast", [value.name], [names[value.name]], to=TensorProto.FLOAT))
    for value in present:
        graph.node.append(helper.make_node("Cast", [names[value.name]], [value.name], to=TensorProto.FLOAT16))


def _group_query_model() -> onnx.ModelProto:
    """Two layers of attention alone, wired as onnxruntime-genai's builder wires them: no position_ids, and where a row
    ends follows from the sum of its mask."""
    rng = np.random.default_rng(5)
    vocabulary, hidden, heads, kv, head, context = tiny_chat.VOCABULARY, 64, 4, 2, 16, 512
    weights = {"embedding": rng.normal(size=(vocabulary, hidden)), "head": rng.normal(size=(hidden, vocabulary)) / 8}
    angles = np.arange(context)[:, None] * 10000.0 ** (-np.arange(0, head, 2) / head)
    weights |= {"cosine": np.cos(angles), "sine": np.sin(angles)}
    ints = {"one": np.array([1]), "last": np.array(1), "axis": np.array([1])}
    nodes = [
        helper.make_node("ReduceSum", ["attention_mask", "axis"], ["sums"], keepdims=0),
        helper.make_node("Sub", ["sums", "one"], ["ends"]),
        helper.make_node("Cast", ["ends"], ["seqlens"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["columns"], start=1, end=2),
        helper.make_node("Squeeze", ["columns"], ["column"]),
        helper.make_node("Cast", ["column"], ["total"], to=TensorProto.INT32),
        helper.make_node("Gather", ["embedding", "input_ids"], ["x0"]),
    ]
    for i in range(2):
        for name, width in (("q", heads * head), ("k", kv * head), ("v", kv * head)):
            weights[f"{name}w{i}"] = rng.normal(size=(hidden, width)) / 8
            nodes.append(helper.make_node("MatMul", [f"x{i}", f"{name}w{i}"], [f"{name}{i}"]))
        past = [f"past_key_values.{i}.{kind}" for kind in ("key", "value")]
        present = [f"present.{i}.{kind}" for kind in ("key", "value")]
        nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [f"q{i}", f"k{i}", f"v{i}", *past, "seqlens", "total", "cosine", "sine"],
                [f"mixed{i}", *present],
                domain="com.microsoft", num_heads=heads, kv_num_heads=kv, do_rotary=1,
            )
        )  # fmt: skip
        nodes.append(helper.make_node("Add", [f"x{i}", f"mixed{i}"], [f"x{i + 1}"]))
    nodes.append(helper.make_node("MatMul", ["x2", "head"], ["logits"]))
    names = [f"{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    f, i64 = TensorProto.FLOAT, TensorProto.INT64
    graph = helper.make_graph(
        nodes,
        "group_query",
        [
            helper.make_tensor_value_info("input_ids", i64, ["batch", "tokens"]),
            helper.make_tensor_value_info("attention_mask", i64, ["batch", "all"]),
            *(helper.make_tensor_value_info(f"past_key_values.{n}", f, ["batch", kv, "past", head]) for n in names),
        ],
        [
            helper.make_tensor_value_info("logits", f, ["batch", "tokens", vocabulary]),
            *(helper.make_tensor_value_info(f"present.{n}", f, ["batch", kv, "all", head]) for n in names),
        ],
        [numpy_helper.from_array(np.asarray(a, dtype=np.float32), n) for n, a in weights.items()]
        + [numpy_helper.from_array(a, n) for n, a in ints.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def write(folder: Path, model: onnx.ModelProto) -> Path:
    """A model folder as Hugging Face's exporters write it."""
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    tiny_chat.vocabulary().save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": tiny_chat.END_ID}))
    return folder / "model.onnx"


def encode(text: str) -> list[int]:
    """The token ids of tiny-chat's vocabulary."""
    ids: list[int] = tiny_chat.vocabulary().encode(text).ids
    return ids


class Driver:
    """Gives an engine steps and keeps what it answers. Request ids are never used twice."""

    _next_id = itertools.count(1)

    def __init__(self, engine: GenerationEngine) -> None:
        self.engine = engine
        self.prompts: dict[int, Prompt] = {}
        self.left: dict[int, int] = {}
        self.outputs: dict[int, list[Output]] = {}
        engine.load()

    def begin(self, text: str, tokens: int = 100, sampling: Sampling = TOLD) -> int:
        """A request that waits for its prefill."""
        request_id = next(self._next_id)
        self.prompts[request_id] = Prompt(text, encode(text), tokens, sampling)
        self.left[request_id] = len(self.prompts[request_id].token_ids)
        self.outputs[request_id] = []
        return request_id

    def step(self, decodes: Iterable[int] = (), reads: dict[int, int] | None = None) -> dict[int, Output]:
        """Runs a step now: these decode, those read so many tokens (0: all that are left)."""
        takes = {i: min(n or self.left[i], self.left[i]) for i, n in (reads or {}).items()}
        prefills = tuple(Prefill(i, n, n == self.left[i]) for i, n in takes.items())
        step = RunStep("r", 1, prefills, tuple(decodes), StepLoad(0, 0, 0, 0, 0), 0)
        answers = self.engine.run(step, {i: self.prompts[i] for i in takes})
        assert set(answers) == set(step.answered())
        for i, n in takes.items():
            self.left[i] -= n
        for i, output in answers.items():
            self.outputs[i].append(output)
        return dict(answers)

    def alone(self, text: str, tokens: int, sampling: Sampling = TOLD) -> list[Output]:
        """What the request gets when nobody else is there."""
        request_id = self.begin(text, 0, sampling)
        self.step(reads={request_id: 0})
        while len(self.outputs[request_id]) < tokens and not self.outputs[request_id][-1].end:
            self.step([request_id])
        self.engine.release([request_id])
        return self.outputs[request_id]

    def text(self, request_id: int) -> str:
        return "".join(output.text for output in self.outputs[request_id])


def spec(model: Path, **options: Any) -> EngineSpec:
    return EngineSpec(source=str(model), role="decoder", **{"max_batch_size": 4, **options})


@pytest.fixture(scope="session")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Driver]]:
    """A loaded engine for each kind of model, shared by all tests."""
    made: dict[str, Driver] = {}

    def of(kind: str) -> Driver:
        if kind not in made:
            model = write(tmp_path_factory.mktemp(kind), small_model(kind))
            made[kind] = Driver(GenerationEngine(spec(model)))
        return made[kind]

    yield of
    for driver in made.values():
        driver.engine.close()


@pytest.fixture
def driver(drivers: Callable[[str], Driver]) -> Driver:
    return drivers("append")
