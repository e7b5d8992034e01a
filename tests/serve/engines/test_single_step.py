"""Models that answer in one step: the same answer in any batch, one request's fault its own, all of it freed."""

from __future__ import annotations

import gc
import math
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from gpuplan.errors import GpuplanError, RunError
from gpuplan.serve.engines import OutOfMemory, Output, graph
from gpuplan.serve.engines.graph import Graph
from gpuplan.serve.engines.padding import Inputs, row_buckets, token_buckets
from gpuplan.serve.engines.session import EngineSpec, memory_watched
from gpuplan.serve.engines.single_step import SingleStepEngine

from .graphs import answered, loaded, saved, votes

LABELS = {"id2label": {"1": "yes", "0": "no"}}


def vector(output: Output) -> Any:
    assert output.embedding is not None, output.error
    return np.frombuffer(output.embedding, dtype="<f4")


# --- the same answer alone and in any batch -----------------------------------------------------------------------

TEXTS = [
    "a lovely bright day",
    "terrible, slow and broken " * 9,
    "word",
    "the network was great but the garden is sad " * 4,
    "love " * 120,
]


def test_a_classifier_answers_the_same_alone_and_in_any_batch() -> None:
    engine = loaded("builtin:sentiment")
    alone = [answered(engine, text)[0] for text in TEXTS]
    for batch in (TEXTS, TEXTS[::-1], TEXTS * 6):
        for text, output in zip(batch, answered(engine, *batch), strict=True):
            one = alone[TEXTS.index(text)]
            assert output.text == one.text
            assert output.scores == pytest.approx(one.scores, abs=1e-5)
    assert [o.text for o in alone] == ["positive", "negative", "negative", "positive", "positive"]


def test_an_embedder_answers_the_same_alone_and_in_any_batch() -> None:
    engine = loaded("builtin:embed", "embedder")
    alone = [vector(answered(engine, text)[0]) for text in TEXTS]
    for batch in (TEXTS, TEXTS[::-1]):
        for text, output in zip(batch, answered(engine, *batch), strict=True):
            assert vector(output) == pytest.approx(alone[TEXTS.index(text)], abs=1e-5)
    assert [np.linalg.norm(v) for v in alone] == pytest.approx([1.0] * len(alone))


def test_a_graph_without_a_mask_is_never_padded(tmp_path: Path) -> None:
    """Its padding would be a word like any other: here one that decides everything."""
    engine = loaded(votes(tmp_path, mask=False, **LABELS))
    texts = ("good good bad", "bad", "good", "bad bad bad bad good", "good good bad good")
    assert [o.text for o in answered(engine, *texts)] == ["yes", "no", "yes", "no", "yes"]


@pytest.mark.parametrize("shape", [{"tokens": 8}, {"batch": 1}, {"batch": 4}, {"batch": 2, "tokens": 6}], ids=str)
def test_fixed_dimensions_are_padded_to(tmp_path: Path, shape: dict[str, int]) -> None:
    engine = loaded(votes(tmp_path, **shape, **LABELS))
    texts = ("good good bad", "bad", "good", "bad bad good", "good")
    assert [o.text for o in answered(engine, *texts)] == ["yes", "no", "yes", "no", "yes"]
    assert answered(engine, "good " * 9)[0].error == ("too_long" if "tokens" in shape else None)


@pytest.mark.parametrize("options", [{"dtype": TensorProto.INT32}, {"types": True}], ids=str)
def test_inputs_are_what_the_graph_says(tmp_path: Path, options: dict[str, Any]) -> None:
    engine = loaded(votes(tmp_path, **options, **LABELS))
    assert [o.text for o in answered(engine, "good", "bad bad good")] == ["yes", "no"]


@pytest.mark.parametrize("source", ["builtin:sentiment", "masked", "maskless"])
def test_bound_shapes_answer_like_any_other(tmp_path: Path, source: str) -> None:
    """How CUDA is run, with the CPU for the device: padded rows, inputs overwritten in place, bindings used again."""
    file = source if ":" in source else str(votes(tmp_path, mask=source == "masked", **LABELS))
    texts = ["good", "bad bad good", "good good", "bad", "good bad good", "bad " * 20]
    plain, bound = loaded(file), loaded(file, max_batch_size=8)
    assert bound._loaded is not None
    bound._loaded._on_cpu = False
    for batch in (texts, texts[:3], texts[::-1], texts[3:]):
        for one, other in zip(answered(plain, *batch), answered(bound, *batch), strict=True):
            assert other.text == one.text
            assert other.scores == pytest.approx(one.scores, abs=1e-5)
    assert len(bound._loaded._bound) <= 4, "a shape is bound once"
    bound.close()


