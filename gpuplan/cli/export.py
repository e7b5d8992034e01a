"""`gpuplan export PLAN --to FORMAT`"""

from __future__ import annotations

from pathlib import Path

import typer


def export(
    plan: Path = typer.Argument(..., help="A plan.json, or the run folder that holds one."),
    to: str = typer.Option(..., help="mig-parted or nvidia-smi."),
    out: Path | None = typer.Option(None, help="File to write; default: standard output."),
) -> None:
    """Write a plan as a file that another tool accepts. Nothing is applied.

    Example: gpuplan export reports/quickstart --to mig-parted --out mig.yaml
    """
    import json

    from gpuplan.errors import InputError, unknown_name
    from gpuplan.export import EXPORTS

    if to not in EXPORTS:
        raise unknown_name("format", to, EXPORTS, key="--to")
    file = plan / "plan.json" if plan.is_dir() else plan
    try:
        text = EXPORTS[to].write(json.loads(file.read_bytes()))
        if out is not None:
            out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot use: {error.strerror}", key="PLAN", value=str(error.filename)) from None
    except (ValueError, KeyError, TypeError):
        raise InputError("not a plan", file=str(file), allowed="a plan.json that gpuplan wrote") from None
    if out is None:
        typer.echo(text, nl=False)
