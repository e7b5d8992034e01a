"""KServe InferenceServices (serving.kserve.io/v1beta1), one a model, on the plan's slices.

A decoder gets KServe's Hugging Face runtime, which is vLLM; any other model Triton. Scaling is left to another file
(`autoscalerClass: external`): `gpuplan export --to keda` writes it.
"""

from __future__ import annotations

from typing import Any

from gpuplan.export import behavior, names, reading, vllm, yaml_text
from gpuplan.export.reading import Plan, Server

API = "serving.kserve.io/v1beta1"


def write(plan: Plan) -> str:
    """The objects. Raises InputError for a plan without a GPU."""
    servers = reading.placed_on_gpu(plan)
    first = {server.model: server for server in reversed(servers)}
    models = reading.models(plan)
    mixed = [m for m in models if len({s.slice for s in servers if s.model == m}) > 1]
    comments = yaml_text.head(
        plan,
        "KServe InferenceServices.",
        from_plan=["replicas, slices, vLLM's arguments."],
        fill_in=[
            "storageUri: where the weights are; cpu and memory of the pods; a Triton model's config.pbtxt goes beside "
            "its weights (--to triton).",
            "scaling: --to keda, with the Deployment's name: MODEL-predictor.",
            *(
                f"{names.shown(m, 60)} is planned on several kinds of slices; a pod asks for one, the first."
                for m in mixed
            ),
        ],
    )
    return yaml_text.written(comments, *((_told(plan, first[m]), _document(plan, first[m], servers)) for m in models))


def _told(plan: Plan, server: Server) -> list[str]:
    model, stand_in = names.shown(server.model, 80), names.shown(reading.source(plan, server.model), 60)
    return [f"# {model}: stands in the plan as {stand_in}"]


def _document(plan: Plan, server: Server, servers: list[Server]) -> dict[str, Any]:
    count = sum(1 for s in servers if s.model == server.model)
    rule = plan["autoscale"].get(server.model)
    least, most = behavior.bounds(rule) if rule else (count, count)
    one = {reading.resource(server.slice): "1"}
    decodes = reading.is_decoder(plan, server.model) is not False
    model: dict[str, Any] = {
        "modelFormat": {"name": "huggingface" if decodes else "triton"},
        "storageUri": f"pvc://FILL-IN/{names.served(server.model)}",
        "resources": {"limits": dict(one), "requests": dict(one)},
    }
    if decodes:
        served, *engine = vllm.flags(plan, server)
        model["args"] = [f"--model_name={served.partition('=')[2]}", *engine]
    else:
        model["protocolVersion"] = "v2"
    return {
        "apiVersion": API,
        "kind": "InferenceService",
        "metadata": {
            "name": names.label(server.model),
            "annotations": {
                "serving.kserve.io/deploymentMode": "RawDeployment",
                "serving.kserve.io/autoscalerClass": "external",
            },
        },
        "spec": {"predictor": {"minReplicas": least, "maxReplicas": most, "model": model}},
    }
