"""What a step costs: an estimate in seconds from a model's shape and a slice's means.

A step runs `prefill_tokens` new prompt tokens and one token for each of `decodes` sequences through every layer.
Each linear operator takes `(compute^p + memory^p)^(1/p)`, a smooth maximum of the time its multiplications and its
bytes need (Williams et al., Roofline, CACM 2009), plus a launch. Attention, norms and activations are bytes and
multiplications on top. A slice computes with its own SMs and reads with its own memory cells: on an H100 a 3g slice
has 60 of 132 SMs but 4 of 8 cells, so 'slices / 7' would be wrong twice.

The constants below were fitted on published per-operator times of A100 and H100 (microsoft/vidur, MIT; 1 to 4096
tokens, tensor parallel 1): mean absolute error 4.0 % on ampere, 6.1 % on hopper, for linear operators on a whole
card. Ada and Turing have no measurements behind them: they use ampere's and say `fitted=False`.
"""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import Struct

from gpuplan.hardware.catalog import Gpu
from gpuplan.hardware.profiles import Profile
from gpuplan.hardware.shapes import ModelShape


class StepLoad(Struct, frozen=True):
    """What one step carries. `attended_pairs` counts (query, key) pairs of the prefill; `context_tokens` is the sum
    of the contexts that the decodes read; `samples` is how many rows need the output head."""

    prefill_tokens: int
    attended_pairs: int
    decodes: int
    context_tokens: int
    samples: int


@dataclass(frozen=True, slots=True)
class Constants:
    """One set per architecture, none per model."""

    compute_efficiency: float
    memory_efficiency: float
    sharpness: float
    operator_launch_s: float
    layer_overhead_s: float
    elementwise_passes: float
    fitted: bool


CONSTANTS = {
    "ampere": Constants(0.727, 0.819, 1.56, 3.0e-6, 19e-6, 1.78, True),
    "ampere-ga102": Constants(0.727, 0.819, 1.56, 3.0e-6, 19e-6, 1.78, False),
    "hopper": Constants(0.721, 0.977, 1.55, 7.9e-6, 16e-6, 1.54, True),
    "blackwell": Constants(0.721, 0.977, 1.55, 7.9e-6, 16e-6, 1.54, False),
    "blackwell-gb202": Constants(0.727, 0.819, 1.56, 3.0e-6, 19e-6, 1.78, False),
    "ada": Constants(0.727, 0.819, 1.56, 3.0e-6, 19e-6, 1.78, False),
    "turing": Constants(0.727, 0.819, 1.56, 3.0e-6, 19e-6, 1.78, False),
}

# Attention kernels reach about half of the matrix units' peak (Dao, FlashAttention-2, 2023: 50 to 73 % on A100).
ATTENTION_COMPUTE_EFFICIENCY = 0.5
# Host work between steps of a serving engine (scheduling, sampling): vLLM's authors report 1 to 5 ms before 2024,
# well under 1 ms since its v1 engine.
STEP_OVERHEAD_S = 0.4e-3
# CUDA context, workspace and activations that neither weights nor KV cache account for.
RUNTIME_MEMORY_BYTES = 1_200_000_000


def step_time_s(model: ModelShape, card: Gpu, part: Profile, load: StepLoad) -> float:
    """Seconds that one step takes on a slice (or a whole card) of `card`."""
    k = CONSTANTS[card.architecture]
    size = model.bytes_per_element
    flops_per_s = card.flops_per_s * part.sm_count / card.sm_count
    bytes_per_s = card.bandwidth_bytes_per_s * part.width / part.cells
    tokens = load.prefill_tokens + load.decodes
    if tokens == 0:
        return STEP_OVERHEAD_S

    def linear(parameters: float, rows: int, activations: float) -> float:
        compute_s = 2.0 * parameters * rows / (flops_per_s * k.compute_efficiency)
        memory_s = (parameters + rows * activations) * size / (bytes_per_s * k.memory_efficiency)
        return float((compute_s**k.sharpness + memory_s**k.sharpness) ** (1.0 / k.sharpness))

    hidden, ffn = model.hidden, model.ffn
    kv_row = 2 * model.kv_heads * (hidden // model.heads)
    operators_s = linear(model.layer_parameters, tokens, 5 * hidden + kv_row + 3 * ffn) + 4 * k.operator_launch_s
    elementwise_s = k.elementwise_passes * tokens * (11 * hidden + 3 * ffn) * size / bytes_per_s + k.layer_overhead_s
    attention_s = 4.0 * load.attended_pairs * hidden / (flops_per_s * ATTENTION_COMPUTE_EFFICIENCY)
    attention_s += load.context_tokens * kv_row * size / (bytes_per_s * k.memory_efficiency)
    layers_s = model.layers * (operators_s + elementwise_s + attention_s)
    head_s = linear(model.vocabulary * hidden, load.samples, hidden + model.vocabulary) if load.samples else 0.0
    return layers_s + (head_s if model.role == "decoder" else 0.0) + STEP_OVERHEAD_S


def kv_capacity_tokens(model: ModelShape, part: Profile) -> int:
    """How many tokens of KV cache fit beside the weights; 0 when the model does not fit at all.

    For a model without a KV cache: its context limit times a large batch when the weights fit, so that memory is
    never what limits it.
    """
    free_bytes = part.memory_bytes - model.weights_bytes - RUNTIME_MEMORY_BYTES
    if free_bytes <= 0:
        return 0
    if model.kv_bytes_per_token == 0:
        return model.context_tokens_max * 1024
    return free_bytes // model.kv_bytes_per_token


def memory_used_bytes(model: ModelShape, kv_tokens: int) -> int:
    """Weights, runtime and the KV cache of `kv_tokens` tokens."""
    return model.weights_bytes + RUNTIME_MEMORY_BYTES + kv_tokens * model.kv_bytes_per_token
