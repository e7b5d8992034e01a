"""The queue that a server shows, as PromQL that gives one element whatever the number of pods.

`--metrics` chooses whose: gpuplan's own server, vLLM, or Triton. A pod is taken to be one replica on one slice. Plans'
thresholds are averages over a minute, so are these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from gpuplan.errors import InputError, unknown_name
from gpuplan.export import names
from gpuplan.export.reading import Plan, is_decoder, scaling

WINDOW = "1m"


class Queue(NamedTuple):
    """A gauge of requests waiting, and the label that tells the model."""

    gauge: str
    label: str
    name_of: Callable[[str], str]  # what the label says of a model


QUEUES = {
    "gpuplan": Queue("gpuplan_requests_waiting", "model", str),
    "vllm": Queue("vllm:num_requests_waiting", "model_name", names.served),
    "triton": Queue("nv_inference_pending_request_count", "model", names.served),
}
"""vLLM: docs/usage/metrics.md. Triton: docs/user_guide/metrics.md, pending request count. gpuplan: serve/metrics.py."""


def queue(metrics: str) -> Queue:
    """The named server's. Raises InputError for another name."""
    if metrics not in QUEUES:
        raise unknown_name("source of metrics", metrics, QUEUES, key="--metrics")
    return QUEUES[metrics]


def visible(plan: Plan, metrics: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Thresholds of the models whose queue can be seen there, and the models that are left out: Triton's vLLM backend
    takes every request at once, so a decoder's pending count stays 0. Raises InputError when none is left."""
    queue(metrics)
    thresholds = scaling(plan)
    blind = [model for model in thresholds if metrics == "triton" and is_decoder(plan, model)]
    if len(blind) == len(thresholds):
        raise InputError(
            "no model's queue shows there: Triton's vLLM backend takes every request at once",
            key="--metrics",
            value=metrics,
            allowed="vllm or gpuplan",
        )
    return {model: rule for model, rule in thresholds.items() if model not in blind}, blind


def waiting_total(metrics: str, model: str) -> str:
    """Requests waiting in all pods together."""
    return f"sum({_averaged(metrics, model)})"


def replicas_held(metrics: str, model: str, scale_down_at: float) -> str:
    """As many replicas as there are while more wait than `scale_down_at` on each, else 0."""
    return f"count({_series(metrics, model)}) * (avg({_averaged(metrics, model)}) > bool {scale_down_at:g})"


def _averaged(metrics: str, model: str) -> str:
    return f"avg_over_time({_series(metrics, model)}[{WINDOW}])"


def _series(metrics: str, model: str) -> str:
    asked = queue(metrics)
    return f"{asked.gauge}{{{asked.label}={names.promql_string(asked.name_of(model))}}}"
