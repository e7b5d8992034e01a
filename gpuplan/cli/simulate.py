"""`gpuplan simulate SCENARIO`"""

from __future__ import annotations

from pathlib import Path

import typer


def simulate(
    scenario: Path = typer.Argument(..., help="A scenario file."),
    out: Path | None = typer.Option(None, help="Run folder. Default: reports/<name>-<time>/"),
    settings: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="Replace a value of the scenario file."),
    rate: float | None = typer.Option(None, help="Requests per second in all; the classes keep their shares."),
    duration: str | None = typer.Option(None, help="How long requests come, e.g. 10m."),
    days: float | None = typer.Option(None, help="The same in days."),
    seed: int | None = typer.Option(None, min=0, help="Seed of arrivals, lengths and step times."),
    seeds: int = typer.Option(1, min=1, max=10_000, help="So many seeds from that one on, with confidence intervals."),
    workers: int | None = typer.Option(None, min=1, help="Processes for --seeds. Default: one on each core."),
    ray: str | None = typer.Option(None, help="Address of a Ray cluster for --seeds, e.g. auto."),
    speed: float = typer.Option(1.0, help="Replay traces this much faster."),
    times_from: Path | None = typer.Option(None, "--times-from", help="Run folder to fit step times from."),
    fail_on: str | None = typer.Option(None, help='Exit 1 when met, e.g. "overall.slo_attainment < 0.99".'),
    as_json: bool = typer.Option(False, "--json", help="Print the result as JSON."),
) -> None:
    """Simulate a scenario on virtual time: the same decisions, the same columns, no server.

    Example: gpuplan simulate scenarios/quickstart.yaml --set deployment.gpu=h100-80gb --duration 10m --seeds 8
    """
    from gpuplan.cli import common
    from gpuplan.plan import calibrate
    from gpuplan.record import conditions, store
    from gpuplan.report.simulating import SimulationDisplay
    from gpuplan.sim import profiles
    from gpuplan.sim.seeds import simulate_seeds

    if fail_on:
        conditions.parse(fail_on)
    asked = common.load_scenario(scenario, settings=settings, duration=duration, days=days, seed=seed)
    schedule, scale = common.build_schedule(asked, rate=rate, speed=speed)
    times = calibrate.fit(store.read(times_from)) if times_from else profiles.service_times(asked)
    folder = common.run_folder(out, asked.name)
    with SimulationDisplay(asked.name, duration_s=schedule.duration_s, seeds=seeds - 1, quiet=as_json) as display:
        run, figures_by_seed = simulate_seeds(
            asked,
            schedule,
            times,
            seeds=seeds,
            rate_scale=scale,
            speed=speed,
            workers=workers,
            ray=ray,
            watching=[display],
            on_seed=display.seed_done,
        )
    store.write(run, folder)
    store.write_seeds(figures_by_seed, folder)
    figures = common.deliver(run, folder, None, as_json=as_json)
    common.judge(run, figures, fail_on)
