"""Cutting the cards of a machine: asked first, never while they are used, and with the way back kept."""

from __future__ import annotations

from typing import Any

import pytest

from gpuplan.errors import InputError, RunError
from gpuplan.export.apply import apply
from gpuplan.telemetry import nvml
from tests.telemetry.conftest import Play, fake_library, play  # noqa: F401
from tests.telemetry.nvml_fake import a100, sliced

from .plans import planned, planned_of

PLAN = planned(chat={})
REFUSED = "fail DeviceGetComputeRunningProcesses 4\nfail DeviceGetComputeRunningProcesses_v2 4\n"
IDLE = a100().replace("processes 2", "processes 0")


class Machine:
    """Plays nvidia-smi, and keeps what was asked of it and of the user."""

    def __init__(self, *, answer: bool = True, fails: str = "nothing") -> None:
        self.ran: list[str] = []
        self.asked: list[str] = []
        self.undo = ""
        self._answer, self._fails = answer, fails

    def run(self, words: tuple[str, ...]) -> tuple[int, str]:
        assert self.undo, "the way back is kept before anything is changed"
        self.ran.append(" ".join(words))
        return (7, "In use by\nanother client") if self._fails in words else (0, "")

    def confirm(self, commands: list[str]) -> bool:
        self.asked = commands
        return self._answer

    def keep(self, text: str) -> None:
        self.undo = text

    def apply(self, plan: dict[str, Any] = PLAN) -> bool:
        return apply(plan, confirm=self.confirm, keep_undo=self.keep, run=self.run)


def test_it_asks_and_then_runs_what_it_showed(play: Play) -> None:  # noqa: F811
    play(IDLE)
    machine = Machine(fails="-dci")  # there may be nothing to destroy
    assert machine.apply()
    assert [line.removesuffix(" || true") for line in machine.asked] == machine.ran
    assert machine.ran == [
        "nvidia-smi -i 0 -mig 1",
        "nvidia-smi mig -i 0 -dci",
        "nvidia-smi mig -i 0 -dgi",
        "nvidia-smi mig -i 0 -cgi 4g.40gb:0,2g.20gb:4,1g.10gb:6 -C",
    ]
    assert machine.undo.splitlines()[-1] == "nvidia-smi -i 0 -mig 0"


def test_no_means_no(play: Play) -> None:  # noqa: F811
    play(IDLE)
    machine = Machine(answer=False)
    assert not machine.apply() and machine.asked and not machine.ran and not machine.undo


def test_the_way_back_is_to_the_layout_that_was_there(play: Play) -> None:  # noqa: F811
    play(sliced(gpm=False).replace("processes 1", "processes 0"))
    machine = Machine()
    assert machine.apply()
    assert machine.undo.splitlines()[-3:] == [
        "nvidia-smi mig -i 0 -dci || true",
        "nvidia-smi mig -i 0 -dgi || true",
        "nvidia-smi mig -i 0 -cgi 3g.40gb:4,1g.10gb:0,1g.10gb:1 -C",
    ]


@pytest.mark.parametrize(
    ("card", "said"),
    [
        (a100(), r"processes use card 0 \(pid 100, 101\): nothing was changed"),
        (sliced(gpm=False), "processes use card 0"),  # in a slice of it
        (IDLE + "drawing 1\n", r"processes use card 0 \(pid 200\)"),
        (a100().replace("processes 2", ""), "the driver does not say which processes use card 0"),
        (REFUSED + a100(), "does not say"),
        (IDLE + "fail DeviceGetComputeRunningProcesses 15\n", "does not say"),  # the card is lost
    ],
)
def test_never_while_a_card_is_used_or_may_be(card: str, said: str, play: Play) -> None:  # noqa: F811
    play(card)
    machine = Machine()
    with pytest.raises(RunError, match=said):
        machine.apply()
    assert not machine.asked and not machine.ran


def test_a_process_that_comes_while_the_user_thinks(play: Play) -> None:  # noqa: F811
    play(IDLE)
    machine = Machine()

    def confirm(commands: list[str]) -> bool:
        play(a100())
        return True

    with pytest.raises(RunError, match="processes use card 0"):
        apply(PLAN, confirm=confirm, keep_undo=machine.keep, run=machine.run)
    assert not machine.ran and not machine.undo


def test_it_stops_where_a_command_fails(play: Play) -> None:  # noqa: F811
    play(IDLE)
    machine = Machine(fails="-mig")
    with pytest.raises(RunError, match="-mig 1 failed with exit code 7: In use by another client"):
        machine.apply()
    assert len(machine.ran) == 1


@pytest.mark.parametrize(
    ("cards", "plan", "said"),
    [
        ("", PLAN, r"the plan has 1 card\(s\) and this machine 0"),
        (IDLE, planned_of({f"m{i}": {} for i in range(4)}), r"the plan has 2 card\(s\) and this machine 1"),
        (IDLE.replace("A100-SXM4-80GB", "H100_80GB_HBM3"), PLAN, "card 0 is no a100-80gb"),
        (IDLE, planned_of({"mood": {}}, gpu=False), "no GPU to cut"),
    ],
)
def test_only_the_plan_s_own_cards(cards: str, plan: dict[str, Any], said: str, play: Play) -> None:  # noqa: F811
    play(cards)
    machine = Machine()
    with pytest.raises(InputError, match=said):
        machine.apply(plan)
    assert not machine.ran


def test_processes_on_each_card(play: Play) -> None:  # noqa: F811
    play(a100() + sliced(gpm=False) + IDLE.replace("GPU-1", "GPU-3"))
    assert nvml.processes() == {0: [100, 101], 1: [100], 2: []}
