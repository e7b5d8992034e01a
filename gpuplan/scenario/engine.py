"""The engine of a deployment: the file's `deployment.engine` with nothing left to default.

The built-in engine has the limits of `batching` and reserves a request's whole KV cache when it starts. `vllm` takes
its limits by vLLM's names and keeps its KV cache in blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gpuplan.errors import InputError
from gpuplan.hardware import profiles, roofline
from gpuplan.hardware.catalog import GIB, Gpu
from gpuplan.hardware.engines import EngineName
from gpuplan.hardware.shapes import ModelShape
from gpuplan.scenario.demand import BatchingSpec, EngineSpec

QUEUE_MAX = 1_000_000
"""vLLM refuses nobody: its line has no end."""
LARGE_CARD_BYTES = 70 * GIB
# vLLM's `EngineArgs` for an API server: max_num_seqs and max_num_batched_tokens on cards of 70 GiB or more that are no
# A100 (larger steps slowed that one, vllm-project/vllm#17885), and on all others.
LARGE_CARD_LIMITS = (1024, 8192)
OTHER_LIMITS = (256, 2048)


@dataclass(frozen=True, slots=True)
class Engine:
    """How decoders are served. `blocks_max` None: sized by memory. With `block_size` None, KV cache is reserved whole.
    `schedules_ahead`: the next step is put together while one runs, so whoever comes meanwhile waits for the one after.
    """

    name: EngineName = "gpuplan"
    tensor_parallel: int = 1
    block_size: int | None = None
    blocks_max: int | None = None
    memory_utilization: float = 1.0
    prefix_caching: bool = False
    schedules_ahead: bool = False

    def kv_tokens(self, model: ModelShape, part: profiles.Profile, *, key: str) -> int:
        """Tokens of KV cache of one replica, in whole blocks. Raises InputError for a model that leaves no block."""
        assert self.block_size is not None, "only where there are blocks"
        if self.blocks_max is not None:
            return self.blocks_max * self.block_size
        ways = self.tensor_parallel
        free_bytes = self.memory_utilization * part.memory_bytes - roofline.memory_used_bytes(
            model, 0, tensor_parallel=ways
        )
        blocks = int(free_bytes * ways // (model.kv_bytes_per_token * self.block_size)) if free_bytes > 0 else 0
        if blocks < 1:
            need = roofline.memory_used_bytes(model, 0, tensor_parallel=ways) / GIB
            have = self.memory_utilization * part.memory_bytes / GIB
            raise InputError(
                f"{model.name} does not fit: each card needs {need:.1f} GiB before any KV cache and may use {have:.1f}",
                key=key,
                value=part.name,
                allowed="a card with more memory, or a larger deployment.engine.tensor_parallel_size",
            )
        return blocks * self.block_size


BUILT_IN = Engine()


def engine_of(spec: EngineName | EngineSpec) -> Engine:
    """The engine that the file asks for."""
    asked = spec_of(spec)
    if asked.kind == "gpuplan":
        return BUILT_IN
    return Engine(
        name=asked.kind,
        tensor_parallel=asked.tensor_parallel_size,
        block_size=asked.block_size,
        blocks_max=asked.num_gpu_blocks_override,
        memory_utilization=asked.gpu_memory_utilization,
        prefix_caching=asked.enable_prefix_caching,
        schedules_ahead=asked.async_scheduling,
    )


def spec_of(spec: EngineName | EngineSpec) -> EngineSpec:
    """`engine: vllm` is short for `engine: {kind: vllm}`."""
    return spec if isinstance(spec, EngineSpec) else EngineSpec(kind=spec)


def batching_of(
    spec: EngineName | EngineSpec, card: Gpu | None, decoders: Mapping[str, bool], given: Mapping[str, BatchingSpec]
) -> dict[str, BatchingSpec]:
    """Every model's batching rule: the file's, otherwise the engine's for decoders, otherwise the usual one."""
    asked, usual = spec_of(spec), BatchingSpec()
    rule = usual
    if asked.kind == "vllm" and card is not None:
        large = card.memory_bytes >= LARGE_CARD_BYTES and "a100" not in card.name
        sequences, tokens = LARGE_CARD_LIMITS if large else OTHER_LIMITS
        rule = BatchingSpec(
            max_batch_size=asked.max_num_seqs or sequences,
            max_batch_tokens=asked.max_num_batched_tokens or tokens,
            max_queue_size=QUEUE_MAX,
        )
    return {name: given.get(name, rule if decoder else usual) for name, decoder in decoders.items()}
