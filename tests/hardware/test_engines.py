"""What an engine adds to the card's time."""

from __future__ import annotations

import pytest

from gpuplan.hardware import catalog, roofline, shapes
from gpuplan.hardware.engines import TIMES, step_overhead_s

H100, L40S = catalog.gpu("h100"), catalog.gpu("l40s")


def test_the_built_in_engine_adds_what_the_roofline_takes_for_granted() -> None:
    assert step_overhead_s("gpuplan", shapes.shape("llama-2-7b"), H100) == roofline.STEP_OVERHEAD_S
    assert TIMES["gpuplan"].request_s == 0


@pytest.mark.parametrize(("card", "launch_s"), [(H100, 4.965e-6), (L40S, 4.57e-6)])  # an L40S is known by its sheet
def test_vllm_launches_two_more_kernels_in_each_layer(card: catalog.Gpu, launch_s: float) -> None:
    more_s = step_overhead_s("vllm", shapes.shape("llama-2-7b"), card) - roofline.STEP_OVERHEAD_S
    assert more_s == pytest.approx(32 * 2 * launch_s)
