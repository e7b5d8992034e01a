"""ONNX files in a scenario: what is read beside them, and what follows for role, window and KV cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpuplan.errors import InputError
from gpuplan.hardware import roofline, shapes
from gpuplan.hardware.catalog import GIB
from gpuplan.scenario import deployment, files, onnx_files
from gpuplan.scenario.demand import ModelSource, Scenario, ShapeSpec
from tests.hardware.test_shapes import BERT, LLAMA_3

GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "activation_function": "gelu_new",
    "model_type": "gpt2",
    "n_embd": 768,
    "n_head": 12,
    "n_inner": None,
    "n_layer": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}
GPT2_KV_BYTES = 2 * 12 * 768 * 2


def written(
    folder: Path, source: Any, *, supply: Any = None, config: Any = None, size: int = 0, output: Any = None
) -> Path:
    """A scenario with one model, whose file `models/m.onnx` is `size` bytes of nothing."""
    (folder / "models").mkdir(exist_ok=True)
    with (folder / "models" / "m.onnx").open("wb") as file:
        file.truncate(size)
    if config is not None:
        (folder / "models" / "config.json").write_text(json.dumps(config))
    traffic: dict[str, Any] = {"name": "c", "model": "m", "arrivals": {"process": "constant", "rate": 1}}
    traffic["prompt_tokens"] = 10
    if output:
        traffic["output_tokens"] = output
    data = {"name": "s", "models": {"m": source}, "traffic": [traffic], "deployment": supply or {"gpu": "cpu"}}
    (folder / "s.yaml").write_text(yaml.safe_dump(data))
    return folder / "s.yaml"


def loaded(folder: Path, source: Any = None, **options: Any) -> Scenario:
    return files.load(written(folder, {"onnx": "models/m.onnx"} if source is None else source, **options))


# --- the task -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "task", "role"),
    [
        ("LlamaForCausalLM", "generate", "decoder"),
        ("GPT2LMHeadModel", "generate", "decoder"),
        ("BertForSequenceClassification", "classify", "classifier"),
        ("BertModel", "embed", "embedder"),
        ("MPNetModel", "embed", "embedder"),
        ("XLMRobertaModel", "embed", "embedder"),
        ("BertForMaskedLM", None, "classifier"),
        ("T5ForConditionalGeneration", None, "classifier"),
    ],
)
def test_a_model_s_class_says_what_it_is_for(tmp_path: Path, architecture: str, task: Any, role: str) -> None:
    assert onnx_files.task_of({"architectures": [architecture]}) == task
    output = 5 if task == "generate" else None
    source = loaded(tmp_path, config={"architectures": [architecture]}, output=output).models["m"]
    assert source.task == (task or "classify")
    assert deployment.role(source) == role


@pytest.mark.parametrize(
    "config", [{}, {"architectures": None}, {"architectures": "BertModel"}, {"architectures": [7]}]
)
def test_a_config_that_does_not_say_leaves_it_open(config: Any) -> None:
    assert onnx_files.task_of(config) is None


def test_what_the_user_says_wins(tmp_path: Path) -> None:
    asked = {"onnx": "models/m.onnx", "task": "classify", "context_tokens_max": 128}
    source = loaded(tmp_path, asked, config=BERT | {"architectures": ["BertModel"]}).models["m"]
    assert (source.task, deployment.role(source), source.context_tokens_max) == ("classify", "classifier", 128)


def test_builtins_are_what_their_shapes_are() -> None:
    assert deployment.role(ModelSource(builtin="sentiment")) == "classifier"
    assert deployment.role(ModelSource(builtin="embed")) == "embedder"
    assert deployment.role(ModelSource(emulate="llama-3-8b")) == "decoder"
    assert deployment.role(ModelSource(onnx="m.onnx")) == "classifier"


# --- the window ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (BERT, 512),
        (GPT2, 1024),
        (LLAMA_3, 8192),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "mpnet", "max_position_embeddings": 514}, 512),
        ({"architectures": ["LlamaForCausalLM"]}, 2048),
        ({"architectures": ["BertModel"]}, 512),
        ({"max_position_embeddings": "many"}, 512),
        ({"max_position_embeddings": True}, 512),
        (None, 512),
    ],
    ids=lambda value: str(value)[:24],
)
def test_the_window_is_the_model_s(tmp_path: Path, config: Any, window: int) -> None:
    task = onnx_files.task_of(config or {})
    scenario = loaded(tmp_path, config=config, output=5 if task == "generate" else None)
    assert deployment.window_of(scenario.models["m"]) == scenario.models["m"].context_tokens_max == window


# --- paths and kept data ------------------------------------------------------------------------------------------


def test_what_was_found_is_kept_and_needs_no_file_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bench passes the resolved scenario to a server process, from another folder; plan may read it a year later."""
    scenario = loaded(tmp_path, config=GPT2, size=1000, output=5)
    assert scenario.models["m"].onnx == str(tmp_path / "models" / "m.onnx")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    passed_on = elsewhere / "scenario.yaml"
    passed_on.write_text(json.dumps(files.to_builtins(scenario)))
    assert files.load(passed_on) == scenario
    for file in (tmp_path / "models").iterdir():
        file.unlink()
    assert files.load(passed_on) == scenario
    assert files.from_builtins(json.loads(passed_on.read_text())) == scenario


