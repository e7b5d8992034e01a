"""Who goes next: priorities, deadlines, ageing; and nobody starves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuplan.policy.breaker import Breaker
from gpuplan.policy.line import Line
from gpuplan.policy.state import ClassState, ModelState, Sequence
from gpuplan.scenario.demand import BatchingSpec, BreakerSpec, ClassSpec

AGEING_S = 10.0


def ahead(line: Line, priority: int) -> tuple[int, int, int]:
    of = line.ahead_of(priority)
    return of.requests, of.prompt_tokens, of.kv_tokens


def waiting(request_id: int, arrived_s: float, priority: int = 0, deadline_s: float | None = None) -> Sequence:
    model = ModelState("llm", True, BatchingSpec(), [], Breaker("llm", BreakerSpec()))
    traffic = ClassState("", ClassSpec(priority=priority))
    return Sequence(request_id, model, traffic, 10, 5, arrived_s, deadline_s=deadline_s)


def order(line: Line) -> list[int]:
    """Everybody goes, one after the other."""
    gone = []
    while (s := line.head()) is not None:
        line.remove(s)
        gone.append(s.request_id)
    return gone


TABLES: dict[str, tuple[list[Sequence], list[int]]] = {
    "first come, first served": ([waiting(2, 1.0), waiting(1, 0.0), waiting(3, 2.0)], [1, 2, 3]),
    "the earliest deadline first": (
        [waiting(1, 0.0, deadline_s=9.0), waiting(2, 1.0, deadline_s=3.0), waiting(3, 2.0, deadline_s=5.0)],
        [2, 3, 1],
    ),
    "without a deadline: one a minute after the arrival": (
        [waiting(1, 0.0), waiting(2, 1.0, deadline_s=59.0), waiting(3, 2.0, deadline_s=61.0)],
        [2, 1, 3],
    ),
    "the lower priority first": ([waiting(1, 0.0, 2), waiting(2, 1.0, 1), waiting(3, 2.0, 0)], [3, 2, 1]),
    "whatever the deadlines": ([waiting(1, 0.0, 1, deadline_s=0.1), waiting(2, 1.0, 0, deadline_s=50.0)], [2, 1]),
    "but not before one that has waited so much longer": (
        [waiting(1, 0.0, 1), waiting(2, 9.9, 0), waiting(3, 10.1, 0)],
        [2, 1, 3],  # 10.1 s longer than the third, 9.9 s longer than the second
    ),
    "twice as much for two priorities": ([waiting(1, 0.0, 2), waiting(2, 19.9, 0), waiting(3, 20.1, 0)], [2, 1, 3]),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_order(name: str) -> None:
    arrivals, expected = TABLES[name]
    line = Line(AGEING_S)
    for s in arrivals:
        line.push(s)
    assert order(line) == expected


def test_what_goes_before_a_priority() -> None:
    line = Line(AGEING_S)
    assert ahead(line, 3) == (0, 0, 0)
    line.push(waiting(1, 0.0, 1))
    assert (ahead(line, 0), ahead(line, 1)) == ((0, 0, 0), (1, 10, 15))
    line.push(waiting(2, 0.0, 0))
    assert (ahead(line, 0), ahead(line, 1)) == ((1, 10, 15), (2, 20, 30))


CLASSES = st.tuples(st.integers(0, 3), st.sampled_from([None, 0.5, 5.0, 100.0]))


@given(st.lists(st.one_of(CLASSES, st.integers(0, 30), st.just("next")), max_size=200))
def test_it_counts_those_who_are_there(happenings: list[object]) -> None:
    """Whoever comes, goes, or leaves from the middle: counts and heads are those of the living."""
    line, there = Line(AGEING_S), {}
    for now, happening in enumerate(happenings):
        match happening:
            case (int(priority), patience):
                deadline_s = None if patience is None else now + patience
                there[now] = waiting(now, float(now), priority, deadline_s)
                line.push(there[now])
            case int(which) if there:
                line.remove(there.pop(sorted(there)[which % len(there)]))
            case "next" if there:
                head = line.head()
                assert head is not None
                line.remove(there.pop(head.request_id))
        assert len(line) == len(there) and {s.request_id for s in line} == set(there)
        assert ahead(line, 9) == (len(there), 10 * len(there), 15 * len(there))
        assert (line.head() is None) == (not there)
    assert sorted(order(line)) == sorted(there)


@given(st.integers(0, 9), st.sampled_from([None, 0.1, 30.0]))
def test_nobody_starves(priority: int, patience: float | None) -> None:
    """One request against a flood of the most urgent, each with the tightest deadline: its turn comes when it has waited
    for the patience of one without a deadline, and `ageing` for each priority."""
    line = Line(AGEING_S)
    line.push(waiting(0, 0.0, priority, deadline_s=patience))
    for second in range(1, 400):
        line.push(waiting(second, float(second), 0, deadline_s=second + 0.1))
        head = line.head()
        assert head is not None
        line.remove(head)
        if head.request_id == 0:
            assert second <= 60.0 + AGEING_S * priority + 2
            return
    raise AssertionError("it never went")


def test_those_who_have_left_take_no_memory() -> None:
    line = Line(AGEING_S)
    line.push(waiting(0, 0.0, deadline_s=0.0))  # it stays at the top, and nobody looks
    for i in range(1, 10_000):
        s = waiting(i, float(i))
        line.push(s)
        line.remove(s)
    assert len(line) == 1 and len(line._levels[0].heap) < 40
