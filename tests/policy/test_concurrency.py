"""The limit settles where memory and speed allow, and no single step moves it."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuplan.policy.concurrency import CALM_STEPS, CALM_WINDOWS, WINDOW, ConcurrencyLimit

Seconds = Callable[[int], float]


def run(
    limit: ConcurrencyLimit,
    steps: int,
    seconds: Seconds,
    *,
    demand: int = 10**9,
    expected: Seconds | None = None,
    noise: float = 0.0,
) -> list[int]:
    """The limit after each of `steps` steps that carry as many as there are and may; each takes up to a share of
    `noise` more or less than it says."""
    dice, limits = random.Random(7), []
    for _ in range(steps):
        carried = min(limit.limit, demand)
        took_s = seconds(carried) * (1.0 + dice.uniform(-noise, noise))
        limit.step_done(carried, took_s, expected(carried) if expected else None)
        limits.append(limit.limit)
    return limits


def linear(fixed_s: float, each_s: float) -> Seconds:
    return lambda batch: fixed_s + each_s * batch


# --- memory -------------------------------------------------------------------------------------------------------


def test_memory_comes_back_slowly() -> None:
    limit = ConcurrencyLimit(8)
    limit.out_of_memory(8)
    assert limit.limit == limit.memory_limit == 4
    limit.out_of_memory(6)
    assert limit.limit == 3
    limit.out_of_memory(8)  # as many as were let in before it fell
    assert limit.limit == 3
    assert run(limit, CALM_STEPS - 1, linear(1, 1))[-1] == 3
    limit.out_of_memory(2)  # it starts counting again
    assert limit.limit == 1
    limit.out_of_memory(1)
    assert limit.limit == 1
    limits = run(limit, CALM_STEPS * 8, linear(1, 1))
    assert [limits.index(n) for n in range(2, 9)] == [CALM_STEPS * n - 1 for n in range(1, 8)]
    assert limits[-1] == 8


def test_steps_that_are_not_full_do_not_show_that_there_is_memory() -> None:
    limit = ConcurrencyLimit(64)
    limit.out_of_memory(64)
    assert run(limit, 1000, linear(1, 1), demand=28)[-1] == 32
    assert run(limit, CALM_STEPS, linear(1, 1), demand=29)[-1] == 33


def test_where_nothing_is_known_it_stays_at_most() -> None:
    assert set(run(ConcurrencyLimit(64), 1000, linear(1, 1), noise=0.5)) == {64}


# --- a target -----------------------------------------------------------------------------------------------------

MODELS = [  # step_s = fixed + each * batch; the target; the most; the largest batch that holds the target
    (0.020, 0.0001, 0.02515, 256, 51),  # a decoder: nearly all of a step is reading the weights
    (0.000, 0.0010, 0.1005, 256, 100),  # nothing is fixed
    (0.005, 0.0020, 0.0500, 64, 22),
    (0.001, 0.0100, 0.0350, 8, 3),
    (0.001, 0.0010, 0.0021, 512, 1),
]


@pytest.mark.parametrize(("fixed_s", "each_s", "target_s", "most", "best"), MODELS)
def test_it_settles_on_the_largest_batch_that_holds_the_target(
    fixed_s: float, each_s: float, target_s: float, most: int, best: int
) -> None:
    limits = run(ConcurrencyLimit(most, target_step_s=target_s), 4000, linear(fixed_s, each_s))
    assert set(limits[800:]) == {best, best + 1}
    tried = limits[800:].count(best + 1) / len(limits[800:])
    assert tried == pytest.approx(1 / (CALM_WINDOWS + 2), rel=0.3), "the next size is tried now and then"


@pytest.mark.parametrize(("fixed_s", "each_s", "target_s", "most", "best"), MODELS)
def test_noise_costs_little(fixed_s: float, each_s: float, target_s: float, most: int, best: int) -> None:
    limits = run(ConcurrencyLimit(most, target_step_s=target_s), 4000, linear(fixed_s, each_s), noise=0.02)
    assert max(limits[800:]) <= best + max(2, 0.15 * best)
    assert min(limits[800:]) >= best - max(2, 0.15 * best)


def test_it_falls_fast_and_climbs_by_one() -> None:
    limit = ConcurrencyLimit(100, target_step_s=0.050)
    limits = run(limit, 5 * WINDOW, linear(0, 0.001))
    assert limits[WINDOW - 1 :: WINDOW] == [90, 81, 72, 64, 57]  # a tenth each
    limit = ConcurrencyLimit(100, target_step_s=0.098)
    assert run(limit, WINDOW, linear(0, 0.001))[-1] == 98  # by the share that it was over
    assert run(limit, 100 * WINDOW, lambda _: 9.0)[-1] == 1  # a target that nothing meets
    limit = ConcurrencyLimit(20, target_step_s=0.010)
    run(limit, 50 * WINDOW, linear(0, 0.001))
    assert limit.limit in (10, 11)
    limits = run(limit, (CALM_WINDOWS + 10) * WINDOW, linear(0, 0.0001))  # it has become ten times as fast
    assert [limits.index(n + 1) - limits.index(n) for n in range(12, 20)] == [WINDOW] * 8
    assert limits[-1] == 20


def test_calm_is_counted_anew_after_each_fall() -> None:
    limit = ConcurrencyLimit(10, target_step_s=1.0)
    assert run(limit, WINDOW, lambda _: 1.01)[-1] == 9
    assert run(limit, CALM_WINDOWS * WINDOW, lambda _: 0.5)[-1] == 9
    assert run(limit, WINDOW, lambda _: 1.01)[-1] == 8
    limits = run(limit, (CALM_WINDOWS + 1) * WINDOW, lambda _: 0.5)
    assert limits[-1] == 9 and limits[-2] == 8


def test_a_spike_does_nothing() -> None:
    limit = ConcurrencyLimit(32, target_step_s=0.050)
    for step in range(500):
        limit.step_done(32, 60.0 if step % WINDOW == 3 else 0.040, None)
        assert limit.limit == 32


def test_at_the_target_is_not_above_it() -> None:
    assert set(run(ConcurrencyLimit(32, target_step_s=0.5), 100, lambda _: 0.5)) == {32}


@pytest.mark.parametrize(
    ("demand", "expected"),
    [
        (31, 64),  # less than half the limit: that they are slow says nothing about it
        (32, 28),  # half of it: so many are too slow
        (40, 36),
    ],
)
def test_slow_steps_that_are_not_full(demand: int, expected: int) -> None:
    assert run(ConcurrencyLimit(64, target_step_s=1.0), WINDOW, lambda _: 9.0, demand=demand)[-1] == expected


def test_it_does_not_rise_for_steps_that_are_not_full() -> None:
    limit = ConcurrencyLimit(64, target_step_s=1.0)
    run(limit, 3 * WINDOW, lambda _: 9.0)
    low = limit.limit
    assert set(run(limit, 1000, lambda _: 0.1, demand=int(0.8 * low))) == {low}
    assert run(limit, WINDOW, lambda _: 0.1)[-1] == low + 1


def test_those_that_joined_before_it_fell_do_not_lower_it_again() -> None:
    limit = ConcurrencyLimit(64, target_step_s=1.0)
    run(limit, 2 * WINDOW, lambda _: 9.0)
    assert limit.limit == 51 and limit.memory_limit == 64, "they all fit into a step"
    for seconds in [9.0] * 1000 + [0.1] * 1000:
        limit.step_done(64, seconds, None)
    assert limit.limit == 51


def test_the_lower_limit_holds() -> None:
    limit = ConcurrencyLimit(64, target_step_s=0.0405)
    run(limit, 4000, linear(0, 0.001))
    assert limit.limit in (40, 41)
    limit.out_of_memory(40)
    assert limit.limit == 20
    limits = run(limit, CALM_STEPS * 60, linear(0, 0.001))
    assert limits[CALM_STEPS * 2 - 1] == 22
    assert limits[-1] in (40, 41), "memory is back, the target still holds"
    limit.out_of_memory(8)
    run(limit, 4 * WINDOW, linear(0, 0.02))  # each has become slower: a step of 4 takes 80 ms
    assert limit.limit == 2


# --- no target ----------------------------------------------------------------------------------------------------


def thrashing(batch: int) -> float:
    """As expected up to 24, then ever slower: more than twice from 29 on."""
    return (0.010 + 0.001 * batch) * (1.0 if batch <= 24 else 1.0 + 0.21 * (batch - 24))


@pytest.mark.parametrize("wrong_by", [0.3, 1.0, 5.0])
def test_a_slice_that_thrashes_gets_fewer(wrong_by: float) -> None:
    """However wrong the expectation is, as long as it is wrong by the same factor everywhere."""
    limit = ConcurrencyLimit(64)
    expected = linear(0.010 * wrong_by, 0.001 * wrong_by)
    assert set(run(limit, 100, thrashing, demand=8, expected=expected)) == {64}
    limits = run(limit, 4000, thrashing, expected=expected)
    assert set(limits[800:]) == {28, 29}
    assert set(run(limit, 100 * WINDOW, linear(0.010, 0.001), expected=expected)[-300:]) != {28, 29}, "it recovers"


def test_thrashing_through_noise() -> None:
    limit, expected = ConcurrencyLimit(64), linear(0.010, 0.001)
    run(limit, 100, thrashing, demand=8, expected=expected, noise=0.05)
    limits = run(limit, 4000, thrashing, expected=expected, noise=0.05)
    assert min(limits[800:]) >= 24 and max(limits[800:]) <= 30


def test_a_slice_that_is_slow_whatever_it_carries_gets_as_many() -> None:
    limit = ConcurrencyLimit(64)
    for times in (1.0, 5.0, 25.0):
        limits = run(limit, 20 * WINDOW, lambda _, s=times: s, expected=lambda _: 1.0)  # type: ignore[misc]
        assert min(limits) == (64 if times == 1.0 else 57), "it tries, and sees that fewer are no faster"
        assert limits[-1] == 64, "so it gives them back"


def test_what_is_best_may_be_seen_late_and_no_time_is_not_a_time() -> None:
    limit = ConcurrencyLimit(64)
    run(limit, 100, lambda _: 3.0, demand=8, expected=lambda _: 1.0)
    run(limit, 100, lambda _: 1.0, demand=8, expected=lambda _: 1.0)
    assert run(limit, WINDOW, lambda _: 2.0, expected=lambda _: 1.0)[-1] == 64
    assert run(limit, WINDOW, lambda _: 2.01, expected=lambda _: 1.0)[-1] == 63
    limit = ConcurrencyLimit(64)
    run(limit, 100, lambda _: 0.0, expected=lambda _: 1.0)
    assert set(run(limit, 100, lambda _: 1.0, expected=lambda _: 1.0)) == {64}


# --- whatever happens ---------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.integers(1, 64),
    st.one_of(st.none(), st.floats(1e-4, 10.0)),
    st.lists(
        st.tuples(
            st.integers(1, 64),
            st.sampled_from([0.0, 1e-6, 0.01, 1.0, 1e4]),
            st.one_of(st.none(), st.sampled_from([0.0, 1e-3, 1.0])),
            st.integers(0, 20),
        ),
        max_size=100,
    ),
)
def test_it_stays_between_one_and_most(
    most: int, target_s: float | None, moves: list[tuple[int, float, float | None, int]]
) -> None:
    limit = ConcurrencyLimit(most, target_step_s=target_s)
    for carried, seconds, expected_s, times in moves:
        if times == 20:
            limit.out_of_memory(carried)
            assert limit.memory_limit <= max(carried // 2, 1)
        for _ in range(times):
            before = limit.limit
            limit.step_done(carried, seconds, expected_s)
            assert limit.limit <= before + 1
        assert 1 <= limit.limit <= limit.memory_limit <= most
