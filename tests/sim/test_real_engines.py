"""Simulated runs against real vLLM on H100s under open-loop load: from shapes, cards and limits alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from benchmarks import real_engines
from benchmarks.real_engines import LIMITS_PERCENT, Compared
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


def test_memory_leaves_as_many_blocks_as_vllm_found(data_file: Callable[[str], Path]) -> None:
    for row in real_engines.read(data_file(TABLE)):
        card = catalog.gpu(row["gpu"])
        vllm = engine.engine_of(engine.EngineSpec(kind="vllm", tensor_parallel_size=int(row["tensor_parallel"])))
        blocks = vllm.kv_tokens(real_engines.shape_of(row), mig.whole(card), key="") / 16
        assert blocks == pytest.approx(int(row["kv_blocks_of_16_tokens"]), rel=0.04), row["model"]
