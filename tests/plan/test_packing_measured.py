"""Packing on measured profiles, beside published plans."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from gpuplan.plan.packing import pack
from tests.conftest import REPOSITORY
from tests.plan.test_packing import check

PUBLISHED = {"S1": 2, "S2": 3, "S3": 5, "S4": 7}


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mig_packing", REPOSITORY / "benchmarks" / "mig_packing.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_more_gpus_than_published_and_proven(
    name: str, benchmark: ModuleType, data_file: Callable[[str], Path]
) -> None:
    folder = data_file("mig-profiles/a100-80gb-models.csv").parent
    rows, _ = benchmark.measured(folder)
    assert benchmark.published(folder) == PUBLISHED
    asked = benchmark.question(rows, benchmark.workloads(folder)[name])
    plan = pack(asked)
    check(asked, plan)
    assert len(plan.cards) <= PUBLISHED[name]
    assert plan.proven_optimal
    assert plan.elapsed_s < 5, "the benchmark holds it to one second, on a machine that does nothing else"


def test_throughput_is_counted_for_all_processes_and_zeros_are_left_out(
    benchmark: ModuleType, data_file: Callable[[str], Path]
) -> None:
    rows, dropped = benchmark.measured(data_file("mig-profiles/a100-80gb-models.csv").parent)
    (bert,) = [r for r in rows if (r.model, r.slices, r.batch_size, r.processes) == ("bert", 1, 1, 2)]
    assert bert.capacity_per_s == pytest.approx(2 * 52.42)
    assert len(rows) + len(dropped) == 1747
    assert {row.model for row, _ in dropped} == {"inceptionv3"}
