"""Cards and layouts as text: cells to scale, and no assumed figure without its mark."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from gpuplan.hardware.catalog import GPUS, gpu
from gpuplan.report import gpus

A100 = gpu("a100-80gb")


def text(renderable: Any) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


@pytest.mark.parametrize(
    ("instances", "line"),
    [
        ([], "|  .   .   .   . |"),  # nothing is created yet
        ([("4g", 0, 4)], "|4g             |"),
        ([("2g", 0, 2), ("1g", 3, 1)], "|2g     | . |1g |"),
        ([("a-long-name", 1, 1)], "| . |a-l| .   . |"),  # cut to its cell, never over the next one
    ],
)
def test_a_card_s_cells(instances: list[gpus.Instance], line: str) -> None:
    drawn = gpus.cells_line(instances, 4, columns=4)
    assert len(drawn) == 17
    assert [c for c in drawn if c != " "] == [c for c in line if c != " "]
    assert [i for i, c in enumerate(drawn) if c == "|" and i % 4] == [], "boxes end where cells do"


def test_layouts_are_drawn_to_one_scale_with_every_name_whole() -> None:
    layouts = [([("3g.40gb", 4, 4), ("1g.10gb+me", 0, 1)], False), ([("7g.80gb", 0, 8)], True)]
    numbers, first, second = gpus.layout_lines(layouts, 8)
    assert numbers.split() == list("01234567")
    assert first.startswith("  |1g.10gb+me|") and "|3g.40gb " in first
    assert second.startswith("* |7g.80gb ") and len(second) == len(first)
    assert first.index("3g.40gb") == numbers.index("4"), "under its cell's number"


def test_a_machine_without_a_driver_s_words_in_markup() -> None:
    found = [
        gpus.Found(
            0, "NVIDIA A100-SXM4-80GB", A100, 80 << 30, True, [("3g.39gb", 4, 4)], (), ["3g.40gb is called 3g.39gb"]
        ),
        gpus.Found(1, "[red]\x1bnew", None, 10 << 30, None),
        gpus.Found(2, "NVIDIA H100 PCIe", gpu("h100-pcie"), 80 << 30, True),  # cut into nothing yet
        gpus.Found(3, "NVIDIA H100 PCIe", gpu("h100-pcie"), 80 << 30, True, [], ["1g.10gb", "3g.40gb"]),
    ]
    table = text(gpus.machine(found))
    assert "a100-80gb 80.0 on" in " ".join(table.split())
    assert "[red]\N{REPLACEMENT CHARACTER}new" in table and "not in the catalogue 10.0 none" in " ".join(table.split())
    lines = list(gpus.machine_lines(found))
    assert lines[0].split() == ["gpu0", *"01234567"]
    assert lines[1].strip().endswith("|3g.39gb" + " " * (4 * gpus.COLUMNS_MIN - 8) + "|")
    assert lines[2] == "gpu0: 3g.40gb is called 3g.39gb"
    assert lines[4].split() == ["|", *"." * 8, "|"]
    assert lines[5:] == ["gpu3: 1g.10gb, 3g.40gb: where they stand is told to administrators only"]


@pytest.mark.parametrize("card", GPUS.values(), ids=lambda card: card.name)
def test_what_is_assumed_says_so_wherever_it_is_shown(card: Any) -> None:
    shown = "\n".join(gpus.card_lines(card))
    assert f"~{card.idle_power_w:.0f} W idle" in shown
    assert card.price_source in shown
    assert ("~" + f"{card.price_per_hour:.2f}" in shown) == ("price_per_hour" in card.assumed)
    assert f"{'~' * ('sm_count' in card.assumed)}{card.sm_count} SMs" in shown.splitlines()[1]
    for line, profile in zip(text(gpus.profile_table(card)).splitlines()[1:], card.profiles, strict=True):
        assert ("~" in line) == bool(profile.assumed), line
    row = next(line for line in text(gpus.catalog_table([card])).splitlines() if line.startswith(card.name))
    assert ("~" in row) == bool(card.assumed - {"idle_power_w", "sm_clock_hz", "l2_bytes"}), "of what the row shows"


def test_every_price_leads_to_its_source() -> None:
    cards = list(GPUS.values())
    table, lines = text(gpus.catalog_table(cards)), list(gpus.price_lines(cards))
    for card in cards:
        row = next(line for line in table.splitlines() if line.split()[:1] == [card.name])
        number = row[row.index("[") : row.index("]") + 1]
        assert f"{number} {card.price_source}" in lines


def test_an_engine_that_is_not_known_is_a_question_mark() -> None:
    row = replace(A100, profiles=gpu("b200").profiles[2:3])
    assert "? ? 0 ? ?" in text(gpus.profile_table(row))
