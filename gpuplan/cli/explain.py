"""`gpuplan explain RUN REQUEST_ID`"""

from __future__ import annotations

from pathlib import Path

import typer


def explain(
    run: Path = typer.Argument(..., help="A run folder."),
    request_id: int = typer.Argument(..., help="A request_id of requests.parquet: its place in the schedule, from 0."),
    as_json: bool = typer.Option(False, "--json", help="Print the story as JSON."),
) -> None:
    """Tell one request's story: where it waited, with whom it ran, how long each took, and why it failed.

    Example: gpuplan explain reports/quickstart 17
    """
    import msgspec

    from gpuplan.record import store, story
    from gpuplan.report import story as report

    told = story.of_run(store.read(run), request_id, folder=str(run))
    if as_json:
        typer.echo(msgspec.json.encode(report.as_data(told)).decode())
    else:
        for line in report.lines(told):
            typer.echo(line)
