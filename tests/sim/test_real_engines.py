"""Simulated runs against real vLLM on H100s under open-loop load: from shapes, cards and limits alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from benchmarks import real_engines
from benchmarks.real_engines import LIMITS_PERCENT, Compared
from gpuplan.errors import InputError
from gpuplan.hardware import catalog, mig
from gpuplan.scenario import engine

TABLE = "llm-serving/vllm-h100-under-load.csv"
RUNS = ("60", "63", "20260217")


@pytest.fixture
def run(data_file: Callable[[str], Path], request: pytest.FixtureRequest) -> Compared:
    return compared(data_file(TABLE), request.param)


@cache
def compared(file: Path, experiment: str) -> Compared:
    """Two minutes of each stage: the ten of the real runs give the same means within a percent."""
    (row,) = (row for row in real_engines.read(file) if row["experiment"] == experiment)
    return Compared.of({**row, "duration_1_s": "120", "duration_2_s": "120"})


@pytest.mark.parametrize("run", RUNS, indirect=True)
def test_means_are_within_what_was_asked(run: Compared) -> None:
    errors = run.errors_percent()
    for name, limit in LIMITS_PERCENT.items():
        assert abs(errors[name]) < limit, (run.name, name)


@pytest.mark.parametrize("run", RUNS, indirect=True)
def test_gaps_between_generated_tokens_too(run: Compared) -> None:
    """As they follow from what was measured of whole answers and first tokens."""
    assert abs(run.errors_percent()["itl_generated_ms"]) < 6


@pytest.mark.parametrize("run", RUNS, indirect=True)
def test_the_slowest_tenth_of_them_is_a_little_further_off(run: Compared) -> None:
    errors = run.errors_percent()
    assert abs(errors["e2e_p90_ms"]) < 8 and abs(errors["ttft_p90_ms"]) < 10


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("01-ai/Yi-34B", "yi-34b"),
        ("01-ai/Yi-34B-Chat", "yi-34b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("Qwen/Qwen2.5-72B-Instruct", "qwen2.5-72b"),
        ("Qwen/Qwen3-14B", "qwen3-14b"),
        ("Qwen/Qwen3-14B-FP8", "qwen3-14b"),
        ("Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b"),
        ("codellama/CodeLlama-34b-Instruct-hf", "codellama-34b"),
        ("internlm/internlm-20b", "internlm-20b"),
        ("meta-llama/Llama-2-7b-hf", "llama-2-7b"),
        ("meta-llama/Llama-2-13b-hf", "llama-2-13b"),
        ("meta-llama/Llama-2-70b-chat-hf", "llama-2-70b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("meta-llama/Meta-Llama-3-70B", "llama-3-70b"),
        ("meta-llama/Meta-Llama-3.1-70B-Instruct", "llama-3.1-70b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama-3.1-70b"),
        ("RedHatAI/Meta-Llama-3.1-70B-Instruct-FP8-dynamic", "llama-3.1-70b"),
        ("microsoft/phi-2", "phi-2"),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b"),
        ("mistralai/Mistral-Nemo-Instruct-2407", "mistral-nemo"),
        ("mistralai/Mixtral-8x7B-v0.1", "mixtral-8x7b"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"),
        ("mistralai/Mixtral-8x22B-Instruct-v0.1", "mixtral-8x22b"),
    ],
)
def test_models_are_known_by_their_names_on_hugging_face(model: str, name: str) -> None:
    assert real_engines.shape_of({"model": model}).name == name


@pytest.mark.parametrize("model", ["meta-llama/Llama-4-Scout-17B-16E", "01-ai/Yi-34B-200K", "mistralai/Mistral-7B-x"])
def test_no_model_passes_for_another(model: str) -> None:
    with pytest.raises(InputError, match="model shape"):
        real_engines.shape_of({"model": model})


def test_memory_leaves_as_many_blocks_as_vllm_found(data_file: Callable[[str], Path]) -> None:
    for row in real_engines.read(data_file(TABLE)):
        card = catalog.gpu(row["gpu"])
        vllm = engine.engine_of(engine.EngineSpec(kind="vllm", tensor_parallel_size=int(row["tensor_parallel"])))
        blocks = vllm.kv_tokens(real_engines.shape_of(row), mig.whole(card), key="") / 16
        assert blocks == pytest.approx(int(row["kv_blocks_of_16_tokens"]), rel=0.04), row["model"]