# --- weights and KV cache -----------------------------------------------------------------------------------------


def test_weights_are_as_large_as_the_files(tmp_path: Path) -> None:
    size = 300_000_000
    for name in ("m.onnx_data", "m.onnx.data"):
        (tmp_path / "models").mkdir(exist_ok=True)
        with (tmp_path / "models" / name).open("wb") as file:
            file.truncate(100_000_000)
    shape = deployment.shape_of(loaded(tmp_path, config=GPT2, size=100_000_000, output=5).models["m"])
    assert shape is not None
    assert shape.weights_bytes == pytest.approx(size, rel=1e-3)
    assert (shape.role, shape.kv_bytes_per_token) == ("decoder", GPT2_KV_BYTES)


def test_an_onnx_file_with_a_shape_is_still_not_emulated(tmp_path: Path) -> None:
    source = loaded(tmp_path, config=GPT2, output=5).models["m"]
    assert isinstance(source.onnx_shape, ShapeSpec)
    assert not source.emulated


def test_latent_attention_is_served_without_a_shape(tmp_path: Path) -> None:
    source = loaded(tmp_path, config=LLAMA_3 | {"kv_lora_rank": 512}, output=5).models["m"]
    assert (source.task, source.onnx_shape, source.context_tokens_max) == ("generate", None, 8192)


def replica(folder: Path, supply: Any, *, config: Any = GPT2, size: int = 500_000_000) -> deployment.Replica:
    scenario = loaded(folder, config=config, size=size, supply=supply, output=5)
    return deployment.resolve(scenario).replicas[0]


SLICE = {"gpu": "a100-80gb", "mig": ["1g.10gb"]}


@pytest.mark.parametrize(
    ("supply", "config", "tokens"),
    [
        ({"gpu": "cpu"}, GPT2, 32 * 1024),
        ({"gpu": "cpu", "batching": {"m": {"max_batch_size": 4}}}, GPT2, 4 * 1024),
        ({"gpu": "cpu", "replicas": [{"model": "m", "kv_cache_tokens": 500}]}, GPT2, 500),
        ({"gpu": "cpu"}, {"architectures": ["XForCausalLM"]}, 32 * 2048),
        (SLICE, {"architectures": ["XForCausalLM"]}, 32 * 2048),
        (SLICE | {"replicas": [{"model": "m", "slice": "1g.10gb", "kv_cache_tokens": 500}]}, GPT2, 500),
        (SLICE | {"replicas": [{"model": "m", "slice": "1g.10gb", "kv_cache_tokens": 10**9}]}, GPT2, None),
        (SLICE, GPT2, None),
    ],
    ids=str,
)  # fmt: skip
def test_the_kv_cache_is_what_is_said_or_what_memory_leaves(
    tmp_path: Path, supply: Any, config: Any, tokens: int | None
) -> None:
    found = replica(tmp_path, supply, config=config)
    if tokens is None:
        assert found.slice.profile is not None
        free = found.slice.profile.memory_bytes - 500_000_000 - roofline.RUNTIME_MEMORY_BYTES
        assert found.kv_tokens_max == pytest.approx(free / GPT2_KV_BYTES, rel=1e-3)
    else:
        assert found.kv_tokens_max == tokens