# --- what a row becomes -------------------------------------------------------------------------------------------


def test_scores_are_a_softmax_over_the_labels(tmp_path: Path) -> None:
    engine = loaded(votes(tmp_path, **LABELS))
    (output,) = answered(engine, "good good")
    assert output.scores == pytest.approx({"no": 1 / (1 + math.exp(2)), "yes": 1 / (1 + math.exp(-2))}, abs=1e-6)
    assert answered(loaded(votes(tmp_path)), "good")[0].text == "LABEL_1"


def test_one_logit_is_a_logistic_score(tmp_path: Path) -> None:
    engine = loaded(votes(tmp_path, table=[[9], [1], [-1], [0], [0]], id2label={"0": "relevant"}))
    good, bad, far = answered(engine, "good", "bad bad", "bad " * 200)
    assert (good.text, good.scores) == ("relevant", {"relevant": pytest.approx(1 / (1 + math.exp(-1)), abs=1e-6)})
    assert bad.scores == {"relevant": pytest.approx(1 / (1 + math.exp(2)), abs=1e-6)}
    assert far.scores == {"relevant": pytest.approx(0.0)}


def test_labels_that_may_hold_together_are_scored_each_alone(tmp_path: Path) -> None:
    both = votes(tmp_path, table=[[9, 9], [2, 2], [-2, 2], [0, 0], [0, 0]], problem_type="multi_label_classification")
    (output,) = answered(loaded(both), "good")
    assert output.scores == pytest.approx(dict.fromkeys(("LABEL_0", "LABEL_1"), 1 / (1 + math.exp(-2))), abs=1e-6)


def test_a_hidden_state_is_pooled_over_its_own_tokens(tmp_path: Path) -> None:
    engine = loaded(votes(tmp_path, hidden=True), "embedder")
    mixed, one = answered(engine, "good good good bad", "good")
    assert vector(mixed) == pytest.approx(np.array([1, 3]) / math.hypot(1, 3), abs=1e-6)
    assert vector(one) == pytest.approx([0, 1])
    assert vector(answered(engine, [3])[0]) == pytest.approx([0, 0]), "a zero vector has no direction"


def test_a_sentence_embedding_is_taken_as_it_is(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"]),
        helper.make_node("ReduceMax", ["last_hidden_state"], ["sentence_embedding"], axes=[1], keepdims=0),
    ]
    given = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "t"])]
    told = [
        helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["b", "t", 3]),
        helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["b", 3]),
    ]
    table = np.arange(15, dtype=np.float32).reshape(5, 3)
    engine = loaded(saved(tmp_path, nodes, given, told, {"table": table}), "embedder")
    assert vector(answered(engine, "good bad")[0]).tolist() == [6.0, 7.0, 8.0]


# --- one request's fault is its own -------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("role", ["classifier", "embedder"])
def test_what_is_no_number_fails_its_request_alone(tmp_path: Path, bad: float, role: str) -> None:
    table = [[0, 0], [0, 1], [1, 0], [bad, 0], [0, 0]]
    engine = loaded(votes(tmp_path, table=table, hidden=role == "embedder"), role)
    first, second, third = answered(engine, "good", "good nothing", "bad")
    assert second == Output("", error="nan_output")
    assert (first.error, third.error) == (None, None)


def test_too_long_and_unknown_ids_fail_alone(tmp_path: Path) -> None:
    engine = loaded(votes(tmp_path, **LABELS, max_position_embeddings=20), tokens_max=64)
    outputs = answered(engine, [1] * 20, [1] * 21, [1, 5], [-1], [2], [])
    assert [o.error for o in outputs] == [None, "too_long", "bad_token", "bad_token", None, None]
    assert [o.text for o in outputs] == ["yes", "", "", "", "no", "no"]
    assert [o.error for o in answered(engine, [9], [9])] == ["bad_token", "bad_token"], "nothing is left to run"


def test_a_batch_larger_than_said_is_run_in_pieces(tmp_path: Path) -> None:
    engine = loaded(votes(tmp_path, **LABELS), max_batch_size=4)
    assert [o.text for o in answered(engine, *(["good", "bad"] * 5))] == ["yes", "no"] * 5


