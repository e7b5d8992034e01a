"""Mixtures of experts: what a step's tokens touch, compute and hold, and near what real kernels took."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import fused_experts
from benchmarks.fused_experts import KERNELS, SERVED, Kernels
from gpuplan.hardware import catalog, matmul, mig, roofline, shapes
from gpuplan.hardware.experts import Experts
from gpuplan.hardware.roofline import StepCosts, StepLoad
from gpuplan.hardware.shapes import ModelShape

H100 = catalog.gpu("h100-80gb")
MIXTRAL = shapes.shape("mixtral-8x7b")
MIXTURES = [shape for shape in shapes.SHAPES.values() if shape.is_mixture]


def costs_of(model: ModelShape, ways: int = 1) -> StepCosts:
    return StepCosts(model, H100, mig.whole(H100), tensor_parallel=ways)


@pytest.mark.parametrize(("count", "per_token"), [(8, 2), (128, 8), (4, 4)])
def test_one_token_touches_as_many_experts_as_it_goes_through(count: int, per_token: int) -> None:
    experts = Experts(count, per_token, ())
    assert experts.touched(1) == pytest.approx(per_token)
    assert experts.touched(10_000) == pytest.approx(count)
    assert np.all(np.diff(experts.touched(np.arange(1, 300))) >= 0)


def test_tokens_that_choose_at_random_touch_as_many_as_expected() -> None:
    chosen = np.random.default_rng(7).random((2000, 12, 8)).argsort(axis=-1)[..., :2]
    touched = fmean(len(np.unique(one)) for one in chosen)
    assert Experts(8, 2, ()).touched(12) == pytest.approx(touched, rel=0.01)


@pytest.mark.parametrize("model", MIXTURES, ids=lambda model: model.name)
def test_one_token_reads_its_own_experts_and_no_others(model: ModelShape) -> None:
    """So it takes longer than reading them at the data sheet's pace, and far less than reading all of them."""
    head_bytes = 2 * model.vocabulary * model.hidden
    active_s = (2 * model.layers * model.active_layer_parameters + head_bytes) / H100.bandwidth_bytes_per_s
    token_s = costs_of(model).step_s(StepLoad.of_decodes(1, 1))
    small_kernels_s = model.layers * 75e-6
    assert active_s < token_s < 1.2 * active_s + small_kernels_s
    assert token_s < 0.7 * model.weights_bytes / H100.bandwidth_bytes_per_s


@pytest.mark.parametrize("model", MIXTURES, ids=lambda model: model.name)
def test_many_tokens_read_all_experts_once_and_compute_with_their_own(model: ModelShape) -> None:
    costs = costs_of(model)
    all_s = 2 * model.layers * model.layer_parameters / H100.bandwidth_bytes_per_s
    assert all_s < costs.step_s(StepLoad.of_decodes(256, 1)) < 2 * all_s
    tokens = 65536
    compute_s = 2 * tokens * model.active_layer_parameters / H100.flops.fp16
    assert compute_s < costs.linear_layer_s(tokens) < 2.5 * compute_s


def test_what_binds_is_told_by_the_experts_that_are_touched() -> None:
    assert costs_of(MIXTRAL).cost(StepLoad.of_decodes(64, 100)).bound == "memory"
    assert costs_of(MIXTRAL).cost(StepLoad.of_prompt(600)).bound == "memory", "compute, were it dense"
    assert costs_of(MIXTRAL).cost(StepLoad.of_prompt(4096)).bound == "compute"


@pytest.mark.parametrize("shared_ffn", [0, 512])
@settings(deadline=None, max_examples=50)
@given(tokens=st.integers(1, 5000), more=st.integers(1, 500), experts=st.integers(2, 130), of=st.integers(1, 9))
def test_more_tokens_or_choices_never_take_less(shared_ffn: int, tokens: int, more: int, experts: int, of: int) -> None:
    of = min(of, experts)
    model = replace(MIXTRAL, ffn=768, experts=experts, experts_per_token=of, shared_ffn=shared_ffn)
    layer_s = costs_of(model).linear_layer_s
    assert layer_s(tokens) <= layer_s(tokens + more) * (1 + 1e-12)
    if of < experts:
        busier = costs_of(replace(model, experts_per_token=of + 1))
        assert layer_s(tokens) <= busier.linear_layer_s(tokens) * (1 + 1e-12)
    if not shared_ffn:
        assert layer_s(tokens) < costs_of(replace(model, shared_ffn=64)).linear_layer_s(tokens)


