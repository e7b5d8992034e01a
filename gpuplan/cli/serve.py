"""`gpuplan serve [FILE]`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

DEFAULT: dict[str, Any] = {
    "name": "sentiment-on-cpu",
    "models": {"sentiment": {"builtin": "sentiment"}},
    "deployment": {"gpu": "cpu"},
}


def serve(
    file: Path | None = typer.Argument(
        None, help="A scenario file; its traffic is not used. Default: a small classifier."
    ),
    host: str = typer.Option("127.0.0.1", help="Address to listen on."),
    port: int = typer.Option(8000, min=0, max=65535, help="Port to listen on; 0 picks a free one."),
    api_key: str | None = typer.Option(None, envvar="GPUPLAN_API_KEY", help="Bearer token that requests must carry."),
    api_keys: Path | None = typer.Option(
        None, help="YAML file of names and keys; each is a bearer token, and has rate limits of its own."
    ),
    admin_token: str | None = typer.Option(
        None, envvar="GPUPLAN_ADMIN_TOKEN", help="Bearer token for /admin/swap, which is not there without it."
    ),
    models_dir: Path | None = typer.Option(
        None, help="Folder that other versions of models may be loaded from.", exists=True, file_okay=False
    ),
    allow_cpu: bool = typer.Option(False, "--allow-cpu", help="Run ONNX models on the CPU where the GPU is not here."),
    drain_timeout: float = typer.Option(30.0, min=0.0, help="Seconds that running requests get after SIGTERM."),
    telemetry: str = typer.Option("auto", help="auto, nvml, none, or the /metrics URL of a DCGM exporter."),
    sample_hz: float = typer.Option(10.0, help="Telemetry readings per second, 0.1 to 100."),
    record: Path | None = typer.Option(
        None, help="Folder for the record of all steps and decisions, written at the end."
    ),
    as_json: bool = typer.Option(False, "--json", help="Announce the address as a JSON line."),
) -> None:
    """Serve models with dynamic batching over HTTP (OpenAI's API, /v1/classify, /metrics).

    Example: gpuplan serve scenarios/quickstart.yaml --port 8000
    """
    from gpuplan.cli.common import run_async
    from gpuplan.record import store
    from gpuplan.scenario import deployment, files
    from gpuplan.scenario.build import build
    from gpuplan.scenario.demand import Scenario
    from gpuplan.serve import keys
    from gpuplan.serve.service import ServiceOptions
    from gpuplan.telemetry import choice, nvml, sampler

    choice.check(telemetry)
    sampler.check_hz(sample_hz)
    scenario = files.load(file, cards_here=nvml.cards_here) if file else build(DEFAULT, Scenario)
    folder = store.prepare(record) if record else None
    options = ServiceOptions(
        host=host,
        port=port,
        api_keys=keys.together(keys.load(api_keys) if api_keys else {}, api_key or None),
        admin_token=admin_token,
        models_dir=models_dir,
        allow_cpu=allow_cpu,
        record=folder is not None,
        sample_hz=sample_hz,
        telemetry=telemetry,
        drain_s=drain_timeout,
    )
    run_async(_serve(deployment.resolve(scenario), options, folder, as_json))


async def _serve(deployment: Any, options: Any, folder: Path | None, as_json: bool) -> None:
    import gc
    import json

    from gpuplan.record import store
    from gpuplan.serve.service import serving

    async with serving(deployment, options, signals=True) as service:
        # Collections look only at what requests leave behind, not at the models and modules, and less often: each
        # stops the event loop.
        gc.collect()
        gc.freeze()
        gc.set_threshold(10_000, 20, 50)
        if as_json:
            typer.echo(json.dumps({"url": service.url}))
        else:
            for model, engine in service.about()["engines"].items():
                typer.echo(f"{model}: {engine}")
            typer.echo(f"listening on {service.url}  (Ctrl-C drains and stops)")
        if options.host not in ("127.0.0.1", "::1", "localhost") and not options.api_keys:
            typer.echo("warning: listening beyond this machine without --api-key or --api-keys", err=True)
        await service.stopped()
    if folder is not None and service.recorder is not None:
        store.write_server_rows(service.recorder.server_rows(), service.about(), folder)
