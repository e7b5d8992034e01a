"""Ray Serve's config file (`serve deploy FILE`, or a RayService's `serveConfigV2`): one application a model.

Ray counts requests on a replica, running ones too, and not those that wait. A plan scales up when the batch is full and
`scale_up_at` more wait, so the target is the sum of both. Ray has no threshold to scale down: it removes what the
target does not need once that has held for `downscale_delay_s`, here the plan's stabilization window.
"""

from __future__ import annotations

import math
from typing import Any

from gpuplan.export import behavior, names, reading, vllm, yaml_text
from gpuplan.export.reading import Plan, Server

LLM = "ray.serve.llm:build_openai_app"
ROOM = 1.2
"""Ray's guide has max_ongoing_requests 20 to 50 % above the target."""


def write(plan: Plan) -> str:
    """The file. Raises InputError for a plan without replicas or thresholds."""
    rules = reading.scaling(plan)
    first = {server.model: server for server in reversed(reading.servers(plan))}
    others = [m for m in rules if reading.is_decoder(plan, m) is False]
    comments = yaml_text.head(
        plan,
        "Ray Serve's config file.",
        from_plan=[
            *(behavior.told(model, rule) for model, rule in rules.items()),
            "target_ongoing_requests = max_batch_size x processes + scale_up_at.",
        ],
        fill_in=[
            "model_source: a Hugging Face name or folder. One Ray node on each slice, with one GPU.",
            *(f"import_path and deployment name of your own application for {names.shown(m, 60)}." for m in others),
        ],
    )
    apps = [_application(plan, first[model], rule) for model, rule in rules.items()]
    return yaml_text.written(comments, ([], {"applications": apps}))


def _application(plan: Plan, server: Server, rule: dict[str, Any]) -> dict[str, Any]:
    name, label = names.served(server.model), names.label(server.model)
    batching = plan["batching"][server.model]
    deployment = {**_scaling(batching, rule, server)}
    app: dict[str, Any] = {"name": label, "route_prefix": f"/{label}"}
    if reading.is_decoder(plan, server.model) is not False:
        llm = {
            "model_loading_config": {"model_id": name, "model_source": "FILL-IN"},
            "engine_kwargs": vllm.engine(batching, server.processes),
            "deployment_config": deployment,
        }
        return {**app, "import_path": LLM, "args": {"llm_configs": [llm]}}
    gpus = 0 if server.card is None else 1 / server.processes
    own = {"name": "FILL-IN", **deployment, "ray_actor_options": {"num_gpus": round(gpus, 4)}}
    return {**app, "import_path": "FILL_IN:app", "deployments": [own]}


def _scaling(batching: dict[str, Any], rule: dict[str, Any], server: Server) -> dict[str, Any]:
    least, most = behavior.bounds(rule)
    target = batching["max_batch_size"] + rule["scale_up_at"]
    return {
        "max_ongoing_requests": math.ceil(target * ROOM),
        "max_queued_requests": int(batching["max_queue_size"]),
        "autoscaling_config": {
            "min_replicas": least * server.processes,
            "max_replicas": most * server.processes,
            "initial_replicas": least * server.processes,
            "target_ongoing_requests": float(round(target, 3)),
            "downscale_delay_s": float(rule["stabilization_window_s"]),
        },
    }
