"""How many requests a second one replica could serve at the very best: its throughput with a full batch and mean
lengths, no SLO asked.

An estimate to rank assignments by before they are simulated, and the optimistic side of a cost bound: a real replica,
whose lengths vary and whose batch is not always full, serves less.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpuplan.hardware.roofline import StepLoad
from gpuplan.scenario.demand import BatchingSpec
from gpuplan.scenario.deployment import Replica
from gpuplan.scenario.schedule import Schedule
from gpuplan.sim.service_times import Timer


@dataclass(frozen=True, slots=True)
class ModelDemand:
    """What a schedule asks of one model: requests per second and mean lengths in tokens."""

    rate_per_s: float
    prompt_tokens: float
    output_tokens: float


def demand_of(schedule: Schedule, model: str) -> ModelDemand:
    """The model's share of a schedule."""
    mine = [r for r in schedule.requests if r.model == model]
    count = max(len(mine), 1)
    return ModelDemand(
        len(mine) / schedule.duration_s,
        sum(r.prompt_tokens for r in mine) / count,
        sum(r.output_tokens for r in mine) / count,
    )


def requests_per_s_max(replica: Replica, timer: Timer, demand: ModelDemand, batching: BatchingSpec) -> float:
    """The most that one replica could serve of this demand."""
    prompt, output = max(round(demand.prompt_tokens), 1), max(demand.output_tokens, 1.0)
    sizes = [1 << i for i in range(13) if 1 << i < batching.max_batch_size] + [batching.max_batch_size]
    if replica.role != "decoder":
        return max(size / timer(StepLoad(size * prompt, size * prompt * prompt, 0, 0, size)) for size in sizes)
    if replica.kv_tokens_max is not None:
        fitting = int(replica.kv_tokens_max / (prompt + output))
        sizes = [size for size in sizes if size <= fitting] or [1]
    return max(1.0 / _seconds_each(timer, prompt, output, size) for size in sizes)


def _seconds_each(timer: Timer, prompt: int, output: float, size: int) -> float:
    """Replica seconds that one request costs in a decode batch of `size`: what its prompt adds to a step, and its
    share of its decode steps."""
    context = round(size * (prompt + output / 2))
    decode_s = timer(StepLoad(0, 0, size, context, size))
    prefill_s = timer(StepLoad(prompt, prompt * (prompt + 1) // 2, size, context, size + 1)) - decode_s
    return max(prefill_s, 0.0) + (output - 1) * decode_s / size
