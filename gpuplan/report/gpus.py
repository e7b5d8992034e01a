"""Cards in the terminal: what a machine has, the catalogue, one card's profiles, layouts drawn cell by cell.

Takes cards and instances as (name, start cell, width), gives lines and tables; computes nothing. A figure behind `~` is
assumed, `?` is not known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from rich.table import Table
from rich.text import Text

from gpuplan.hardware.catalog import WORDS, Gpu
from gpuplan.hardware.profiles import GIB, Profile
from gpuplan.hardware.roofline import Band, Cost
from gpuplan.hardware.shapes import ModelShape

Instance = tuple[str, int, int]
"""A slice to draw: its name, first cell and width in cells."""

COLUMNS_MIN = 5
"""Of a cell, also where no name needs them."""

LEGEND = "~ assumed, not confirmed; ? not known"


class Found(NamedTuple):
    """A card that is really there. `instances` are drawn, `unplaced` is what NVML names without its place;
    `differences`: what it says otherwise than the table."""

    gpu_index: int
    product: str
    card: Gpu | None
    memory_bytes: int
    mig_enabled: bool | None
    instances: Sequence[Instance] = ()
    unplaced: Sequence[str] = ()
    differences: Sequence[str] = ()


# --- drawings -----------------------------------------------------------------------------------------------------


def cells_line(instances: Iterable[Instance], cells: int, *, columns: int) -> str:
    """A card's memory cells in one line: a box for each instance, a dot for each free cell; `columns` a cell."""
    line = [" "] * (cells * columns) + ["|"]
    for cell in range(cells):
        line[cell * columns + columns // 2] = "."
    line[0] = "|"
    for name, start, width in instances:
        first, last = start * columns, (start + width) * columns
        line[first : last + 1] = ["|", *name.ljust(last - first - 1)[: last - first - 1], "|"]
    return "".join(line)


def drawn(layouts: Sequence[Sequence[Instance]], cells: int) -> list[str]:
    """Each layout as a line of cells, all to one scale under one row of cell numbers."""
    needed = (math.ceil((len(name) + 1) / width) for layout in layouts for name, _, width in layout)
    columns = max([COLUMNS_MIN, *needed])
    numbers = " " + "".join(str(cell).ljust(columns) for cell in range(cells))
    return [numbers.rstrip(), *(cells_line(layout, cells, columns=columns) for layout in layouts)]


def layout_lines(layouts: Sequence[tuple[Sequence[Instance], bool]], cells: int) -> Iterator[str]:
    """All layouts with whether a slice can still be added to each; `*` marks those to which none can."""
    numbers, *lines = drawn([instances for instances, _ in layouts], cells)
    yield f"  {numbers}"
    for (_, full), line in zip(layouts, lines, strict=True):
        yield f"{'*' if full else ' '} {line}"


# --- this machine -------------------------------------------------------------------------------------------------


def machine(found: Sequence[Found]) -> Table:
    """A row for each card of this machine."""
    table = _table("gpu", "product", "card", "GiB", "MIG")
    for one in found:
        state = "none" if one.mig_enabled is None else "on" if one.mig_enabled else "off"
        known = one.card.name if one.card else "not in the catalogue"
        table.add_row(str(one.gpu_index), _text(one.product), known, f"{one.memory_bytes / GIB:.1f}", state)
    return table


def machine_lines(found: Sequence[Found]) -> Iterator[str]:
    """The cells of every card that MIG cuts, and what a card says otherwise than the catalogue."""
    for one in found:
        if one.unplaced:
            yield f"gpu{one.gpu_index}: {', '.join(one.unplaced)}: where they stand is told to administrators only"
        elif one.mig_enabled:
            reach = max((start + width for _, start, width in one.instances), default=0)
            cells = one.card.profiles[0].cells if one.card and one.card.profiles else reach
            numbers, line = drawn([one.instances], max(cells, reach, 1))
            yield from (f"gpu{one.gpu_index}  {numbers}", f"      {line}")
        for sentence in one.differences:
            yield f"gpu{one.gpu_index}: {sentence}"


# --- the catalogue ------------------------------------------------------------------------------------------------


def catalog_table(cards: Iterable[Gpu]) -> Table:
    """A row for each card; the numbers in brackets are those of `price_lines`."""
    cards = list(cards)
    sources = _sources(cards)
    table = _table("card", "GiB", "TB/s", "fp16", "fp8", "fp4", "SMs", "W", "$ / h", "MIG", justify="right")
    for card in cards:
        table.add_row(
            card.name,
            f"{card.memory_bytes / GIB:.0f}",
            _figure(card, "bandwidth_bytes_per_s", f"{card.bandwidth_bytes_per_s / 1e12:.2f}"),
            *(_figure(card, "flops", _tflops(rate)) for rate in (card.flops.fp16, card.flops.fp8, card.flops.fp4)),
            _figure(card, "sm_count", str(card.sm_count)),
            _figure(card, "power_limit_w", f"{card.power_limit_w:.0f}"),
            Text(_figure(card, "price_per_hour", f"{card.price_per_hour:.2f}") + f" [{sources[card.price_source]}]"),
            str(max((p.slices for p in card.profiles), default="-")),
        )
    return table


def price_lines(cards: Iterable[Gpu]) -> Iterator[str]:
    """Where the prices of `catalog_table` come from, and what its columns mean."""
    yield f"fp16, fp8, fp4: dense TFLOP/s on tensor cores; MIG: compute slices; {LEGEND}"
    for source, number in _sources(cards).items():
        yield f"[{number}] {source}"


def card_lines(card: Gpu) -> Iterator[str]:
    """Everything the catalogue has of one card but its profiles."""
    f = card.flops
    rates = {"fp32 (TF32)": f.fp32, "fp16": f.fp16, "fp8": f.fp8, "int8": f.int8, "fp4": f.fp4}
    yield (
        f"{card.name} ({card.architecture}): {card.memory_bytes / GIB:.0f} GiB, "
        f"{_figure(card, 'bandwidth_bytes_per_s', f'{card.bandwidth_bytes_per_s / 1e12:.2f}')} TB/s, "
        f"{_figure(card, 'l2_bytes', f'{card.l2_bytes >> 20}')} MiB L2"
    )
    yield (
        f"{_figure(card, 'sm_count', str(card.sm_count))} SMs at up to "
        f"{_figure(card, 'sm_clock_hz', f'{card.sm_clock_hz / 1e6:.0f}')} MHz, "
        f"{_figure(card, 'power_limit_w', f'{card.power_limit_w:.0f}')} W, "
        f"{_figure(card, 'idle_power_w', f'{card.idle_power_w:.0f}')} W idle"
    )
    known = (f"{name} {_figure(card, 'flops', _tflops(rate))}" for name, rate in rates.items() if rate)
    yield "dense TFLOP/s: " + ", ".join(known)
    yield f"list price: {_figure(card, 'price_per_hour', f'{card.price_per_hour:.2f}')} $ / h ({card.price_source})"
    yield f"assumed: {', '.join(WORDS.get(field, field) for field in sorted(card.assumed))}"


def profile_table(card: Gpu) -> Table:
    """The card's MIG profiles. Engines: copy, decoders, encoders, JPEG, optical flow."""
    table = _table("profile", "id", "slices", "cells", "starts at", "at most", "GiB", "SMs", "engines")
    for p in card.profiles:
        e = p.engines
        table.add_row(
            p.name,
            "?" if p.profile_id is None else str(p.profile_id),
            str(p.slices),
            f"{_figure(p, 'starts', str(p.width))} of {p.cells}",
            _figure(p, "starts", " ".join(map(str, p.starts))),
            str(p.count_max),
            _figure(p, "memory_bytes", f"{p.memory_bytes / GIB:.2f}"),
            _figure(p, "sm_count", str(p.sm_count)),
            " ".join("?" if n is None else str(n) for n in (e.copy, e.nvdec, e.nvenc, e.jpeg, e.ofa)),
        )
    return table


# --- steps --------------------------------------------------------------------------------------------------------


def step_row(tokens: int, cost: Cost, band: Band, fits: bool) -> dict[str, Any]:
    """One row of a step table, in the units people read."""
    return {
        "tokens": tokens,
        "linear_layer_ms": cost.linear_layer_s * 1e3,
        "attention_layer_ms": cost.attention_layer_s * 1e3,
        "elementwise_layer_ms": cost.elementwise_layer_s * 1e3,
        "all_reduce_layer_ms": cost.all_reduce_layer_s * 1e3,
        "head_ms": cost.head_s * 1e3,
        "step_ms": cost.step_s * 1e3,
        "bound": cost.bound,
        "memory_bytes": cost.memory_bytes,
        "fits": fits,
        "linear_layer_band_percent": band.linear_layer_percent,
        "step_band_percent": band.step_percent,
    }


def step_table(rows: Sequence[dict[str, Any]]) -> Table:
    """What steps cost and on what they spend it: a layer's parts, then the whole."""
    table = _table(
        "tokens", "linear", "attention", "other", "cards", "head", "step ms", "bound by", "GiB", justify="right"
    )
    parts = ("linear_layer_ms", "attention_layer_ms", "elementwise_layer_ms", "all_reduce_layer_ms", "head_ms")
    for row in rows:
        memory = f"{row['memory_bytes'] / GIB:.1f}" + ("" if row["fits"] else " does not fit")
        figures = (*(f"{row[part]:.4f}" for part in parts), f"{row['step_ms']:.3f}")
        table.add_row(str(row["tokens"]), *figures, row["bound"], memory)
    return table


def step_lines(model: ModelShape, card: Gpu, part: Profile, band: Band, context: int | None) -> Iterator[str]:
    """What the rows of `step_table` are, and how far they are to be trusted."""
    what = "each a prompt" if context is None else f"one from each of so many sequences, {context} tokens of context"
    yield f"{model.name} on {card.name} {part.name}; tokens: {what}; emulated, not measured"
    yield f"linear, attention, other and cards (adding up over them): ms of one layer of {model.layers}; head, step: ms"
    off = f"{band.linear_layer_percent:g} % (linear) and {band.step_percent:g} % (step)"
    yield f"where checked, off on average by {off}; from {band.basis}"


def _figure(owner: Gpu | Profile, field: str, text: str) -> str:
    return f"~{text}" if field in owner.assumed and text != "-" else text


def _tflops(rate: float | None) -> str:
    return "-" if rate is None else f"{rate / 1e12:.0f}"


def _sources(cards: Iterable[Gpu]) -> dict[str, int]:
    return {source: i for i, source in enumerate(dict.fromkeys(card.price_source for card in cards), start=1)}


def _table(*headings: str, justify: Literal["left", "right"] = "left") -> Table:
    """The first column is a name, the others are justified alike."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for i, heading in enumerate(headings):
        table.add_column(heading, no_wrap=i == 0, justify=justify if i else "left")
    return table


def _text(line: str) -> Text:
    """A driver's text: no markup, no control characters."""
    return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line))
