"""`gpuplan scenario check|preview|import`"""

from __future__ import annotations

from pathlib import Path

import typer

app = typer.Typer(help="Check, look at, and import scenarios.", no_args_is_help=True)


@app.command()
def check(
    file: Path = typer.Argument(..., help="A scenario file."),
    as_json: bool = typer.Option(False, "--json", help="Print the scenario as JSON, defaults filled in by use."),
) -> None:
    """Say whether a scenario is sound: exit code 0, or 2 and what is wrong where.

    Example: gpuplan scenario check scenarios/quickstart.yaml
    """
    import json

    from gpuplan.scenario import deployment, files
    from gpuplan.telemetry import nvml

    scenario = files.load(file, cards_here=nvml.cards_here)
    resolved = deployment.resolve(scenario)
    if as_json:
        typer.echo(json.dumps(files.to_builtins(scenario)))
        return
    typer.echo(
        f"{file}: sound. {len(scenario.traffic)} traffic classes, {len(scenario.models)} models, "
        f"{len(resolved.replicas)} replicas on {len(resolved.layouts)} x {resolved.gpu_name}"
    )


@app.command()
def preview(
    file: Path = typer.Argument(..., help="A scenario file."),
    width: int = typer.Option(72, min=10, max=400, help="Columns of the sketch."),
) -> None:
    """Sketch a scenario's arrivals over time, class by class, without sending anything.

    Example: gpuplan scenario preview scenarios/quickstart.yaml
    """
    from rich.console import Console

    from gpuplan.cli import common
    from gpuplan.report.preview import print_preview

    scenario = common.load_scenario(file)
    schedule, _ = common.build_schedule(scenario, rate=None, speed=1.0)
    print_preview(scenario, schedule, Console(), width)


@app.command("import")
def import_(
    trace: Path = typer.Argument(..., help="A trace: CSV of arrivals, prompt tokens and output tokens."),
    out: Path = typer.Option(..., help="Scenario file to write; the rows go beside it as .csv."),
    duration: str = typer.Option("1h", help="How much of the trace, from its start."),
    model: str = typer.Option("llama-3-8b", help="Model shape to emulate."),
    gpu: str = typer.Option("a100-80gb", help="Card to emulate."),
) -> None:
    """Turn a recorded trace into a scenario that replays it.

    Example: gpuplan scenario import AzureLLMInferenceTrace_code.csv --out code.yaml --duration 120s --gpu h100-80gb
    """
    from gpuplan.errors import InputError
    from gpuplan.scenario import files, traces
    from gpuplan.scenario.build import duration_s

    try:
        window_s = duration_s(duration)
    except ValueError:
        raise InputError("not a duration", key="--duration", value=duration, allowed="e.g. 120s, 1h") from None
    rows = traces.import_trace(trace, out, duration_s=window_s, model=model, gpu=gpu)
    files.load(out)
    typer.echo(f"{out}: {rows} requests; replay with: gpuplan bench {out}")
