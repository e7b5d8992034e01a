"""`gpuplan simulate SCENARIO`"""

from __future__ import annotations

from pathlib import Path

import typer


def simulate(
    scenario: Path = typer.Argument(..., help="A scenario file."),
    out: Path | None = typer.Option(None, help="Run folder. Default: reports/<name>-<time>/"),
    rate: float | None = typer.Option(None, help="Requests per second in all; the classes keep their shares."),
    duration: str | None = typer.Option(None, help="How long requests come, e.g. 10m."),
    seed: int | None = typer.Option(None, min=0, help="Seed of arrivals, lengths and step times."),
    speed: float = typer.Option(1.0, help="Replay traces this much faster."),
    times_from: Path | None = typer.Option(None, "--times-from", help="Run folder to fit step times from."),
    fail_on: str | None = typer.Option(None, help='Exit 1 when met, e.g. "overall.slo_attainment < 0.99".'),
    as_json: bool = typer.Option(False, "--json", help="Print the result as JSON."),
) -> None:
    """Simulate a scenario on virtual time: the same decisions, the same columns, no server.

    Example: gpuplan simulate scenarios/quickstart.yaml --duration 10m
    """
    from gpuplan.cli import common
    from gpuplan.plan import calibrate
    from gpuplan.record import conditions, store
    from gpuplan.scenario import deployment
    from gpuplan.sim.service_times import ServiceTimes
    from gpuplan.sim.simulator import simulate as run_simulation

    if fail_on:
        conditions.parse(fail_on)
    asked = common.load_scenario(scenario, duration=duration, seed=seed)
    schedule, _ = common.build_schedule(asked, rate=rate, speed=speed)
    times = calibrate.fit(store.read(times_from)) if times_from else ServiceTimes({})
    resolved = deployment.resolve(asked)
    folder = common.run_folder(out, asked.name)
    run = run_simulation(asked, resolved, schedule, times, seed=asked.seed, keep_decisions=True)
    store.write(run, folder)
    figures = common.deliver(run, folder, None, as_json=as_json)
    common.exit_on(fail_on, figures)
