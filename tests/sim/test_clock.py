"""Of many steps in a row the whole is known, and where they are cut; the spread is that of the measured ratios."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuplan.hardware.roofline import StepLoad
from gpuplan.sim.clock import StepClock

RATIOS = (0.5, 1.0, 2.0)


def mean_s(load: StepLoad) -> float:
    return 0.010 + 1e-6 * load.context_tokens


def decodes(count: int, context: int = 0) -> StepLoad:
    return StepLoad(0, 0, count, context, count)


def test_without_a_spread_a_step_takes_its_mean() -> None:
    clock = StepClock(mean_s, (), "")
    assert clock.begin(decodes(1, 1000), 1) == pytest.approx(0.011)
    one_by_one = sum(mean_s(decodes(3, 1000 + 3 * i)) for i in range(9))
    assert clock.begin(decodes(3, 1000), 9) == pytest.approx(one_by_one), "their contexts grow"


def test_draws_come_from_the_spread_and_repeat_with_the_seed() -> None:
    first, second, other = (StepClock(mean_s, RATIOS, seed) for seed in ("a", "a", "b"))
    drawn = [(first.begin(decodes(1), 1), first.ran(1))[0] for _ in range(5000)]
    assert {round(s, 9) for s in drawn} == {0.005, 0.010, 0.020}
    assert statistics.mean(drawn) == pytest.approx(0.010 * statistics.mean(RATIOS), rel=0.03)
    assert drawn == [(second.begin(decodes(1), 1), second.ran(1))[0] for _ in range(5000)]
    assert drawn != [(other.begin(decodes(1), 1), other.ran(1))[0] for _ in range(5000)]


@given(
    ratios=st.sampled_from([(), RATIOS]),
    runs=st.lists(st.tuples(st.integers(1, 64), st.integers(0, 9), st.floats(0.0, 1.2)), min_size=1, max_size=60),
)
def test_steps_in_a_row_take_as_long_as_one_by_one(
    ratios: tuple[float, ...], runs: list[tuple[int, int, float]]
) -> None:
    """Cut short or not: the same draws in the same order, to the end of the step that runs. With a spread, contexts
    that grow are taken to be evenly spread over the draws."""
    together, alone = StepClock(mean_s, ratios, "s"), StepClock(mean_s, ratios, "s")
    for steps, count, share in runs:
        count *= not ratios
        whole_s = together.begin(decodes(count, 100), steps)
        ran, seconds = (steps, whole_s) if share >= 1 else together.cut(share * whole_s)
        together.ran(ran)
        ends_s = [0.0]
        for i in range(ran):
            ends_s.append(ends_s[-1] + alone.begin(decodes(count, 100 + count * i), 1))
            alone.ran(1)
        assert 1 <= ran <= steps
        assert seconds == pytest.approx(ends_s[-1])
        if share < 1:
            assert ends_s[-2] - 1e-9 <= share * whole_s <= ends_s[-1] + 1e-9
