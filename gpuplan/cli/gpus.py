"""`gpuplan gpus`"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuplan.hardware.catalog import Gpu
    from gpuplan.hardware.mig import Placement
    from gpuplan.report.gpus import Found
    from gpuplan.telemetry.nvml import Card


def gpus(
    name: str | None = typer.Argument(None, metavar="[CARD]", help="A card of the catalogue: its data and profiles."),
    catalog_: bool = typer.Option(False, "--catalog", help="Every card gpuplan knows."),
    layouts: bool = typer.Option(False, "--layouts", help="Draw every MIG layout that CARD can have."),
    place: str | None = typer.Option(None, help="Draw this layout of CARD, or say what does not fit: 4g.40gb,3g.40gb"),
    model: str | None = typer.Option(None, help="What steps of this model cost on CARD: a shape, or a config.json."),
    tokens: str = typer.Option("1,16,64,256,1024,4096", help="With --model: prompts of so many tokens."),
    context: int | None = typer.Option(None, min=0, help="With --model: --tokens sequences of this context decode."),
    slice_: str = typer.Option("whole", "--slice", help="With --model: the MIG profile."),
    tensor_parallel: int = typer.Option(1, min=1, max=64, help="With --model: how many such slices share it."),
    as_json: bool = typer.Option(False, "--json", help="Print as JSON."),
) -> None:
    """List the GPUs of this machine, the catalogue, what MIG can make of one card, or what a step costs there.

    Example: gpuplan gpus h100-80gb --layouts

    Example: gpuplan gpus a100-80gb --model llama-3-8b --tokens 1,64 --context 2048 --slice 3g.40gb
    """
    from gpuplan.cli import common
    from gpuplan.errors import InputError
    from gpuplan.hardware import catalog

    if name is None and (layouts or place or model):
        flag = "--layouts" if layouts else "--place" if place else "--model"
        raise InputError("needs a card", key=flag, allowed=f"e.g. gpuplan gpus h100-80gb {flag}")
    if name is not None:
        card = catalog.gpu(name, key="CARD")
        if model is not None:
            asked = _Asked(model, common.counts(tokens, key="--tokens"), context, slice_, tensor_parallel)
            _show_steps(card, asked, as_json=as_json)
        elif place is not None:
            _show_placed(card, [word.strip() for word in place.split(",")], as_json=as_json)
        elif layouts:
            _show_layouts(card, as_json=as_json)
        else:
            _show_card(card, as_json=as_json)
    elif catalog_:
        _show_catalog(as_json=as_json)
    else:
        _show_machine(as_json=as_json)


def _show_machine(*, as_json: bool) -> None:
    from rich.console import Console

    from gpuplan.hardware import catalog
    from gpuplan.report import gpus as report
    from gpuplan.telemetry import nvml

    here, problems = nvml.survey()
    if as_json:
        _print_json({"here": here, "problems": problems, "catalog": catalog.GPUS})
        return
    _print_lines(problems)
    if not here:
        why = "no card answers" if problems else "no NVIDIA driver"
        typer.echo(f"{why}: emulated cards only (gpuplan gpus --catalog)")
        return
    found = [_found(one, catalog.GPUS.get(one.known_as or "")) for one in here]
    Console().print(report.machine(found))
    _print_lines(report.machine_lines(found))


def _found(one: Card, card: Gpu | None) -> Found:
    from gpuplan.hardware import mig
    from gpuplan.report.gpus import Found

    named = [(i.profile.name if i.profile else f"instance {i.gpu_instance_id}", i) for i in one.instances]
    placed = [(name, i.start, i.width) for name, i in named if i.start is not None and i.width is not None]
    unplaced = [name for name, i in named if i.start is None]
    otherwise = mig.differences(card.profiles, one.profiles) if card and one.profiles else []
    return Found(one.index, one.product, card, one.memory_bytes, one.mig_enabled, placed, unplaced, otherwise)


@dataclass(frozen=True)
class _Asked:
    """The options of a step table."""

    model: str
    tokens: list[int]
    context: int | None
    part: str
    tensor_parallel: int


def _show_steps(card: Gpu, asked: _Asked, *, as_json: bool) -> None:
    from rich.console import Console

    from gpuplan.errors import InputError
    from gpuplan.hardware import mig, roofline
    from gpuplan.hardware.roofline import StepCosts, StepLoad
    from gpuplan.report import gpus as report
    from gpuplan.scenario import files

    shape = files.shape_named(asked.model, key="--model")
    part = mig.part(card, asked.part, key="--slice")
    if shape.heads % asked.tensor_parallel:
        divisors = ", ".join(str(n) for n in range(1, shape.heads + 1) if shape.heads % n == 0)
        raise InputError(
            f"must divide the {shape.heads} heads",
            key="--tensor-parallel",
            value=asked.tensor_parallel,
            allowed=divisors,
        )
    costs = StepCosts(shape, card, part, tensor_parallel=asked.tensor_parallel)
    band = roofline.band(card, part, shape)
    rows = []
    for n in asked.tokens:
        load = StepLoad.of_prompt(n) if asked.context is None else StepLoad.of_decodes(n, asked.context)
        rows.append(report.step_row(n, costs.cost(load), band, costs.fits(load)))
    if as_json:
        where = {"gpu": card.name, "slice": part.name, "model": shape.name, "context": asked.context}
        _print_json({**where, "tensor_parallel": asked.tensor_parallel, "band": band, "rows": rows})
        return
    Console().print(report.step_table(rows))
    _print_lines(report.step_lines(shape, card, part, band, asked.context))


def _show_catalog(*, as_json: bool) -> None:
    from rich.console import Console

    from gpuplan.hardware import catalog
    from gpuplan.report import gpus as report

    if as_json:
        _print_json({"catalog": catalog.GPUS})
        return
    cards = list(catalog.GPUS.values())
    Console().print(report.catalog_table(cards))
    _print_lines(report.price_lines(cards))


def _show_card(card: Gpu, *, as_json: bool) -> None:
    from rich.console import Console

    from gpuplan.hardware import mig
    from gpuplan.report import gpus as report

    valid, maximal = mig.valid_layouts(card), mig.maximal_layouts(card)
    if as_json:
        _print_json({"gpu": card.name, "card": card, "valid": valid, "maximal": maximal})
        return
    _print_lines(report.card_lines(card))
    if not card.profiles:
        typer.echo("no MIG: it cannot be cut")
        return
    Console().print(report.profile_table(card))
    typer.echo(f"engines: copy, decoders, encoders, JPEG, optical flow; {report.LEGEND}")
    typer.echo(f"{len(valid)} valid layouts (--layouts draws them); to these no slice can be added:")
    _print_lines("  " + " + ".join(layout) for layout in maximal)


def _show_layouts(card: Gpu, *, as_json: bool) -> None:
    from gpuplan.hardware import mig
    from gpuplan.report import gpus as report

    valid, maximal = mig.valid_layouts(card), set(mig.maximal_layouts(card))
    placed = [(mig.place(card, layout), layout in maximal) for layout in valid]
    if as_json:
        rows = [
            {"profiles": layout, "maximal": full, "placements": _rows(placements)}
            for layout, (placements, full) in zip(valid, placed, strict=True)
        ]
        _print_json({"gpu": card.name, "layouts": rows})
        return
    if not card.profiles:
        typer.echo(f"{card.name}: no MIG: it cannot be cut")
        return
    typer.echo(f"{card.name}: {len(valid)} valid layouts; * to these {len(maximal)} no slice can be added")
    drawable = [([(p.profile.name, p.start, p.profile.width) for p in ps], full) for ps, full in placed]
    _print_lines(report.layout_lines(drawable, card.profiles[0].cells))


def _show_placed(card: Gpu, names: list[str], *, as_json: bool) -> None:
    from gpuplan.hardware import mig
    from gpuplan.report import gpus as report

    placements = mig.place(card, names, key="--place")
    if as_json:
        _print_json({"gpu": card.name, "placements": _rows(placements)})
        return
    _print_lines(report.drawn([[(p.profile.name, p.start, p.profile.width) for p in placements]], _cells(placements)))
    typer.echo("create in this order: " + ", ".join(f"{p.profile.name}:{p.start}" for p in placements))


def _rows(placements: Sequence[Placement]) -> list[dict[str, Any]]:
    return [{"profile": p.profile.name, "start": p.start, "width": p.profile.width} for p in placements]


def _cells(placements: Sequence[Placement]) -> int:
    return placements[0].profile.cells


def _print_lines(lines: Any) -> None:
    for line in lines:
        typer.echo(line)


def _print_json(data: Any) -> None:
    import msgspec

    typer.echo(msgspec.json.encode(data, order="deterministic").decode())
