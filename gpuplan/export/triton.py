"""Triton's model repository: a `config.pbtxt` for every model, and for vLLM's backend its `model.json`.

A model that gives one answer gets the dynamic batcher, with the plan's batch size, delay and queue. A decoder is served
by the vLLM backend, which batches by itself: Triton's batcher stays off (`max_batch_size: 0`) and the plan's numbers go
into `model.json`. Run one Triton on every slice: a CUDA process sees one MIG device, which is its GPU 0.
"""

from __future__ import annotations

import json
import math
from typing import Any

from gpuplan.export import names, reading, vllm, yaml_text
from gpuplan.export.reading import Plan, Server

CONFIG = "config.pbtxt"


def write(plan: Plan) -> str:
    """All files after each other, each under its path. A single model's `config.pbtxt` alone can be read as it is."""
    found = files(plan)
    if len(found) == 1:
        return next(iter(found.values()))
    return "\n".join(f"# ---- {path}\n{text}" for path, text in found.items())


def files(plan: Plan) -> dict[str, str]:
    """The repository's files by their paths. Raises InputError for a plan without replicas."""
    found = {}
    first = {server.model: server for server in reversed(reading.servers(plan))}
    for model in reading.models(plan):
        name, server = names.served(model), first[model]
        decodes = bool(reading.is_decoder(plan, model))
        found[f"{name}/{CONFIG}"] = (_decoder if decodes else _batched)(plan, server)
        if decodes:
            engine: dict[str, Any] = {"model": "FILL-IN", **vllm.engine(plan["batching"][model], server.processes)}
            found[f"{name}/1/model.json"] = json.dumps(engine, indent=2) + "\n"
    return found


def _batched(plan: Plan, server: Server) -> str:
    rule = plan["batching"][server.model]
    on_cpu = server.card is None
    where = "kind: KIND_CPU" if on_cpu else "kind: KIND_GPU, gpus: [ 0 ]"
    head = yaml_text.head(
        plan,
        f"Triton serves {names.shown(server.model, 80)}.",
        from_plan=["max_batch_size, max_queue_delay_microseconds, max_queue_size (of one server), instances."],
        fill_in=["backend, input and output, where your backend does not complete them from the model file."],
    )
    servers = sum(1 for s in reading.servers(plan) if s.model == server.model)
    return "\n".join(
        [
            *head,
            f'name: "{names.served(server.model)}"',
            f"max_batch_size: {int(rule['max_batch_size'])}",
            "dynamic_batching {",
            f"  max_queue_delay_microseconds: {round(rule['max_queue_delay_ms'] * 1000)}",
            "  default_queue_policy {",
            "    timeout_action: REJECT",
            f"    max_queue_size: {max(math.ceil(rule['max_queue_size'] / servers), 1)}",
            "  }",
            "}",
            f"instance_group [ {{ count: {server.processes}, {where} }} ]",
            "",
        ]
    )


def _decoder(plan: Plan, server: Server) -> str:
    head = yaml_text.head(
        plan,
        f"Triton serves {names.shown(server.model, 80)} by its vLLM backend, which batches by itself.",
        from_plan=["what vLLM is told in 1/model.json: max_num_seqs, max_num_batched_tokens."],
        fill_in=["model in 1/model.json: a Hugging Face name or folder."],
    )
    return "\n".join(
        [
            *head,
            f'name: "{names.served(server.model)}"',
            'backend: "vllm"',
            "max_batch_size: 0",
            "model_transaction_policy { decoupled: true }",
            f"instance_group [ {{ count: {server.processes}, kind: KIND_MODEL }} ]",
            "",
        ]
    )
