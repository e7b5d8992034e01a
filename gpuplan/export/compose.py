"""A Docker Compose file: one service for every process of a slice.

A decoder is served by vLLM's image, any other model by `gpuplan serve`. What only the reader knows (UUIDs, weights,
images, a key) are variables that Compose itself refuses to start without; they go into a file `.env` beside it.
"""

from __future__ import annotations

from typing import Any

from gpuplan.export import names, reading, vllm, yaml_text
from gpuplan.export.reading import Plan, Server
from gpuplan.hardware.mig import WHOLE

IMAGE = "vllm/vllm-openai:latest"
CACHE = "huggingface"
INSIDE = 8000
OUTSIDE = 8000


def write(plan: Plan) -> str:
    """The file. Raises InputError for a plan without replicas."""
    servers = reading.servers(plan)
    services: dict[str, Any] = {}
    for server in servers:
        for process in range(server.processes):
            name = names.label(server.name if server.processes == 1 else f"{server.name}-{process}")
            services[name] = _service(plan, server, OUTSIDE + len(services))
    comments = yaml_text.head(
        plan,
        "A Docker Compose file, one service on each slice.",
        from_plan=["the slices, vLLM's arguments."],
        fill_in=[
            "in a file .env beside it: the UUIDs that nvidia-smi -L lists, where the weights are, images and keys. "
            "`docker compose config` names what is missing.",
            "for `gpuplan serve`: a scenario for each model, with that model and `deployment: {gpu: auto}` alone, and "
            "an image that has gpuplan installed.",
        ],
    )
    file: dict[str, Any] = {"services": services}
    if any(service["image"] == IMAGE for service in services.values()):
        file["volumes"] = {CACHE: {}}
    return yaml_text.written(comments, ([], file))


def _service(plan: Plan, server: Server, port: int) -> dict[str, Any]:
    decodes = server.card is not None and reading.is_decoder(plan, server.model) is not False
    service = _vllm(plan, server) if decodes else _gpuplan(server)
    service["ports"] = [f"127.0.0.1:{port}:{INSIDE}"]
    if server.card is not None:
        kind = "GPU UUID" if server.slice == WHOLE else "MIG UUID"
        device = {
            "driver": "nvidia",
            "device_ids": [_needed(vllm.device(server), f"{kind} from nvidia-smi -L")],
            "capabilities": ["gpu"],
        }
        service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    return {**service, "restart": "unless-stopped"}


def _vllm(plan: Plan, server: Server) -> dict[str, Any]:
    model = _needed(vllm.weights(server.model), "Hugging Face name or folder")
    command = [f"--model={model}", f"--port={INSIDE}", *vllm.flags(plan, server)]
    return {"image": IMAGE, "command": command, "ipc": "host", "volumes": [f"{CACHE}:/root/.cache/huggingface"]}


def _gpuplan(server: Server) -> dict[str, Any]:
    scenario = _needed(names.variable(names.label(server.model), "scenario"), "a scenario file with this model alone")
    return {
        "image": _needed("GPUPLAN_IMAGE", "an image with gpuplan installed"),
        "command": ["gpuplan", "serve", "/scenario.yaml", "--host=0.0.0.0", f"--port={INSIDE}"],
        "environment": {"GPUPLAN_API_KEY": _needed("GPUPLAN_API_KEY", "a bearer token for requests")},
        "volumes": [{"type": "bind", "source": scenario, "target": "/scenario.yaml", "read_only": True}],
    }


def _needed(variable: str, what: str) -> str:
    return f"${{{variable}:?{what}}}"
