"""What a step costs: an estimate in seconds and bytes from a model's shape and a slice's means.

A step runs `prefill_tokens` new prompt tokens and one token for each of `decodes` sequences through every layer: four
matrix multiplications (`matmul`; those of a mixture's experts in groups), attention, and what is neither. A slice
computes with its own SMs and reads with its own memory cells: on an H100 a 3g slice has 60 of 132 SMs but 4 of 8 cells,
so 'slices / 7' would be wrong twice. With tensor parallelism every card does its share of each layer, and the cards add
up their results twice a layer.

Constants are per architecture, none per model. `band` says how far off measurements have been, and must stand beside
every number that comes from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import hypot
from typing import Literal

from msgspec import Struct

from gpuplan.hardware import matmul, slices
from gpuplan.hardware.catalog import Gpu
from gpuplan.hardware.experts import Experts
from gpuplan.hardware.matmul import Constants, Means
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

    @property
    def tokens(self) -> int:
        """Rows of every linear operator."""
        return self.prefill_tokens + self.decodes

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV cache that it reads and writes."""
        return self.context_tokens + self.tokens

    @classmethod
    def of_prompt(cls, tokens: int) -> StepLoad:
        """A whole prompt, and the first token after it."""
        return cls(tokens, tokens * (tokens + 1) // 2, 0, 0, 1)

    @classmethod
    def of_decodes(cls, sequences: int, context: int) -> StepLoad:
        """One token for each of `sequences`, which have read and written `context` tokens before."""
        return cls(0, 0, sequences, sequences * context, sequences)


@dataclass(frozen=True, slots=True)
class Band:
    """How far estimates of this kind have been off, in percent of what was measured and on average."""

    linear_layer_percent: float
    step_percent: float
    basis: str

    @property
    def of_steps(self) -> str:
        """The band of whole steps in words."""
        return f"estimates from {self.basis}; where checked, off by {self.step_percent:g} % on average"


@dataclass(frozen=True, slots=True)
class Cost:
    """What one step takes: of one layer its linear operators, its attention, what is neither, and adding up over cards;
    then the output head and the whole step, with what an engine does between steps. `bound` says what the linear
    operators would wait for at the data sheet's pace. `memory_bytes` are held on each card."""

    linear_layer_s: float
    attention_layer_s: float
    elementwise_layer_s: float
    all_reduce_layer_s: float
    head_s: float
    step_s: float
    bound: Literal["compute", "memory"]
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Architecture:
    """What is the same on all cards of an architecture: the constants of its matrix multiplications, and for the rest
    of a layer the launches and how often its bytes go over the memory bus."""

    linear: Constants
    elementwise_launch_s: float
    elementwise_passes: float


CONSTANTS = {
    "ampere": Architecture(Constants(1.239, 0.845, 4.396e-6, 69.86, 0.220, 3.0e-6, 230e-6, 0.254), 22.0e-6, 2.13),
    "hopper": Architecture(Constants(0.850, 0.961, 4.965e-6, 77.5, 0.005, 0.0, 1120e-6, 0.136), 17.3e-6, 1.95),
}
UNMEASURED = Architecture(Constants(0.98, 0.90, 4.57e-6, 74.3, 0.11, 1.15e-6, 392e-6, 0.16), 20.0e-6, 2.04)
"""For a card known by its data sheet alone: one set fitted on both architectures, 3.8 % off on average there."""

FP16_BYTES = 2
# Attention kernels reach about half of the matrix units' peak (Dao, FlashAttention-2, 2023: 50 to 73 % on A100).
ATTENTION_COMPUTE_EFFICIENCY = 0.5
# What a serving engine does between steps (scheduling, sampling): an assumption, to be fitted where steps were
# measured. Published figures reach from 5 ms (vLLM before 2024) to some tenths of a millisecond.
STEP_OVERHEAD_S = 0.4e-3
# What neither weights nor KV cache account for: CUDA context and workspace, and activations, of which so much is kept
# free (2048 tokens of a 70B model). Engines reserve them before they size their KV cache.
RUNTIME_MEMORY_BYTES = 1_200_000_000
ACTIVATIONS_KEPT_FREE_BYTES = 700_000_000
# An all-reduce over NVLink: a start (vllm-project/vllm#24532 has 10 us for 0.5 MB on four cards), and the share that
# large ones reach of the links' bandwidth, which sheets give for both directions together: 366 of 900 GB/s on four
# H100s (waynehacking8, nccl-collectives-bench, 2026).
ALL_REDUCE_START_S = 8e-6
ALL_REDUCE_EFFICIENCY = 0.41
# Mean absolute errors by `benchmarks/emulator_fidelity.py`. Linear operators: with the model left out of the fit, and
# with the whole architecture left out. Steps: TPOT of a served 70B model on H200, after one constant for each engine,
# which is not known beforehand; what the other errors add is added in squares. Slices: 2g, 3g, 4g from 1g and 7g.
LEFT_OUT_PERCENT = {"ampere": 3.4, "hopper": 4.5}
UNMEASURED_PERCENT = 5.2
SERVED_PERCENT = 6.0
SLICE_PERCENT = 3.8
# What mixtures of experts add, by `benchmarks/fused_experts.py`: of kernels over all points, of served steps the mean
# over two runs of one model.
EXPERTS_PERCENT = 5.6
EXPERTS_SERVED_PERCENT = 15.0
BLOCK_TOKENS = 256
"""Linear operators are costed for this many row counts at once: one call of numpy instead of hundreds."""
EXPERT_LAUNCHES = 3
"""Kernels around a mixture's experts in each layer: choosing them (top k), sorting tokens by expert, adding up results.
Counted in vLLM's `fused_moe`, not fitted. The router's product comes on top."""


class StepCosts:
    """The cost of steps of `model` on one slice, or on `tensor_parallel` slices of the same kind together.

    `processes` busy ones share the slice (MPS), this model's among them: each has its share of the SMs and of the
    bandwidth while it computes, and all of the time in which another launches. Neighbours are taken to be busy.
    `overhead_s` is what the engine adds to every step (`engines`). Where KV cache is kept `in_blocks`, sequences share
    some, and whoever gives the blocks out sees to it that there are no more than fit.
    """

    def __init__(
        self,
        model: ModelShape,
        card: Gpu,
        part: Profile,
        *,
        tensor_parallel: int = 1,
        processes: int = 1,
        overhead_s: float = STEP_OVERHEAD_S,
        in_blocks: bool = False,
    ) -> None:
        share = (1 - slices.neighbour_loss(card, part)) / processes
        sms, cells = share * part.sm_count / card.sm_count, share * part.width / part.cells
        self._model, self._part, self._overhead_s, self._in_blocks = model, part, overhead_s, in_blocks
        self._ways, self._processes, self._link_bytes_per_s = tensor_parallel, processes, card.link_bytes_per_s
        self._architecture = CONSTANTS.get(card.architecture, UNMEASURED)
        self._flops_per_s = card.flops.at(model.bytes_per_element) * sms
        self._bytes_per_s = card.bandwidth_bytes_per_s * cells
        l2_pace = sms * matmul.l2_pace(card.flops.fp16, card.sm_count, card.sm_clock_hz)
        self._means = Means(self._flops_per_s, l2_pace, self._bytes_per_s, part.sm_count)
        hidden, ways = model.hidden, tensor_parallel
        queries, keys = model.heads * model.head // ways, max(model.kv_heads // ways, 1) * model.head
        ffn, shared_ffn, ups = model.ffn // ways, model.shared_ffn // ways, 2 if model.gated_ffn else 1
        attention = ((queries + 2 * keys, hidden), (hidden, queries))
        feed_forward = ((ups * ffn, hidden), (hidden, ffn))
        self._layer: tuple[tuple[int, int], ...] = (*attention, *feed_forward)
        self._experts: Experts | None = None
        if model.is_mixture:
            # The router is whole on every card; experts are split along their FFN like a dense one.
            self._layer = (*attention, (model.experts, hidden))
            if shared_ffn:
                self._layer = (*self._layer, (ups * shared_ffn, hidden), (hidden, shared_ffn))
            self._experts = Experts(model.experts, model.experts_per_token, feed_forward)
        self._head = ((model.vocabulary // ways, hidden),)
        self._queries, self._keys, self._layers = queries, keys, model.layers
        efficiency = self._architecture.linear.memory_efficiency
        self._pair_s = 4.0 * queries / (self._flops_per_s * ATTENTION_COMPUTE_EFFICIENCY)
        self._context_token_s = 2 * keys * model.kv_bytes_per_element / (self._bytes_per_s * efficiency)
        self._weights_bytes, self._kv_bytes = model.weights_bytes, model.kv_bytes_per_token
        # Kept, as a simulation asks for the same few counts millions of times.
        self._by_tokens_s: dict[int, float] = {}
        self._by_samples_s: dict[int, float] = {}
        # Two norms and two additions of the residual stream, the rotation of queries and keys, and the activation.
        # A mixture's tokens have several activations each, and their results are added up.
        self._elementwise_launches_s = self._architecture.elementwise_launch_s
        activated, gathered = ffn, 0
        if self._experts is not None:
            self._elementwise_launches_s += EXPERT_LAUNCHES * self._architecture.linear.launch_s
            activated, gathered = ffn * model.experts_per_token + shared_ffn, model.experts_per_token * hidden
        self._elementwise_bytes_per_token = FP16_BYTES * (7 * hidden + 2 * (queries + keys) + 3 * activated + gathered)

    def cost(self, load: StepLoad) -> Cost:
        """All that is known of a step of at least one token."""
        tokens = load.tokens
        weights = sum(columns * inner for columns, inner in self._layer)
        active = read = float(weights)
        if self._experts is not None:
            active += self._experts.per_token * self._experts.weights
            read += self._experts.touched(tokens) * self._experts.weights
        compute_s = 2 * active * tokens / self._flops_per_s
        memory_s = read * self._model.bytes_per_element / self._bytes_per_s
        return Cost(
            self.linear_layer_s(tokens),
            self.attention_layer_s(load),
            self.elementwise_layer_s(tokens),
            2 * self._all_reduce_s(tokens),
            self._head_s(load.samples),
            self.step_s(load),
            "compute" if compute_s > memory_s else "memory",
            self.memory_bytes(load),
        )

    def memory_bytes(self, load: StepLoad) -> int:
        """Bytes held on each card during a step: weights, runtime, the KV cache it works on, and activations beyond
        those that the runtime keeps room for."""
        tokens = load.prefill_tokens + load.decodes
        kv_bytes = (load.context_tokens + tokens) * self._kv_bytes
        resident = RUNTIME_MEMORY_BYTES + (self._weights_bytes + kv_bytes) // self._ways
        activations = tokens * self._elementwise_bytes_per_token
        return resident + max(activations - ACTIVATIONS_KEPT_FREE_BYTES, 0)

    def fits(self, load: StepLoad) -> bool:
        """Whether the step's memory fits this process's share of the slice: if not, a real card would be out of memory.

        Of a decoder only activations can be too many, and of more than 2048 tokens a step at that: its KV cache was
        reserved when the request was admitted.
        """
        return self._in_blocks or self.memory_bytes(load) <= self._part.memory_bytes // self._processes

    def step_s(self, load: StepLoad) -> float:
        """Seconds of one step. Never less for more work."""
        tokens = load.prefill_tokens + load.decodes
        if tokens == 0:
            return self._overhead_s
        by_tokens_s = self._by_tokens_s.get(tokens)
        if by_tokens_s is None:
            by_tokens_s = (
                self.linear_layer_s(tokens) + self.elementwise_layer_s(tokens) + 2 * self._all_reduce_s(tokens)
            )
            self._by_tokens_s[tokens] = by_tokens_s
        layers_s = self._layers * (by_tokens_s + self.attention_layer_s(load))
        return layers_s + self._head_s(load.samples) + self._overhead_s

    def linear_layer_s(self, tokens: int) -> float:
        """Seconds of one layer's linear operators: QKV, attention output, and the FFN's up and down. Of a mixture: its
        router too, and up and down of all experts that the tokens meet."""
        seconds = self._linear_s(self._layer, tokens)
        return seconds if self._experts is None else seconds + self.experts_layer_s(tokens)

    def experts_layer_s(self, tokens: int) -> float:
        """Seconds of one layer's experts: up and down, each a single kernel over all that the tokens meet. 0: dense."""
        if self._experts is None:
            return 0.0
        block, at = divmod(tokens - 1, BLOCK_TOKENS)
        element_bytes, constants = self._model.bytes_per_element, self._architecture.linear
        return _experts_block(self._experts, block, element_bytes, self._means, constants)[at]

    def attention_layer_s(self, load: StepLoad) -> float:
        """Seconds of one layer's attention: multiplications for the prompts, the KV cache's bytes for the decodes."""
        return self._pair_s * load.attended_pairs + self._context_token_s * load.context_tokens

    def elementwise_layer_s(self, tokens: int) -> float:
        """Seconds of what is neither in one layer: norms, additions, rotations, the activation."""
        k, p = self._architecture, matmul.STRUCTURE.sharpness
        bytes_s = k.elementwise_passes * tokens * self._elementwise_bytes_per_token / self._bytes_per_s
        return float((self._elementwise_launches_s**p + bytes_s**p) ** (1 / p))

    def _head_s(self, samples: int) -> float:
        seconds = self._by_samples_s.get(samples)
        if seconds is None:
            seconds = self._linear_s(self._head, samples) if samples and self._model.role == "decoder" else 0.0
            self._by_samples_s[samples] = seconds
        return seconds

    def _linear_s(self, operators: tuple[tuple[int, int], ...], rows: int) -> float:
        block, at = divmod(rows - 1, BLOCK_TOKENS)
        return _linear_block(operators, block, self._model.bytes_per_element, self._means, self._architecture.linear)[
            at
        ]

    def _all_reduce_s(self, tokens: int) -> float:
        if self._ways == 1:
            return 0.0
        moved_bytes = 2 * (self._ways - 1) / self._ways * tokens * self._model.hidden * FP16_BYTES
        return ALL_REDUCE_START_S + moved_bytes / (self._link_bytes_per_s * ALL_REDUCE_EFFICIENCY)


@lru_cache(maxsize=8192)
def _experts_block(
    experts: Experts, block: int, element_bytes: float, means: Means, constants: Constants
) -> tuple[float, ...]:
    """Seconds of the experts' operators, each one grouped product, for the token counts of one block."""
    import numpy as np

    tokens = np.arange(block * BLOCK_TOKENS + 1, (block + 1) * BLOCK_TOKENS + 1)[:, None]
    columns, inner = np.array(experts.operators).T
    each_s = matmul.seconds(
        *np.broadcast_arrays(tokens * experts.per_token, columns, inner),
        element_bytes=element_bytes,
        means=means,
        constants=constants,
        matrices=experts.touched(tokens),
    )
    return tuple(each_s.sum(axis=-1).tolist())


@lru_cache(maxsize=8192)
def _linear_block(
    operators: tuple[tuple[int, int], ...], block: int, element_bytes: float, means: Means, constants: Constants
) -> tuple[float, ...]:
    """Seconds of these (columns, inner) operators together, for the row counts of one block."""
    import numpy as np

    rows = np.arange(block * BLOCK_TOKENS + 1, (block + 1) * BLOCK_TOKENS + 1)[:, None]
    columns, inner = np.array(operators).T
    each_s = matmul.seconds(
        *np.broadcast_arrays(rows, columns, inner), element_bytes=element_bytes, means=means, constants=constants
    )
    return tuple(each_s.sum(axis=-1).tolist())


def band(card: Gpu, part: Profile, model: ModelShape | None = None) -> Band:
    """How far estimates for this card, slice and model (None: a dense one) are to be trusted."""
    measured = LEFT_OUT_PERCENT.get(card.architecture)
    sliced = SLICE_PERCENT if part.width < part.cells else 0.0
    mixture = model is not None and model.is_mixture
    linear = hypot(measured or UNMEASURED_PERCENT, sliced, EXPERTS_PERCENT if mixture else 0.0)
    step = hypot(SERVED_PERCENT, sliced, 0.0 if measured else UNMEASURED_PERCENT)
    basis = f"measurements of {card.architecture} cards" if measured else "the data sheet alone"
    if mixture:
        step = hypot(step, EXPERTS_SERVED_PERCENT)
        basis += ", for mixtures of experts from their kernels and one served model"
    return Band(round(linear, 1), round(step, 1), basis)


def kv_capacity_tokens(model: ModelShape, part: Profile, *, processes: int = 1) -> int:
    """How many tokens of KV cache fit beside the weights of one of `processes` on a slice; 0 when the model does not
    fit at all.

    For a model without a KV cache: its context limit times a large batch when the weights fit, so that memory is
    never what limits it.
    """
    free_bytes = part.memory_bytes // processes - model.weights_bytes - RUNTIME_MEMORY_BYTES
    if free_bytes <= 0:
        return 0
    if model.kv_bytes_per_token == 0:
        return model.context_tokens_max * 1024
    return free_bytes // model.kv_bytes_per_token


def memory_used_bytes(model: ModelShape, kv_tokens: int, *, tensor_parallel: int = 1) -> int:
    """Runtime, and a card's share of the weights and of the KV cache of `kv_tokens` tokens."""
    return RUNTIME_MEMORY_BYTES + (model.weights_bytes + kv_tokens * model.kv_bytes_per_token) // tensor_parallel
