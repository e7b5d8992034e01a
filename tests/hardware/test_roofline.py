"""What a step costs: never less for more work, and near what real cards took."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuplan.hardware import catalog, mig, roofline, shapes
from gpuplan.hardware.roofline import StepCosts, StepLoad
from gpuplan.hardware.shapes import ModelShape

LLAMA = shapes.shape("llama-3-8b")
H100 = catalog.gpu("h100-80gb")

SLICES = [(card, part) for card in catalog.GPUS.values() for part in (*mig.plain_profiles(card), mig.whole(card))]
LOADS = st.builds(
    StepLoad,
    prefill_tokens=st.integers(0, 100_000),
    attended_pairs=st.integers(0, 10**10),
    decodes=st.integers(0, 4096),
    context_tokens=st.integers(0, 10**7),
    samples=st.integers(0, 4096),
)


@settings(deadline=None)
@given(
    load=LOADS,
    more=st.tuples(
        st.sampled_from(["prefill_tokens", "attended_pairs", "decodes", "context_tokens", "samples"]),
        st.integers(1, 10_000),
    ),
    where=st.sampled_from(SLICES),
    model=st.sampled_from(list(shapes.SHAPES.values())),
)
def test_more_work_never_takes_less_time(
    load: StepLoad, more: tuple[str, int], where: tuple[catalog.Gpu, mig.Profile], model: ModelShape
) -> None:
    field, extra = more
    heavier = StepLoad(**{f: getattr(load, f) + (extra if f == field else 0) for f in load.__struct_fields__})
    costs = StepCosts(model, *where)
    before, after = costs.step_s(load), costs.step_s(heavier)
    assert 0 < before <= after * (1 + 1e-12)
    assert costs.memory_bytes(load) <= costs.memory_bytes(heavier)


def step_s(slice_name: str, load: StepLoad, model: ModelShape = LLAMA, card: catalog.Gpu = H100) -> float:
    part = mig.part(card, slice_name)
    return StepCosts(model, card, part).step_s(load)


@pytest.mark.parametrize(
    "load",
    [
        StepLoad(2048, 2048 * 1024, 0, 0, 1),  # a prompt: multiplications decide
        StepLoad(0, 0, 32, 32 * 500, 32),  # a step of decodes: bytes decide
        StepLoad(1, 1, 0, 0, 1),  # next to nothing
    ],
)
def test_a_smaller_slice_is_slower(load: StepLoad) -> None:
    times = [step_s(name, load) for name in ("1g.10gb", "2g.20gb", "3g.40gb", "7g.80gb")]
    assert times == sorted(times, reverse=True)
    assert times[0] > 1.5 * times[-1]
    assert step_s("4g.40gb", load) < step_s("3g.40gb", load), "as many memory cells, more SMs"
    assert step_s("3g.40gb", load) < 1.1 * step_s("4g.40gb", load), "60 and 64 SMs: near, not 3/4"


def test_a_batch_of_decodes_costs_far_less_than_its_parts() -> None:
    one, many = StepLoad(0, 0, 1, 500, 1), StepLoad(0, 0, 32, 32 * 500, 32)
    assert step_s(mig.WHOLE, many) < 32 * step_s(mig.WHOLE, one) / 10


def test_decoding_reads_the_weights_once_a_step() -> None:
    """One sequence's token takes at least as long as reading the weights at the data sheet's bandwidth."""
    least_s = (LLAMA.weights_bytes - LLAMA.vocabulary * LLAMA.hidden * 2) / H100.bandwidth_bytes_per_s
    assert least_s < step_s(mig.WHOLE, StepLoad(0, 0, 1, 100, 1)) < 2 * least_s


def test_an_empty_step_costs_the_engine_s_overhead() -> None:
    assert step_s(mig.WHOLE, StepLoad(0, 0, 0, 0, 0)) == roofline.STEP_OVERHEAD_S


@pytest.mark.parametrize(
    ("model", "slice_name", "tokens"),
    [
        ("llama-3-8b", "1g.10gb", 0),  # 16 GB of weights in 9.75 GiB
        ("llama-3-8b", "2g.20gb", 29_000),  # (19.62 GiB - 16.06 GB - 1.2 GB) / 131,072 bytes
        ("llama-3-8b", "whole", 523_000),
        ("llama-2-7b", "2g.20gb", 12_000),  # four times the KV heads: 524,288 bytes a token
        ("llama-3-70b", "whole", 0),  # 141 GB of weights
        ("bert-base", "1g.10gb", 512 * 1024),  # keeps no KV: memory is not what limits it
    ],
)
def test_kv_capacity(model: str, slice_name: str, tokens: int) -> None:
    part = mig.part(H100, slice_name)
    assert roofline.kv_capacity_tokens(shapes.shape(model), part) == pytest.approx(tokens, rel=0.02)


@pytest.mark.parametrize(
    ("model", "billions"),
    [("llama-2-7b", 6.7), ("llama-2-13b", 13.0), ("llama-2-70b", 69.0), ("llama-3-8b", 8.0), ("llama-3-70b", 70.6)]
    + [("mistral-7b", 7.2), ("qwen2.5-7b", 7.6), ("bert-base", 0.11), ("minilm-l6", 0.0225)],
)
def test_weights_are_as_many_as_the_model_s_card_says(model: str, billions: float) -> None:
    shape = shapes.shape(model)
    assert shape.weights_bytes / shape.bytes_per_element / 1e9 == pytest.approx(billions, rel=0.03)


def test_a_full_kv_cache_fits_the_slice_to_the_last_token() -> None:
    part = mig.profile(H100, "3g.40gb")
    tokens = roofline.kv_capacity_tokens(LLAMA, part)
    assert roofline.memory_used_bytes(LLAMA, tokens) <= part.memory_bytes
    costs = StepCosts(LLAMA, H100, part)
    assert costs.fits(StepLoad(2048 - 64, 0, 64, tokens - 2048, 64)), "a full cache never fails a step of usual size"
    assert roofline.memory_used_bytes(LLAMA, tokens + 1) > part.memory_bytes


@pytest.mark.parametrize("ways", [2, 4, 8])
def test_cards_together_take_less_time_each_and_more_in_sum(ways: int) -> None:
    load, model = StepLoad(0, 0, 32, 32 * 500, 32), shapes.shape("llama-3-70b")
    h200 = catalog.gpu("h200-141gb")
    alone, shared = (StepCosts(model, h200, mig.whole(h200), tensor_parallel=n) for n in (1, ways))
    assert shared.step_s(load) < alone.step_s(load) < ways * shared.step_s(load)
    assert shared.memory_bytes(load) < alone.memory_bytes(load) / ways * 1.2


def test_processes_that_share_a_slice_share_its_work_and_not_its_launches() -> None:
    bert, part = shapes.shape("bert-base"), mig.profile(H100, "3g.40gb")
    one, three = (StepCosts(bert, H100, part, processes=n) for n in (1, 3))
    short, long = (StepLoad(n, n * 128, 0, 0, n // 128) for n in (128, 128 * 256))
    assert three.step_s(short) < 1.5 * one.step_s(short), "launches go on beside each other"
    assert 2.7 * one.step_s(long) < three.step_s(long) < 3.3 * one.step_s(long), "a full slice is divided"


def test_a_batch_that_does_not_fit_is_told_before_it_is_timed() -> None:
    costs = StepCosts(shapes.shape("bert-base"), H100, mig.profile(H100, "1g.10gb"))
    assert costs.fits(StepLoad(32 * 512, 0, 0, 0, 32))
    assert not costs.fits(StepLoad(2048 * 512, 0, 0, 0, 2048)), "a million tokens' activations"


def test_weights_of_a_byte_halve_the_reading_and_not_the_cache() -> None:
    half = replace(LLAMA, bytes_per_element=1)
    alone = StepLoad(0, 0, 1, 100, 1)
    assert step_s(mig.WHOLE, alone, half) < 0.65 * step_s(mig.WHOLE, alone)
    assert half.kv_bytes_per_token == LLAMA.kv_bytes_per_token


@pytest.mark.parametrize(
    ("card", "slice_name", "linear", "step"),
    [
        ("a100-80gb", mig.WHOLE, (3, 4), (5, 7)),  # operators of that architecture were measured
        ("a100-80gb", "3g.40gb", (4, 6), (7, 9)),  # a slice adds its own error
        ("l40s", mig.WHOLE, (5, 6), (7, 9)),  # nothing but its data sheet
    ],
)
def test_the_band_widens_with_what_was_not_measured(
    card: str, slice_name: str, linear: tuple[int, int], step: tuple[int, int]
) -> None:
    gpu = catalog.gpu(card)
    band = roofline.band(gpu, mig.part(gpu, slice_name))
    assert linear[0] < band.linear_layer_percent < linear[1]
    assert step[0] < band.step_percent < step[1]


# --- against measured operators -----------------------------------------------------------------------------------

LINEAR = ("attn_pre_proj_ms", "attn_post_proj_ms", "mlp_up_proj_ms", "mlp_down_proj_ms")
ELEMENTWISE = ("input_layernorm_ms", "attn_rope_ms", "post_attention_layernorm_ms", "mlp_act_ms", "add_ms")
# Mean absolute errors as measured stand at each row's end: linear operators, whole layer. Constants were fitted on
# these very files; with a model left out its linear error is 2.5, 3.3, 4.3, 3.9 and 5.5 % in this order.
PROFILES = [
    ("a100-codellama-34b-instruct-hf", 0.025, 0.025),  # 2.2 %, 2.2 %
    ("a100-internlm-20b", 0.033, 0.033),  # 2.9 %, 2.9 %
    ("a100-llama-2-7b-hf", 0.04, 0.04),  # 3.8 %, 3.7 %
    ("h100-llama-2-7b-hf", 0.04, 0.04),  # 3.4 %, 3.4 %
    ("h100-llama-2-70b-hf", 0.05, 0.045),  # 4.7 %, 4.1 %
]


@pytest.mark.parametrize(("name", "linear_error", "layer_error"), PROFILES)
def test_a_layer_takes_what_real_cards_measured(
    name: str, linear_error: float, layer_error: float, data_file: Callable[[str], Path]
) -> None:
    """1 to 4096 tokens, tensor parallel 1, 2, 4 and 8. A layer is the difference between two layers and one."""
    card = catalog.gpu(name.split("-")[0])
    with data_file(f"gpu-profiles/{name}.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if int(r["num_tokens"]) <= 4096]
    assert len(rows) > 1000

    def error(columns: tuple[str, ...], predicted_s: Callable[[StepCosts, int], float]) -> float:
        return fmean(
            abs(
                predicted_s(costs_of(row, card), int(row["num_tokens"])) * 1e3 / sum(float(row[c]) for c in columns) - 1
            )
            for row in rows
        )

    assert error(LINEAR, StepCosts.linear_layer_s) < linear_error
    assert error((*LINEAR, *ELEMENTWISE), layer_s) < layer_error


KV_BYTES = {"vllm": 2, "trtllm": 1}  # vLLM's default beside fp8 weights, and TensorRT-LLM's fp8 recipe


def test_tokens_of_a_served_70b_model_take_what_real_engines_measured(data_file: Callable[[str], Path]) -> None:
    """TPOT on H200 at 132 points of lengths, concurrency and tensor parallelism: 6.0 % off on average after one
    constant for each engine. A decode step at the mean context, and a share of the other sequences' prompts."""
    card = catalog.gpu("h200-141gb")
    ratios: dict[str, list[tuple[float, float]]] = {"vllm": [], "trtllm": []}
    with data_file("llm-serving/llama-3.1-70b-h200.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            ways, engine = int(float(row["tensor_parallel"])), row["backend"]
            kv_bytes = KV_BYTES[engine]
            model = replace(shapes.shape("llama-3.1-70b"), bytes_per_element=1, kv_bytes_per_element=kv_bytes)
            costs = StepCosts(model, card, mig.whole(card), tensor_parallel=ways)
            prompt, output = int(row["prompt_tokens"]), int(row["output_tokens"])
            context = prompt + output // 2
            free = ways * (0.9 * card.memory_bytes - roofline.RUNTIME_MEMORY_BYTES) - model.weights_bytes
            running = min(int(float(row["concurrency"])), max(int(free / model.kv_bytes_per_token / context), 1))
            token_s = costs.step_s(StepLoad.of_decodes(running, context))
            token_s += (running - 1) / output * costs.step_s(StepLoad.of_prompt(prompt))
            ratios[engine].append((token_s - roofline.STEP_OVERHEAD_S, float(row["tpot_ms"]) / 1e3))
    overheads = {"vllm": 1.4e-3, "trtllm": 0.0}
    errors = [abs((told + overheads[e]) / seen - 1) for e, pairs in ratios.items() for told, seen in pairs]
    assert len(errors) == 132
    assert fmean(errors) < 0.07


def layer_s(costs: StepCosts, tokens: int) -> float:
    """A layer of a prompt without attention and without what cards exchange: what the files hold."""
    return costs.linear_layer_s(tokens) + costs.elementwise_layer_s(tokens)


@cache
def _costs(card: catalog.Gpu, ways: int, sizes: tuple[int, ...], gated: bool) -> StepCosts:
    hidden, heads, kv_heads, ffn = sizes
    one = ModelShape("x", "decoder", 1, hidden, heads, kv_heads, ffn, gated, 32000, 4096)
    return StepCosts(one, card, mig.whole(card), tensor_parallel=ways)


def costs_of(row: dict[str, str], card: catalog.Gpu) -> StepCosts:
    sizes = tuple(int(row[c]) for c in ("n_embd", "n_head", "n_kv_head", "n_expanded_embd"))
    return _costs(card, int(row["tensor_parallel"]), sizes, row["use_gated_mlp"] == "True")
