"""`gpuplan plan SCENARIO|RUN`"""

from __future__ import annotations

from pathlib import Path

import typer


def plan(
    source: Path = typer.Argument(..., metavar="SCENARIO|RUN", help="A scenario file, or a run folder to learn from."),
    out: Path | None = typer.Option(None, help="Folder for plan.json and report.html. Default: the run, or a new one."),
    settings: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="Replace a value of the scenario file."),
    as_json: bool = typer.Option(False, "--json", help="Print the plan as JSON."),
) -> None:
    """Recommend a MIG layout, batch sizes and autoscale thresholds.

    From a run, step times are fitted to what was measured; from a scenario alone they are the roofline's.

    Example: gpuplan plan reports/quickstart
    """
    from gpuplan.cli import common
    from gpuplan.errors import InputError
    from gpuplan.record import store
    from gpuplan.scenario import deployment, files
    from gpuplan.scenario.schedule import build_schedule
    from gpuplan.sim import profiles
    from gpuplan.sim.simulator import simulate

    if source.is_dir():
        if settings:
            raise InputError("is for a scenario file", key="--set", value=settings[0], allowed="plan SCENARIO")
        run = store.read(source)
        asked = files.from_builtins(run.meta.scenario)
        schedule = build_schedule(asked, rate_scale=run.meta.rate_scale, speed=run.meta.speed)
        folder = store.prepare(out or source)
    else:
        asked = common.load_scenario(source, settings=settings)
        schedule, _ = common.build_schedule(asked, rate=None, speed=1.0)
        folder = common.run_folder(out, asked.name)
        run = simulate(asked, deployment.resolve(asked), schedule, profiles.service_times(asked), seed=asked.seed)
    if folder != source:
        store.write(run, folder)
    made = common.make_plan(run, quiet=as_json)
    common.deliver(run, folder, made, as_json=as_json)
    if made is None:
        raise typer.Exit(1)
