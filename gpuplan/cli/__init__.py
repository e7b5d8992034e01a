"""Asked and answered: one file a command. Parse, call, print, exit code; nothing is computed here.

The one place where errors become exit codes: 0 done, 1 the run failed or missed what `--fail-on` asked, 2 bad input.
Commands import what they need when they run, so `--help` answers at once.
"""

from __future__ import annotations

import sys

import typer

from gpuplan import __version__
from gpuplan.cli import bench, explain, export, gpus, lint, models, plan, report, scenario, serve, simulate
from gpuplan.errors import GpuplanError

app = typer.Typer(
    name="gpuplan",
    help="Load tester and capacity planner for GPU inference.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
app.command()(bench.bench)
app.command()(simulate.simulate)
app.command()(plan.plan)
app.command()(report.report)
app.command()(explain.explain)
app.command()(serve.serve)
app.command()(export.export)
app.command()(lint.lint)
app.command()(gpus.gpus)
app.command()(models.models)
app.add_typer(scenario.app, name="scenario")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"gpuplan {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """The console script."""
    try:
        app()
    except GpuplanError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of a pipe has left: `gpuplan gpus | head`
        sys.stderr.close()
        sys.exit(1)