def test_emulated_decoders_have_it_too(tmp_path: Path) -> None:
    supply = {"gpu": "a100-80gb", "replicas": [{"model": "m", "kv_cache_tokens": 4096}]}
    scenario = loaded(tmp_path, {"emulate": "llama-3-8b"}, supply=supply, output=5)
    assert deployment.resolve(scenario).replicas[0].kv_tokens_max == 4096


def test_weights_larger_than_the_slice_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not fit"):
        replica(tmp_path, {"gpu": "a100-80gb", "mig": ["1g.10gb"]}, config=LLAMA_3, size=16 * GIB)


def test_models_without_a_cache_have_none(tmp_path: Path) -> None:
    for supply in ({"gpu": "cpu"}, SLICE):
        scenario = loaded(tmp_path, config=BERT | {"architectures": ["BertModel"]}, size=1000, supply=supply)
        assert deployment.resolve(scenario).replicas[0].kv_tokens_max is None


# --- what is wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"builtin": "embed", "task": "embed"}, "models.m.task: belongs to an ONNX file; allowed: only beside onnx"),
        ({"emulate": "llama-3-8b", "context_tokens_max": 5}, "models.m.context_tokens_max: belongs to an ONNX file"),
        ({"task": "embed"}, "models.m: needs exactly one key; allowed: builtin or onnx or emulate or shape"),
        ({"onnx": "m.onnx", "task": "translate"}, "models.m.task: invalid value (got 'translate'); allowed: classify, embed, generate"),
        ({"onnx": "m.onnx", "context_tokens_max": 0}, "models.m.context_tokens_max: invalid value"),
        ({"onnx": "models/m.onnx", "context_tokens_max": 9999}, "models.m.context_tokens_max: is past the model's positions (got 9999); allowed: at most 512"),
        ({"onnx": "m.onnx", "emulate": "llama-3-8b"}, "needs exactly one key"),
        ({"builtin": "sentiments"}, "models.m.builtin: invalid value (got 'sentiments'); allowed: sentiment, embed"),
    ],
)  # fmt: skip
def test_a_source_that_cannot_be_is_named(tmp_path: Path, source: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        loaded(tmp_path, source, config=BERT)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"), [("{", "not JSON"), ("[]", "not a JSON object"), ("{" * 100_000, "not JSON")]
)
def test_a_config_that_is_none_is_named_with_the_model(tmp_path: Path, text: str, said: str) -> None:
    file = written(tmp_path, {"onnx": "models/m.onnx"})
    (tmp_path / "models" / "config.json").write_text(text)
    with pytest.raises(InputError, match=said) as caught:
        files.load(file)
    assert str(caught.value).startswith(f"{file}:") and "models.m" in str(caught.value)


def test_a_classifier_has_no_kv_cache_to_size(tmp_path: Path) -> None:
    supply = {"gpu": "cpu", "replicas": [{"model": "m", "kv_cache_tokens": 5}]}
    with pytest.raises(InputError, match=r"deployment\.replicas\[0\]\.kv_cache_tokens: m keeps no KV cache \(got 5\)"):
        loaded(tmp_path, supply=supply)


def test_no_shape_of_the_library_is_a_role_short() -> None:
    assert {shape.role for shape in shapes.SHAPES.values()} == {"decoder", "classifier", "embedder"}
