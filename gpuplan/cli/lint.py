"""`gpuplan lint FILE`"""

from __future__ import annotations

from pathlib import Path

import typer


def lint(
    file: Path = typer.Argument(..., help="YAML with a HorizontalPodAutoscaler or a KEDA ScaledObject."),
    as_json: bool = typer.Option(False, "--json", help="Print the findings as JSON."),
) -> None:
    """Say what will not work in an autoscaler's file: exit code 1 when something is found.

    Example: gpuplan lint keda.yaml
    """
    import json
    from dataclasses import asdict

    from gpuplan.export.lint import lint as findings_of

    findings = findings_of(file)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], default=str))
    else:
        for finding in findings:
            typer.echo(str(finding))
        if not findings:
            typer.echo(f"{file}: nothing found")
    if findings:
        raise typer.Exit(1)