@given(tokens=st.integers(1, 3000), context=st.integers(0, 100_000))
def test_one_expert_is_a_dense_model(tokens: int, context: int) -> None:
    dense = shapes.shape("mistral-7b")
    single = replace(dense, experts=1, experts_per_token=1)
    load = StepLoad(tokens, tokens * tokens // 2, 3, context, 4)
    assert not single.is_mixture
    assert single.weights_bytes == dense.weights_bytes
    assert costs_of(single).cost(load) == costs_of(dense).cost(load)


def test_a_grouped_product_of_one_matrix_is_a_product() -> None:
    costs, constants = costs_of(MIXTRAL), roofline.CONSTANTS["hopper"].linear
    sizes = [np.array([1.0, 65.0, 700.0]), np.array([4096.0] * 3), np.array([1024.0] * 3)]
    means = matmul.Means(H100.flops.fp16, H100.flops.fp16, H100.bandwidth_bytes_per_s, H100.sm_count)
    plain, grouped, eight = (
        matmul.seconds(*sizes, element_bytes=2, means=means, constants=constants, **matrices)
        for matrices in ({}, {"matrices": np.ones(3)}, {"matrices": np.full(3, 8.0)})
    )
    assert np.array_equal(plain, grouped)
    assert np.all(eight > plain)
    assert costs.experts_layer_s(1) < costs.linear_layer_s(1)


def test_all_experts_are_held_though_few_are_met() -> None:
    dense = replace(MIXTRAL, experts=0, experts_per_token=0)
    assert MIXTRAL.weights_bytes > 6 * dense.weights_bytes
    assert MIXTRAL.active_layer_parameters < 2 * dense.active_layer_parameters < MIXTRAL.layer_parameters
    load = StepLoad.of_decodes(8, 100)
    assert costs_of(MIXTRAL).memory_bytes(load) > costs_of(replace(MIXTRAL, experts=2)).memory_bytes(load)
    assert roofline.kv_capacity_tokens(MIXTRAL, mig.whole(H100)) == 0, "93 GB do not fit one card"


@pytest.mark.parametrize("ways", [2, 4, 8])
def test_experts_are_split_along_their_ffn(ways: int) -> None:
    part = costs_of(replace(MIXTRAL, ffn=MIXTRAL.ffn // ways))
    for tokens in (1, 64, 2048):
        assert costs_of(MIXTRAL, ways).experts_layer_s(tokens) == part.experts_layer_s(tokens)
        assert part.experts_layer_s(tokens) < costs_of(MIXTRAL).experts_layer_s(tokens)


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [("mixtral-8x7b", 46.7, 12.9), ("mixtral-8x22b", 140.6, 39.1), ("qwen3-30b-a3b", 30.5, 3.3)],
)
def test_weights_are_as_many_as_the_model_s_card_says(name: str, billions: float, active: float) -> None:
    model = shapes.shape(name)
    met = model.layers * model.active_layer_parameters + 2 * model.vocabulary * model.hidden
    assert model.weights_bytes / 2e9 == pytest.approx(billions, rel=0.005)
    assert met / 1e9 == pytest.approx(active, rel=0.02)


# --- against what was measured ------------------------------------------------------------------------------------

ERRORS = dict(zip((kernels.name for kernels in KERNELS), (0.025, 0.075, 0.09, 0.08, 0.03), strict=True))


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.name)
def test_experts_take_what_real_kernels_took(kernels: Kernels) -> None:
    assert fmean(abs(error) for _, _, error in kernels.errors()) < ERRORS[kernels.name]


def test_the_band_of_a_mixture_is_what_its_measurements_give() -> None:
    kernels = fmean(abs(error) for one in KERNELS for _, _, error in one.errors())
    served = fmean(abs(fmean(one.errors())) for one in SERVED)
    assert 100 * kernels == pytest.approx(roofline.EXPERTS_PERCENT, abs=0.1)
    assert 100 * served == pytest.approx(roofline.EXPERTS_SERVED_PERCENT, abs=0.2)
    dense, mixture = (roofline.band(H100, mig.whole(H100), model) for model in (shapes.shape("mistral-7b"), MIXTRAL))
    assert dense == roofline.band(H100, mig.whole(H100))
    assert mixture.step_percent > 2 * dense.step_percent
    assert mixture.linear_layer_percent > dense.linear_layer_percent
    assert "mixtures of experts" in mixture.of_steps and "mixtures" not in dense.of_steps


def test_the_benchmark_says_what_it_compared(capsys: pytest.CaptureFixture[str]) -> None:
    fused_experts.main()
    assert "kernels, all 47 points: 5.6 %" in capsys.readouterr().out
