"""What several commands share: reading a scenario with its overrides, running a coroutine, delivering a run."""

from __future__ import annotations

import sys
from collections.abc import Coroutine, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from gpuplan.record.run import Run
    from gpuplan.scenario.demand import Scenario
    from gpuplan.scenario.schedule import Schedule

T = TypeVar("T")

COUNT_MAX = 1_000_000
DAY_S = 86_400.0


def load_scenario(
    path: Path,
    *,
    settings: Sequence[str] = (),
    duration: str | None = None,
    days: float | None = None,
    seed: int | None = None,
) -> Scenario:
    """The checked scenario with the command line's overrides, which must have traffic. `settings` are KEY=VALUE."""
    import msgspec

    from gpuplan.errors import InputError
    from gpuplan.scenario import files
    from gpuplan.scenario.build import duration_s
    from gpuplan.telemetry import nvml

    scenario = files.load(path, settings=settings, cards_here=nvml.cards_here)
    if not scenario.traffic:
        raise InputError("nothing to send", file=str(path), key="traffic", allowed="at least one traffic class")
    changes: dict[str, Any] = {}
    if duration is not None:
        try:
            changes["duration"] = duration_s(duration)
        except ValueError:
            raise InputError("not a duration", key="--duration", value=duration, allowed="e.g. 30s, 5m") from None
    if days is not None:
        if duration is not None:
            raise InputError("says the same as --duration", key="--days", value=days, allowed="one of the two")
        if not 0 < days < float("inf"):
            raise InputError("must be above zero", key="--days", value=days, allowed="e.g. 7, 0.5")
        changes["duration"] = days * DAY_S
    if "duration" in changes:
        # A shorter run keeps the share of it that is warm-up.
        changes["warmup"] = scenario.warmup * min(changes["duration"] / scenario.duration, 1.0)
    if seed is not None:
        changes["seed"] = seed
    scenario = msgspec.structs.replace(scenario, **changes)
    files.check(scenario)
    return scenario


def build_schedule(scenario: Scenario, *, rate: float | None, speed: float) -> tuple[Schedule, float]:
    """The schedule, and the factor by which `--rate` (requests per second in all) multiplied the scenario's rates."""
    from gpuplan.errors import InputError
    from gpuplan.scenario import schedule

    for flag, value in (("--rate", rate), ("--speed", speed)):
        if value is not None and not 0 < value < float("inf"):
            raise InputError("must be above zero", key=flag, value=value)
    built = schedule.build_schedule(scenario, speed=speed)
    scale = rate * scenario.duration / max(len(built.requests), 1) if rate is not None else 1.0
    if scale != 1.0:
        built = schedule.build_schedule(scenario, rate_scale=scale, speed=speed)
    if not built.requests:
        raise InputError("no request falls into the duration", key="duration", value=scenario.duration)
    return built, scale


def run_folder(out: Path | None, name: str) -> Path:
    """The folder that `--out` names, or a new one under reports/, proven writable."""
    from gpuplan.record import store

    return store.prepare(out or Path("reports") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}")


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to its end, on uvloop where there is one."""
    import asyncio

    if sys.platform == "win32":
        return asyncio.run(main)
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def deliver(run: Run, folder: Path, plan: dict[str, Any] | None, *, as_json: bool) -> dict[str, Any]:
    """Writes summary, plan and report beside the run, prints the answer, and gives the summary."""
    import json

    from rich.console import Console

    from gpuplan.record import intervals, store, summary
    from gpuplan.report import console, page

    figures = summary.summarize(run)
    if seeds := store.read_seeds(folder):
        figures["seeds"] = intervals.over_seeds(seeds)
    store.write_json(folder / "summary.json", figures)
    if plan is not None:
        store.write_json(folder / "plan.json", plan)
    page.write(run, figures, plan, folder / "report.html")
    if as_json:
        sys.stdout.write(json.dumps({"folder": str(folder), "summary": figures, "plan": plan}, default=str) + "\n")
    else:
        console.print_summary(run, figures, plan, Console())
        sys.stdout.write(f"\nreport: {folder / 'report.html'}\n")
    return figures


def judge(run: Run, figures: dict[str, Any], conditions: str | None) -> None:
    """Raises RunError for a run that failed or completed no request, and when a `--fail-on` condition is met."""
    from gpuplan.errors import RunError
    from gpuplan.record.conditions import parse

    if run.meta.failure:
        raise RunError(run.meta.failure)
    if not figures["overall"]["completed"]:
        raise RunError("no request was completed")
    broken = [line for c in (parse(conditions) if conditions else []) if (line := c.broken(figures))]
    if broken:
        raise RunError("--fail-on: " + "; ".join(broken))


def make_plan(run: Run, *, quiet: bool) -> dict[str, Any] | None:
    """The plan for a run's scenario, with what is being tried shown meanwhile; None when Ctrl-C ended it or nothing can
    be planned (said aloud and noted in the report: the run is already on disk)."""
    from rich.console import Console
    from rich.text import Text

    from gpuplan.errors import GpuplanError
    from gpuplan.plan.search import make_plan as search

    console = Console(stderr=True, quiet=quiet)
    try:
        with console.status("planning") as status:
            return search(run, workers=None, on_progress=lambda text: status.update(Text(f"planning: {text}")))
    except KeyboardInterrupt:
        why = "planning was interrupted"
    except GpuplanError as error:
        why = str(error)
    run.meta.notes.append(f"no plan: {why}")
    sys.stderr.write(f"no plan: {why}\n")
    return None


def counts(text: str, *, key: str) -> list[int]:
    """Whole numbers above zero between commas. Raises InputError."""
    from gpuplan.errors import InputError

    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and 0 < int(word) <= COUNT_MAX for word in words):
        raise InputError("not a list of counts", key=key, value=text, allowed=f"e.g. 1,64,4096; each up to {COUNT_MAX}")
    return [int(word) for word in words]
