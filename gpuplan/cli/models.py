"""`gpuplan models`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer


def models(
    path: Path | None = typer.Argument(None, metavar="[MODEL]", help="An ONNX file to look at."),
    task: str | None = typer.Option(None, help="With MODEL: classify, embed or generate; else as config.json says."),
    as_json: bool = typer.Option(False, "--json", help="Print as JSON."),
) -> None:
    """List the built-in models and what a model file needs, or say what an ONNX file is and whether it can be served.

    Example: gpuplan models exported/model.onnx
    """
    from gpuplan.errors import InputError

    if path is not None:
        _show_file(path, task, as_json=as_json)
    elif task is not None:
        raise InputError("needs a model", key="--task", allowed="e.g. gpuplan models model.onnx --task embed")
    else:
        _show_builtins(as_json=as_json)


def _show_builtins(*, as_json: bool) -> None:
    from rich.console import Console

    from gpuplan.report import models as report
    from gpuplan.serve import inspection

    found = inspection.builtins()
    if as_json:
        _print_json({"builtin": found})
        return
    Console().print(report.builtin_table(found))
    typer.echo("")
    for line in report.FILE_NEEDS:
        typer.echo(line)


def _show_file(path: Path, task: str | None, *, as_json: bool) -> None:
    from rich.console import Console

    from gpuplan.errors import InputError
    from gpuplan.report import models as report
    from gpuplan.scenario import demand
    from gpuplan.scenario.build import build
    from gpuplan.serve import inspection

    asked = build(task, demand.Task, "--task") if task is not None else None  # type: ignore[arg-type]
    one = inspection.inspect(path, task=asked)
    if as_json:
        _print_json(one)
    else:
        for line in report.file_lines(one):
            typer.echo(line)
        Console().print(report.tensor_table(one))
    if one.problem is not None:
        raise InputError(f"cannot be served: {one.problem}", file=str(path))
    if not as_json:
        typer.echo("it can be served")


def _print_json(data: Any) -> None:
    import msgspec

    typer.echo(msgspec.json.encode(data, order="deterministic").decode())
