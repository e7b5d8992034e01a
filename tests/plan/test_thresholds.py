"""Thresholds from loads of a made-up model whose queue and SLOs are known."""

from __future__ import annotations

from typing import Any

import pytest

from gpuplan.plan import thresholds
from gpuplan.plan.trials import Part
from gpuplan.scenario import deployment
from gpuplan.sim.many import Workers

from .conftest import scenario


class KnownTrials:
    """Holds its SLOs up to `breaks_at`; `queue(factor)` requests wait on average, twice as many at the p95."""

    def __init__(self, breaks_at: float, queue: Any, workers: int = 1) -> None:
        self.breaks_at, self.queue, self.workers = breaks_at, queue, Workers(workers)
        self.asked: list[float] = []

    def part(self, supply: Any, model: str, *, factor: float) -> Part:
        self.asked.append(factor)
        waiting = self.queue(factor)
        figures = {
            "meets_slos": factor < self.breaks_at,
            "overall": {"slo_attainment": 1.0, "rejected": 0},
            "models": {model: {"queue_depth": {"mean": waiting, "p95": 2 * waiting}}},
        }
        return Part(figures, 0.5)


def recommend(breaks_at: float, queue: Any, gpus: int = 1, workers: int = 1) -> dict[str, Any]:
    supply = deployment.resolve(scenario())
    return thresholds.recommend(KnownTrials(breaks_at, queue, workers), supply, "chat", gpus)  # type: ignore[arg-type]


def test_scale_up_lies_between_the_queue_that_holds_and_the_one_that_does_not() -> None:
    advice = recommend(5.0, lambda factor: factor**2)
    held = advice["evidence"][-2]
    missed = advice["evidence"][-1]
    assert held["rate_factor"] < 5 <= missed["rate_factor"]
    assert held["queue_depth_per_replica"] < advice["scale_up_at"] < missed["queue_depth_per_replica"]


def test_the_load_at_which_it_breaks_is_closed_in_on() -> None:
    advice = recommend(5.0, lambda factor: factor)
    assert advice["holds_up_to_factor"] > 4
    assert advice["evidence"][-1]["rate_factor"] / advice["holds_up_to_factor"] < 2**0.3


def test_scale_down_is_safe_with_one_replica_fewer() -> None:
    advice = recommend(5.0, lambda factor: factor)
    # From 2 replicas to 1: at most half of what holds, and a margin on top.
    assert advice["scale_down_at"] <= advice["holds_up_to_factor"] / 2 * thresholds.DOWN_MARGIN
    assert 0 < advice["scale_down_at"] <= advice["scale_up_at"] / 2


@pytest.mark.parametrize("breaks_at", [0.3, 0.8, 1.5, 2.0, 3.0, 5.0, 40.0, 64.0, 65.0, 1000.0])
def test_to_look_two_loads_ahead_changes_nothing(breaks_at: float) -> None:
    one, two = (recommend(breaks_at, lambda factor: factor, workers=n) for n in (1, 2))
    assert one == two


CASES = [
    (0.1, lambda f: 9.0, "no load that was simulated holds", "nothing holds"),
    (1e9, lambda f: 0.0, "hold at every load simulated, up to 64 x", "everything holds"),
]


@pytest.mark.parametrize(("breaks_at", "queue", "said", "why"), CASES, ids=[c[3] for c in CASES])
def test_the_ends_are_said(breaks_at: float, queue: Any, said: str, why: str) -> None:
    advice = recommend(breaks_at, queue)
    assert said in advice["reason"]
    assert advice["scale_up_at"] >= thresholds.QUEUE_MIN > advice["scale_down_at"]


def test_bounds_and_windows_come_from_the_deployment() -> None:
    advice = recommend(3.0, lambda factor: factor)
    assert (advice["min_replicas"], advice["max_replicas"]) == (1, 2), "as many times as cards are allowed"
    assert advice["cooldown_s"] == 45, "a replica that was asked for has to be there before the next is judged"
    assert advice["stabilization_window_s"] == 300
