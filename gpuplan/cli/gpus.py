"""`gpuplan gpus`"""

from __future__ import annotations

import typer


def gpus(
    name: str | None = typer.Argument(None, help="A card of the catalogue: lists its MIG layouts."),
    as_json: bool = typer.Option(False, "--json", help="Print as JSON."),
) -> None:
    """List the GPUs of this machine and of the catalogue, or the MIG layouts of one.

    Example: gpuplan gpus a100-80gb
    """
    import json

    import msgspec
    from rich.console import Console
    from rich.table import Table

    from gpuplan.hardware import catalog, mig
    from gpuplan.telemetry import nvml

    if name is not None:
        card = catalog.gpu(name, key="NAME")
        layouts = {"valid": mig.valid_layouts(card), "maximal": mig.maximal_layouts(card)}
        if as_json:
            typer.echo(json.dumps({"gpu": card.name, **layouts}))
            return
        typer.echo(f"{card.name}: {len(layouts['valid'])} valid layouts; to these no slice can be added:")
        for layout in layouts["maximal"]:
            typer.echo("  " + " + ".join(layout))
        return
    here = nvml.discover()
    if as_json:
        typer.echo(json.dumps({"here": msgspec.to_builtins(here), "catalog": msgspec.to_builtins(catalog.GPUS)}))
        return
    for found in here:
        typer.echo(f"gpu{found.index}: {found.product}, MIG {'on' if found.mig_enabled else 'off'}")
    if not here:
        typer.echo("no NVIDIA driver: emulated cards and the CPU only")
    table = Table("card", "memory GiB", "TB/s", "fp16 TFLOP/s", "SMs", "W", "$ / h", "MIG profiles", box=None)
    for known in catalog.GPUS.values():
        table.add_row(
            known.name,
            f"{known.memory_bytes / catalog.GIB:.0f}",
            f"{known.bandwidth_bytes_per_s / 1e12:.2f}",
            f"{known.flops.fp16 / 1e12:.0f}",
            str(known.sm_count),
            f"{known.power_limit_w:.0f}",
            f"{known.price_per_hour:.2f}",
            " ".join(p.name for p in mig.profiles(known)) or "none",
        )
    Console().print(table)
