"""`gpuplan export PLAN --to FORMAT`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from gpuplan.export import Format


def export(
    plan: Path = typer.Argument(..., help="A plan.json, or the run folder that holds one."),
    to: str = typer.Option(
        ...,
        help="mig-parted, nvidia-smi, gpu-operator, hpa, keda, triton, vllm, ray-serve, kserve or compose.",
    ),
    out: Path | None = typer.Option(
        None, help="File or folder to write (triton makes several files); default: standard output."
    ),
    metrics: str | None = typer.Option(
        None, help="hpa, keda: whose queue they watch, gpuplan (the default), vllm or triton."
    ),
    undo: bool = typer.Option(False, "--undo", help="nvidia-smi: the commands that bring the cards back to uncut."),
    apply: bool = typer.Option(
        False, "--apply", help="nvidia-smi: cut this machine's cards now. Asks first; refuses while they are used."
    ),
    yes: bool = typer.Option(False, "--yes", help="With --apply: do not ask."),
) -> None:
    """Write a plan as a file that another tool accepts. Nothing is applied, but for nvidia-smi with --apply.

    Example: gpuplan export reports/quickstart --to keda --metrics vllm --out keda.yaml
    """
    from gpuplan.errors import InputError, unknown_name
    from gpuplan.export import EXPORTS, nvidia_smi

    if to not in EXPORTS:
        raise unknown_name("format", to, EXPORTS, key="--to")
    form = EXPORTS[to]
    for flag, given in (("--undo", undo), ("--apply", apply)):
        if given and to != "nvidia-smi":
            raise InputError("is for nvidia-smi alone", key=flag, value=to, allowed="--to nvidia-smi")
    if metrics is not None and not form.takes_metrics:
        raise InputError("no metrics are in such a file", key="--metrics", value=metrics, allowed="--to hpa or keda")
    if apply and undo:
        raise InputError("writes the undo itself, before it cuts", key="--apply", allowed="without --undo")
    if apply:
        _apply(_of_plan(plan, lambda told: told), out, yes=yes)
        return

    def made(told: dict[str, Any]) -> dict[str, str]:
        if undo:
            return {"nvidia-smi-undo.sh": nvidia_smi.undo(told)}
        if out is not None and form.files is not None:
            return form.files(told)
        text = form.write(told, metrics or "gpuplan") if form.takes_metrics else form.write(told)
        return {form.file_name: text}

    texts = _of_plan(plan, lambda told: {name: text.encode() for name, text in made(told).items()})
    if out is None:
        typer.echo(next(iter(texts.values())), nl=False)
        return
    for path in _write(out, texts, form):
        typer.echo(f"wrote {path}", err=True)


def _of_plan(plan: Path, make: Any) -> Any:
    """What `make` makes of the plan. Raises InputError where the file is none."""
    import json

    from gpuplan.errors import InputError

    file = plan / "plan.json" if plan.is_dir() else plan
    try:
        return make(json.loads(file.read_bytes()))
    except OSError as error:
        raise InputError(f"cannot use: {error.strerror}", key="PLAN", value=str(error.filename)) from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        missing = f"it has no {error}" if isinstance(error, KeyError) else type(error).__name__
        raise InputError(f"not a plan ({missing})", file=str(file), allowed="a plan.json that gpuplan wrote") from None


def _write(out: Path, texts: dict[str, bytes], form: Format) -> list[Path]:
    """The files, under `out` where it is a folder or there are several. Raises InputError where they cannot be."""
    from gpuplan.errors import InputError

    into_folder = form.files is not None or out.is_dir()
    paths = [out / name if into_folder else out for name in texts]
    try:
        for path, text in zip(paths, texts.values(), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text)
    except OSError as error:
        raise InputError(f"cannot write: {error.strerror}", key="--out", value=str(error.filename)) from None
    return paths


def _apply(told: dict[str, Any], out: Path | None, *, yes: bool) -> None:
    """Shows the commands, asks, and cuts the cards; the undo goes to `out`."""
    import sys

    from gpuplan.errors import InputError
    from gpuplan.export import apply

    undo = (out / "nvidia-smi-undo.sh" if out.is_dir() else out) if out else Path("nvidia-smi-undo.sh")
    if not yes and not sys.stdin.isatty():
        raise InputError("there is no terminal to ask on", key="--apply", allowed="a terminal, or --yes")

    def confirm(commands: list[str]) -> bool:
        typer.echo("\n".join(commands))
        return yes or typer.confirm("Run these on this machine? Whatever uses the cards is ended")

    def keep(text: str) -> None:
        try:
            undo.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write: {error.strerror}", key="--out", value=str(error.filename)) from None

    if apply.apply(told, confirm=confirm, keep_undo=keep, run=apply.run_command):
        typer.echo(f"done; `sh {undo}` brings the cards back")
    else:
        typer.echo("nothing was changed")