def test_another_number_of_rows_is_never_guessed_at(tmp_path: Path) -> None:
    """One row for all of them: nobody gets it."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("ReduceSum", ["rows", "axes"], ["summed"], keepdims=0),
        helper.make_node("Slice", ["summed", "zero", "one", "zero"], ["logits"]),
    ]
    given = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "t"])]
    told = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", 2])]
    weights = {
        "table": np.zeros((5, 2), np.float32),
        "axes": np.array([1]),
        "zero": np.array([0]),
        "one": np.array([1]),
    }
    engine = loaded(saved(tmp_path, nodes, given, told, weights), max_batch_size=1)
    assert answered(engine, "good")[0].error is None
    wide = SingleStepEngine(EngineSpec(source=str(tmp_path / "model.onnx"), role="classifier", max_batch_size=2))
    with pytest.raises(RunError, match=r"2 rows went into the model, and its logits is \[1, 2\]"):
        wide.load()


# --- refused at load, in one line ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, "gives 2 scores, and its config.json names 3 labels"),
        ({"id2label": {"0": "a", "1": "a"}}, "gives 2 scores, and its config.json names 1 labels"),
        ({"id2label": {"zero": "a", "one": "b"}}, "id2label: not a mapping from numbers to names"),
        ({"hidden": True}, r"last_hidden_state is \[batch, tokens, 2\], not \[batch, labels\]; set task: embed"),
        ({"tokens": 8, "mask": False}, "takes exactly 8 tokens and has no attention_mask to pad with"),
        ({"dtype": TensorProto.FLOAT}, "cannot load the model"),
    ],
    ids=str,
)
def test_a_model_that_is_no_classifier_is_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    file = votes(tmp_path, **options)
    with pytest.raises(GpuplanError, match=said) as refused:
        loaded(file)
    assert "\n" not in str(refused.value)


class Told:
    def __init__(self, name: str, shape: list[Any], kind: str = "int64") -> None:
        self.name, self.shape, self.type = name, shape, f"tensor({kind})"


IDS = Told("input_ids", ["b", "t"])
LOGITS = Told("logits", ["b", 3], "float")


@pytest.mark.parametrize(
    ("inputs", "outputs", "role", "said"),
    [
        ([IDS, Told("position_ids", ["b", "t"])], [LOGITS], "classifier", "wants inputs that gpuplan does not feed: position_ids"),
        ([Told("attention_mask", ["b", "t"])], [LOGITS], "classifier", "no input input_ids"),
        ([Told("input_ids", ["b", "t"], "float")], [LOGITS], "classifier", "not int64 or int32"),
        ([Told("input_ids", ["t"])], [LOGITS], "classifier", "is [t], not [batch, tokens]"),
        ([IDS], [], "classifier", "no output"),
        ([IDS], [Told("label", ["b"])], "classifier", "not floating point"),
        ([IDS], [Told("logits", [None], "float")], "embedder", "is [?], not [batch, width] or [batch, tokens, width]"),
        ([Told("input_ids", [2, "t"]), Told("attention_mask", [4, "t"])], [LOGITS], "classifier", "differ in batch: 2, 4"),
    ],
)  # fmt: skip
def test_a_graph_of_another_contract_is_refused(inputs: Any, outputs: Any, role: Any, said: str) -> None:
    with pytest.raises(RunError) as refused:
        graph.read(inputs, outputs, role)
    assert said in str(refused.value)


def test_the_output_that_is_read_is_chosen_by_name() -> None:
    hidden, pooler = Told("last_hidden_state", ["b", "t", 4], "float"), Told("pooler_output", ["b", 4], "float")
    sentence = Told("sentence_embedding", ["b", 4], "float16")
    assert graph.read([IDS], [pooler, hidden], "embedder") == Graph(
        {"input_ids": "int64"}, "last_hidden_state", True, width=4
    )
    assert graph.read([IDS], [hidden, sentence], "embedder").output == "sentence_embedding"
    assert graph.read([IDS], [Told("v", ["b", None], "float")], "embedder") == Graph({"input_ids": "int64"}, "v", False)


def test_a_window_that_nobody_told_of_is_found_at_load(tmp_path: Path) -> None:
    """Positions past a model's table are an error of the whole batch: better at load than then."""
    nodes = [
        helper.make_node("Shape", ["input_ids"], ["length"], start=1, end=2),
        helper.make_node("Slice", ["positions", "zero", "length", "zero"], ["places"]),
        helper.make_node("Gather", ["table", "input_ids"], ["words"]),
        helper.make_node("Add", ["words", "places"], ["last_hidden_state"]),
    ]
    given = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "t"]) for name in ("input_ids", "attention_mask")
    ]
    told = [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["b", "t", 2])]
    weights = {"table": np.ones((5, 2), np.float32), "positions": np.ones((40, 2), np.float32), "zero": np.array([0])}
    file = saved(tmp_path, nodes, given, told, weights)
    with pytest.raises(RunError, match=r"cannot run the model on 64 tokens: .*window under 64 tokens"):
        loaded(file, "embedder", tokens_max=64)
    assert answered(loaded(file, "embedder", tokens_max=40), "good " * 40)[0].error is None


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        "Failed to allocate memory for requested buffer of size 1073741824",
        "Available memory of 100 is smaller than requested bytes of 200",
        "Failed to find a free memory block despite calling Extend. rounded_bytes:256",
        "CUDA failure 2: out of memory ; GPU=0 ; hostname=x ; expr=cudaMalloc((void**)&p, size);",
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0",
        "std::bad_alloc: bad allocation",
    ],
)
def test_every_word_for_short_memory_is_out_of_memory(
    said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(OutOfMemory), memory_watched():
        raise RuntimeError(f"[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : {said}\nmore")
    engine = loaded(votes(tmp_path, **LABELS))
    assert engine._loaded is not None

    def full(*_: Any) -> Any:
        raise RuntimeError(said)

    with monkeypatch.context() as patched:
        patched.setattr(engine._loaded._session, "run_with_ort_values", full)
        with pytest.raises(OutOfMemory):
            answered(engine, "good")
    assert answered(engine, "good")[0].text == "yes", "the engine is as it was before the step"


def test_no_memory_and_another_failure_are_told_apart() -> None:
    with pytest.raises(OutOfMemory), memory_watched():
        raise MemoryError
    with pytest.raises(ValueError, match="shape"), memory_watched():
        raise ValueError("shape")


def test_after_close_nothing_is_left(tmp_path: Path) -> None:
    engine = loaded(votes(tmp_path, **LABELS))
    assert engine._loaded is not None
    session, buffers = weakref.ref(engine._loaded._session), weakref.ref(engine._loaded._inputs)
    answered(engine, "good")
    engine.close()
    gc.collect()
    assert (session(), buffers()) == (None, None)


def test_a_model_that_is_not_loaded_says_so(tmp_path: Path) -> None:
    engine = SingleStepEngine(EngineSpec(source=str(votes(tmp_path)), role="classifier"))
    with pytest.raises(RunError, match="not loaded"):
        answered(engine, "good")


# --- shapes and buffers -------------------------------------------------------------------------------------------


def test_buckets_rise_to_the_limit_and_waste_little() -> None:
    assert token_buckets(512, fine=False) == [16, 32, 64, 128, 256, 512]
    assert token_buckets(100, fine=True) == [16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 100]
    assert token_buckets(7, fine=True) == [7]
    assert row_buckets(12) == [1, 2, 4, 8, 12]
    fine = token_buckets(2048, fine=True)
    for length in range(16, 2049):
        assert next(size for size in fine if size >= length) <= 1.25 * length


def test_inputs_are_written_in_place() -> None:
    inputs = Inputs(
        {"input_ids": "int32", "attention_mask": "int64", "token_type_ids": "int64"}, rows_max=4, tokens_max=8, pad_id=7
    )
    inputs.write([[9] * 8] * 4, rows=4, tokens=8)
    arrays, real = inputs.write([(1, 2, 3), bytes([4])], rows=3, tokens=4)
    assert arrays["input_ids"].tolist() == [[1, 2, 3, 7], [4, 7, 7, 7], [7, 7, 7, 7]]
    assert arrays["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    assert not arrays["token_type_ids"].any()
    assert real.tolist() == arrays["attention_mask"].astype(bool).tolist()
    assert all(array.flags.c_contiguous and not array.flags.owndata for array in arrays.values())
    again, _ = inputs.write([[1]], rows=1, tokens=1)
    assert np.shares_memory(again["input_ids"], arrays["input_ids"])
    assert {name: str(array.dtype) for name, array in arrays.items()} == {
        "input_ids": "int32",
        "attention_mask": "int64",
        "token_type_ids": "int64",
    }


def test_loading_is_quick_and_the_first_batch_is_warm() -> None:
    loaded("builtin:sentiment")  # imports, and the graph is made once
    began_s = time.perf_counter()
    loaded("builtin:sentiment")
    assert time.perf_counter() - began_s < 1.0, "0.15 s alone on a core; warming up stops at its limit"
