"""What steps and requests should take."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuplan.hardware.roofline import StepLoad
from gpuplan.policy.cost import GUESS, Outputs, Pace, StepLine, pace_of, step_costs
from tests.policy.conftest import deployment

LINE = StepLine(fixed=0.010, prompt_token=0.001, decode=0.002, context_token=0.0001)
DECODES = StepLoad(0, 0, 4, 100, 4)  # 0.010 + 0.008 + 0.010


def test_a_step_by_its_parts() -> None:
    pace = Pace(LINE)
    assert pace.step_s(DECODES) == pytest.approx(0.028)
    assert pace.decode_step_s(4, 100) == pytest.approx(0.028)
    assert pace.alone_s(10) == pytest.approx(0.020)
    # 5 steps shared by 2, 10 prompt tokens, 5 tokens over a context of 12.5 on average
    assert pace.work_s(10, 5, 2.0) == pytest.approx(0.025 + 0.010 + 5 * (0.002 + 0.00125))


def test_it_follows_a_replica_that_has_become_slow_and_one_that_recovers() -> None:
    pace = Pace(LINE)
    for _ in range(60):
        pace.ran(DECODES, 5 * 0.028)
    assert pace.drift == pytest.approx(5, rel=0.1)
    for _ in range(60):
        pace.ran(DECODES, 0.028)
    assert pace.drift == pytest.approx(1, rel=0.25)
    pace.forget()
    assert pace.drift == 1.0


def test_one_hiccup_says_little() -> None:
    pace = Pace(LINE)
    for _ in range(20):
        pace.ran(DECODES, 0.028)
    pace.ran(DECODES, 100.0)
    assert pace.drift < 1.2


def test_without_a_roofline_nothing_is_known_until_a_step_has_run() -> None:
    pace = Pace(None)
    assert (pace.known, pace.step_s(DECODES), pace.work_s(100, 10, 4.0)) == (False, 0.0, 0.0)
    pace.ran(StepLoad(92, 0, 0, 0, 1), 2.0)  # GUESS: 8 and 92 parts
    assert pace.known and pace.drift == pytest.approx(0.02)
    assert pace.alone_s(92) == pytest.approx(2.0)
    assert GUESS.fixed == 8.0


@pytest.mark.parametrize("supply", [deployment(chat=[10_000]), deployment(mood=1)])
def test_the_line_is_near_the_roofline_it_was_drawn_through(supply: object) -> None:
    """Within a factor of 1.35 at sizes that are common: good enough to choose a replica, and drift does the rest."""
    replica = supply.replicas[0]  # type: ignore[attr-defined]
    costs, pace = step_costs(supply, replica), pace_of(supply, replica)  # type: ignore[arg-type]
    assert costs is not None and pace.by_roofline
    decoder = replica.role == "decoder"
    loads = [StepLoad(t, t * 100, 0, 0, t // 128) for t in (128, 512, 2048)]
    loads += [StepLoad(0, 0, n, n * c, n) for n in (1, 8, 32) for c in (100, 2000)] if decoder else []
    for load in loads:
        assert 1 / 1.35 < pace.step_s(load) / costs.step_s(load) < 1.35, load


@given(st.lists(st.tuples(st.integers(1, 1000), st.floats(0.0, 1.0)), min_size=1, max_size=50))
def test_what_is_expected_of_an_answer_lies_between_what_has_been(ended: list[tuple[int, float]]) -> None:
    outputs = Outputs()
    assert outputs.expected(100) == 100, "all of it, until something is known"
    shares = []
    for limit, share in ended:
        generated = round(limit * share)
        shares.append(generated / limit)
        outputs.ended(generated, limit)
    assert min(shares) * 100 - 1e-6 <= outputs.expected(100) <= max(shares) * 100 + 1e-6
