"""`gpuplan report RUN`"""

from __future__ import annotations

from pathlib import Path

import typer


def report(
    run: Path = typer.Argument(..., help="A run folder."),
    as_json: bool = typer.Option(False, "--json", help="Print summary and plan as JSON."),
) -> None:
    """Derive summary and report again from a run's rows.

    Example: gpuplan report reports/quickstart
    """
    import json

    from gpuplan.cli import common
    from gpuplan.record import store

    record = store.read(run)
    plan_file = store.prepare(run) / "plan.json"
    plan = json.loads(plan_file.read_bytes()) if plan_file.exists() else None
    common.deliver(record, run, plan, as_json=as_json)
