"""`nvidia-smi mig` commands that cut the cards as planned, and their undo. They end what runs on those cards: nothing
is run here (`apply` does, when asked).

Order, as the driver has it: MIG mode first; compute instances go before the GPU instances that hold them; slices are
created widest first, each at its planned start cell, so that no choice of the driver's can leave one without room. MIG
mode goes last, when no instance is left. What may find nothing to destroy may fail.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from gpuplan.export import reading, yaml_text
from gpuplan.export.reading import Plan
from gpuplan.hardware.mig import WHOLE
from gpuplan.telemetry.nvml import Card


class Command(NamedTuple):
    """What is run, without a shell. One that `may_fail` destroys what may not be there."""

    words: tuple[str, ...]
    may_fail: bool = False

    @property
    def line(self) -> str:
        """As a script has it."""
        return shlex.join(self.words) + (" || true" if self.may_fail else "")


def write(plan: Plan) -> str:
    """A shell script that cuts the cards. Raises InputError for a plan without a GPU."""
    return script(plan, "Cuts the cards as planned. Whatever runs on them is ended.", cutting(plan))


def undo(plan: Plan, before: Iterable[Card] = ()) -> str:
    """A shell script that brings the cards back: to the layouts of `before`, to uncut where it does not name them."""
    return script(plan, "Brings the cards back. Whatever runs on them is ended.", undoing(plan, before))


def script(plan: Plan, what: str, commands: Sequence[Command]) -> str:
    """The commands as a script that stops at the first that fails."""
    head = yaml_text.head(
        plan,
        what,
        from_plan=["profiles and start cells."],
        fill_in=[
            "-i, where the cards to cut are not the machine's first ones. A100 and A30 may need a reset for MIG mode."
        ],
    )
    return "\n".join(["#!/bin/sh", *head, "set -eu", *(command.line for command in commands)]) + "\n"


def cards(plan: Plan) -> dict[int, list[dict[str, Any]]]:
    """Each card's slices, by its index. Raises InputError for a plan without a GPU."""
    found = {}
    first = 0
    for layout in reading.layouts(plan):
        for card in range(layout["count"]):
            found[first + card] = [p for p in layout["placements"] if p["card"] == card]
        first += layout["count"]
    return found


def cutting(plan: Plan) -> list[Command]:
    """Every command, in order. Raises InputError for a plan without a GPU."""
    commands = []
    for index, placements in cards(plan).items():
        if [p["profile"] for p in placements] == [WHOLE]:
            commands += [*_cleared(index), _mode(index, on=False)]
        else:
            widest = sorted(placements, key=lambda p: (-int(p["width"]), int(p["start"])))
            wanted = [(str(p["profile"]), int(p["start"])) for p in widest]
            commands += [_mode(index, on=True), *_cleared(index), _created(index, wanted)]
    return commands


def undoing(plan: Plan, before: Iterable[Card] = ()) -> list[Command]:
    """The commands that bring the cards back to `before`; the last card first."""
    known = {card.index: card for card in before}
    commands = []
    for index in reversed(cards(plan)):
        commands += _cleared(index)
        card = known.get(index)
        if card is None or not card.mig_enabled:
            commands.append(_mode(index, on=False))
            continue
        there = sorted(card.instances, key=lambda i: (-(i.width or 0), i.start or 0))
        slices = [(i.profile.name, i.start) for i in there if i.profile is not None]
        if slices:
            commands.append(_created(index, slices))
    return commands


def _mode(index: int, *, on: bool) -> Command:
    return Command(("nvidia-smi", "-i", str(index), "-mig", str(int(on))))


def _cleared(index: int) -> list[Command]:
    return [Command(("nvidia-smi", "mig", "-i", str(index), what), may_fail=True) for what in ("-dci", "-dgi")]


def _created(index: int, slices: Sequence[tuple[str, int | None]]) -> Command:
    """The driver chooses the place of a slice whose start is None."""
    wanted = ",".join(name if start is None else f"{name}:{start}" for name, start in slices)
    return Command(("nvidia-smi", "mig", "-i", str(index), "-cgi", wanted, "-C"))
