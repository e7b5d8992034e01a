"""What is known of metrics that inference servers and exporters show, by their names."""

from __future__ import annotations

import re

CEILINGS: dict[str, float] = {
    "vllm_kv_cache_usage_perc": 1.0,
    "vllm_gpu_cache_usage_perc": 1.0,
    "vllm_cpu_cache_usage_perc": 1.0,
    "gpuplan_kv_cache_usage_ratio": 1.0,
    "gpuplan_gpu_utilization": 1.0,
    "gpuplan_gpu_memory_utilization": 1.0,
    "nv_gpu_utilization": 1.0,
    "DCGM_FI_DEV_GPU_UTIL": 100.0,
    "DCGM_FI_DEV_MEM_COPY_UTIL": 100.0,
    "DCGM_FI_PROF_GR_ENGINE_ACTIVE": 1.0,
    "DCGM_FI_PROF_SM_ACTIVE": 1.0,
    "DCGM_FI_PROF_SM_OCCUPANCY": 1.0,
    "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": 1.0,
    "DCGM_FI_PROF_DRAM_ACTIVE": 1.0,
}
"""The most that a metric of one pod or card can be. `_perc` of vLLM is a share of 1 all the same (vLLM, docs, metrics);
DCGM's field reference has DEV_*_UTIL in percent and PROF_* as shares."""

RESERVED = frozenset({"DCGM_FI_DEV_FB_USED", "nv_gpu_memory_used_bytes", "gpuplan_gpu_memory_used_bytes"})
"""Memory of the card: engines with a KV cache take theirs at start, whatever the load."""

GAUGES = frozenset({"nv_inference_pending_request_count"})
"""Names like a counter's that are none."""

_EMPTY = re.compile(
    r"waiting|pending|queue|backlog|latency|_duration|time_to_first|time_per_output|inter_token|ttft|tpot",
    re.IGNORECASE,
)
_COUNTER = re.compile(r"_(total|count|sum|bucket)$")


def plain_name(metric: str) -> str:
    """The name as an adapter may rewrite it: colons become `_`."""
    return metric.replace(":", "_")


def ceiling(metric: str) -> float | None:
    """The most that it can be for one pod; None where that is not known."""
    name = plain_name(metric)
    return next((most for known, most in CEILINGS.items() if known.lower() == name.lower()), None)


def empties(metric: str) -> bool:
    """Whether it tells nothing of the load while replicas suffice: a queue, a latency."""
    return bool(_EMPTY.search(metric))


def counts(metric: str) -> bool:
    """Whether it is a counter by its name, which only rises."""
    return bool(_COUNTER.search(metric)) and metric not in GAUGES


def reserved(metric: str) -> bool:
    """Whether it is memory that is taken at start."""
    return metric in RESERVED
