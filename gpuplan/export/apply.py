"""Cuts this machine's cards as planned: the one export that is ever carried out, and only when asked and confirmed.

Refused while a process uses a card that is to be cut, where the driver does not say, and where the cards are not those
of the plan. Asked again after the confirmation, since that takes time.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable

from gpuplan.errors import InputError, RunError
from gpuplan.export import nvidia_smi, reading
from gpuplan.export.reading import Plan
from gpuplan.telemetry import nvml

TIMEOUT_S = 120.0
Run = Callable[[tuple[str, ...]], tuple[int, str]]
"""Runs a command: its exit code, and what it said."""


def apply(plan: Plan, *, confirm: Callable[[list[str]], bool], keep_undo: Callable[[str], None], run: Run) -> bool:
    """Whether the cards were cut: not where `confirm`, which gets the commands, says no. `keep_undo` gets the script
    that brings back what was there, before anything is changed.

    Raises InputError for a plan that is not for this machine's cards, RunError for cards in use and for a command that
    fails; those before it have been carried out then.
    """
    before = _checked(plan)
    commands = nvidia_smi.cutting(plan)
    if not confirm([command.line for command in commands]):
        return False
    _unused(plan)
    keep_undo(nvidia_smi.undo(plan, before))
    for command in commands:
        code, said = run(command.words)
        if code and not command.may_fail:
            raise RunError(f"{command.line} failed with exit code {code}: {' '.join(said.split()) or 'no message'}")
    return True


def run_command(words: tuple[str, ...]) -> tuple[int, str]:
    """Runs it, for at most two minutes. Raises RunError where there is no such program, and when it takes longer."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)  # noqa: S603
    except FileNotFoundError:
        raise RunError(f"there is no {words[0]} on this machine") from None
    except subprocess.TimeoutExpired:
        raise RunError(f"{' '.join(words)} did not end within {TIMEOUT_S:g} s") from None
    return done.returncode, done.stdout + done.stderr


def _checked(plan: Plan) -> list[nvml.Card]:
    """This machine's cards as they are now, when they are those of the plan and nobody uses them."""
    layouts = reading.layouts(plan)
    wanted = [str(layout["gpu"]) for layout in layouts for _ in range(layout["count"])]
    here, problems = nvml.survey()
    if len(here) < len(wanted):
        why = f": {'; '.join(problems)}" if problems else ""
        raise InputError(f"the plan has {len(wanted)} card(s) and this machine {len(here)}{why}", key="--apply")
    for card, name in zip(here, wanted, strict=False):
        if card.known_as != name:
            found = f"{card.product} ({card.known_as or 'not in the catalogue'})"
            raise InputError(f"card {card.index} is no {name}", key="--apply", value=found)
    _unused(plan)
    return here


def _unused(plan: Plan) -> None:
    """Raises RunError while a card that is to be cut is used, or may be."""
    users = nvml.processes()
    for index in nvidia_smi.cards(plan):
        found = users.get(index)
        if found is None:
            raise RunError(f"the driver does not say which processes use card {index}: nothing was changed")
        if found:
            shown = ", ".join(map(str, found[:8])) + (", ..." if len(found) > 8 else "")
            raise RunError(f"processes use card {index} (pid {shown}): nothing was changed")
