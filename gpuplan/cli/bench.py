"""`gpuplan bench SCENARIO`"""

from __future__ import annotations

from pathlib import Path

import typer


def bench(
    scenario: Path = typer.Argument(..., help="A scenario file."),
    target: str = typer.Option("local", help="local (a server process on loopback), in-process, or a URL."),
    out: Path | None = typer.Option(None, help="Run folder. Default: reports/<name>-<time>/"),
    settings: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="Replace a value of the scenario file."),
    rate: float | None = typer.Option(None, help="Requests per second in all; the classes keep their shares."),
    duration: str | None = typer.Option(None, help="How long to send, e.g. 30s."),
    seed: int | None = typer.Option(None, min=0, help="Seed of arrivals and lengths."),
    speed: float = typer.Option(1.0, help="Replay traces this much faster."),
    api: str | None = typer.Option(None, help="openai-completions (default) or openai-chat, for models that generate."),
    timeout: float = typer.Option(120.0, min=0.1, help="Seconds that one request may take."),
    header: list[str] = typer.Option([], "--header", "-H", help="'Name: value' to send with every request."),
    telemetry: str = typer.Option("auto", help="auto, nvml, none, or the /metrics URL of a DCGM exporter."),
    sample_hz: float = typer.Option(10.0, help="Telemetry readings per second, 0.1 to 100."),
    allow_cpu: bool = typer.Option(False, "--allow-cpu", help="Run ONNX models on the CPU where the GPU is not here."),
    no_plan: bool = typer.Option(False, "--no-plan", help="Measure and report only."),
    fail_on: str | None = typer.Option(None, help='Exit 1 when met, e.g. "overall.slo_attainment < 0.99".'),
    as_json: bool = typer.Option(False, "--json", help="Print the result as JSON."),
) -> None:
    """Replay a scenario against a server, and report what happened and what to run.

    Example: gpuplan bench scenarios/quickstart.yaml --out reports/mine
    """
    from gpuplan.cli import common
    from gpuplan.errors import InputError
    from gpuplan.load import bench as load
    from gpuplan.record import conditions, store
    from gpuplan.report.live import LiveDisplay
    from gpuplan.scenario import deployment
    from gpuplan.telemetry import choice, sampler

    if fail_on:
        conditions.parse(fail_on)
    headers = {}
    for line in header:
        name, colon, value = line.partition(":")
        if not colon or not name.strip() or any(c in line for c in "\r\n"):
            raise InputError("not a header", key="--header", value=line, allowed="'Name: value'")
        headers[name.strip()] = value.strip()
    choice.check(telemetry)
    sampler.check_hz(sample_hz)
    asked = common.load_scenario(scenario, settings=settings, duration=duration, seed=seed)
    schedule, scale = common.build_schedule(asked, rate=rate, speed=speed)
    resolved = deployment.resolve(asked)
    folder = common.run_folder(out, asked.name)
    options = load.BenchOptions(target, api, timeout, scale, speed, allow_cpu, headers, sample_hz, telemetry)
    with LiveDisplay(asked.name, quiet=as_json) as display:
        run = common.run_async(load.bench(asked, resolved, schedule, options, on_tick=display.update))
    store.write(run, folder)
    plan = None
    if not no_plan:
        plan = common.make_plan(run, quiet=as_json)
    figures = common.deliver(run, folder, plan, as_json=as_json)
    common.judge(run, figures, fail_on)
