"""Lines of progress: none for a short simulation, one every few seconds for a long one, none where nobody asked."""

from __future__ import annotations

from typing import Any

import pytest

from gpuplan.policy.vocabulary import Wake
from gpuplan.report import simulating
from gpuplan.report.simulating import EVENTS_EACH, SimulationDisplay


def lines(
    clock_s: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, **how: Any
) -> list[str]:
    """What is shown of a simulation of 100 s when the clock says so at each look."""
    times = iter([0.0, *[t for t in clock_s for _ in (0, 1)]])
    monkeypatch.setattr(simulating.time, "monotonic", lambda: next(times))
    with SimulationDisplay("one", duration_s=100.0, **how) as display:
        for i in range(len(clock_s)):
            for _ in range(EVENTS_EACH):
                display.decided(Wake(), [], now_s=10.0 * (i + 1))
    return capsys.readouterr().err.splitlines()


def test_a_short_simulation_shows_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines([0.2, 0.5], capsys, monkeypatch) == []


def test_a_long_one_shows_where_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines([2.0], capsys, monkeypatch) == ["one: 10 of 100 s simulated"]
    assert lines([2.0], capsys, monkeypatch, seeds=4) == ["one: 10 of 100 s simulated, 0 of 4 other seeds done"]


def test_who_wants_json_gets_nothing_else(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines([2.0, 20.0], capsys, monkeypatch, quiet=True) == []
