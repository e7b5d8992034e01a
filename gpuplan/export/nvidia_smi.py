"""`nvidia-smi mig` commands that cut the cards as planned. They end what runs on those cards: nothing is run here."""

from __future__ import annotations

from typing import Any

from gpuplan.errors import InputError
from gpuplan.hardware.mig import WHOLE


def write(plan: dict[str, Any]) -> str:
    """A shell script. Slices are created at their planned start cells, in the plan's order, widest first. Raises
    InputError for a plan without a GPU."""
    lines = ["#!/bin/sh", "# Cuts the cards as planned. Whatever runs on them is ended.", "set -eu"]
    first = 0
    for layout in plan["mig"]["layouts"]:
        for card in range(layout["count"]):
            lines += _cut(first + card, [p for p in layout["placements"] if p["card"] == card])
        first += layout["count"]
    if not first:
        raise InputError("the plan has no GPU to cut", key="PLAN", value=plan["scenario"])
    return "\n".join(lines) + "\n"


def _cut(index: int, placements: list[dict[str, Any]]) -> list[str]:
    if [p["profile"] for p in placements] == [WHOLE]:
        return [f"nvidia-smi -i {index} -mig 0"]
    wanted = ",".join(f"{p['profile']}:{p['start']}" for p in placements)
    return [
        f"nvidia-smi -i {index} -mig 1",
        f"nvidia-smi mig -i {index} -dci || true",
        f"nvidia-smi mig -i {index} -dgi || true",
        f"nvidia-smi mig -i {index} -cgi {wanted} -C",
    ]
