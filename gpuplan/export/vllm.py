"""vLLM's flags: a shell script that starts `vllm serve` once for every process of a slice, and `flags` for the others.

A CUDA process sees one MIG device, the one that CUDA_VISIBLE_DEVICES names, so every slice has a server of its own. MIG
devices get their UUIDs when the card is cut: the script takes them, and the weights' place, from variables, and ends
before it starts anything where one is missing.
"""

from __future__ import annotations

import shlex
from typing import Any

from gpuplan.export import names, reading, yaml_text
from gpuplan.export.reading import Plan, Server

PORT = 8000
MEMORY_SHARE = 0.9
"""vLLM's default --gpu-memory-utilization, for all processes of a slice together."""


def write(plan: Plan) -> str:
    """The script. Raises InputError for a plan without a GPU, or without a model that generates tokens."""
    mine = [s for s in reading.placed_on_gpu(plan) if reading.is_decoder(plan, s.model) is not False]
    if not mine:
        raise reading.lacks(plan, "model that generates tokens")
    models = list(dict.fromkeys(s.model for s in mine))
    others = [model for model in reading.models(plan) if model not in models]
    head = yaml_text.head(
        plan,
        "Starts vLLM on every slice.",
        from_plan=["the slices, --max-num-seqs, --max-num-batched-tokens; --tensor-parallel-size is 1 on a slice."],
        fill_in=[
            "the variables below; MIG UUIDs are in nvidia-smi -L. Ports begin at 8000.",
            *(f"{names.shown(model, 60)} gives one answer and no tokens: see --to triton." for model in others),
        ],
    )
    lines = ["#!/bin/sh", *head, "set -eu"]
    for model in models:
        told = f"its Hugging Face name or folder; the plan's stand-in is {names.shown(reading.source(plan, model), 60)}"
        lines += [f"# {names.shown(model, 80)}: {told}", _needed(weights(model), "Hugging Face name or folder")]
    for server in mine:
        lines += [
            f"# {names.shown(server.name, 80)}: {names.shown(server.place)}",
            _needed(device(server), "MIG or GPU UUID"),
        ]
    lines.append("trap 'kill 0' INT TERM")
    ports = iter(range(PORT, PORT + 10_000))
    for server in mine:
        for _ in range(server.processes):
            asked = " ".join(shlex.quote(word) for word in flags(plan, server))
            lines += [
                f'CUDA_VISIBLE_DEVICES="${device(server)}" \\',
                f'vllm serve "${weights(server.model)}" --port {next(ports)} {asked} &',
            ]
    return "\n".join([*lines, "wait"]) + "\n"


def flags(plan: Plan, server: Server) -> list[str]:
    """vLLM's arguments for one process of a server, without the model and the port."""
    rule = plan["batching"][server.model]
    return [
        f"--served-model-name={names.served(server.model)}",
        *(f"--{key.replace('_', '-')}={value}" for key, value in engine(rule, server.processes).items()),
    ]


def engine(rule: dict[str, Any], processes: int) -> dict[str, Any]:
    """The same as arguments of vLLM's engine. vLLM refuses fewer batched tokens than sequences."""
    told: dict[str, Any] = {
        "max_num_seqs": int(rule["max_batch_size"]),
        "max_num_batched_tokens": max(int(rule["max_batch_tokens"]), int(rule["max_batch_size"])),
        "tensor_parallel_size": 1,
    }
    if processes > 1:
        told["gpu_memory_utilization"] = int(MEMORY_SHARE / processes * 100) / 100
    return told


def device(server: Server) -> str:
    """The variable that holds the UUID of the server's slice or card."""
    return names.variable("gpu", str(server.card), server.slice, "at", str(server.start))


def weights(model: str) -> str:
    """The variable that says where the model's weights are."""
    return names.variable(names.label(model), "weights")


def _needed(variable: str, what: str) -> str:
    return f': "${{{variable}:?{what}}}"'
