"""Whatever the load: bounds and steps are kept, nothing flaps, spikes buy nothing, and what lasts is followed.

The loop is closed: replicas come a cold start after they were asked for, and what is seen depends on how many there are.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import msgspec
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from gpuplan.policy.autoscaler import (
    SCALE_UP_WINDOW_S_MIN,
    SCALE_UP_WINDOW_SHARE,
    STEADY_S_MAX,
    Autoscaler,
    Observation,
    _Lowest,
)
from gpuplan.scenario.demand import AutoscaleRule

FEW_S = 6
"""A few looks: until the mean has crossed a threshold, and until the loop has seen what it has changed."""


@dataclass(frozen=True)
class Change:
    at_s: int
    before: int
    after: int
    reason: str


class Loop:
    """A model with `ready` replicas, each of which does a second of work in a second, looked at every second. Requests
    cost `cost_s`; `slots` of them run on a replica at once."""

    def __init__(
        self, rule: AutoscaleRule, cold_start_s: float, *, ready: int = 1, cost_s: float = 0.1, slots: int = 1
    ) -> None:
        self.rule, self.cold_start_s, self.cost_s, self.slots = rule, cold_start_s, cost_s, slots
        self.scaler = Autoscaler(rule, cold_start_s)
        self.now_s, self.ready, self.due_s = 0, ready, list[float]()
        self.offered_s = self.done_s = self.todo_s = 0.0
        self.waiting = self.waiting_max = 0
        self.changes: list[Change] = []
        self.second(0.0)

    @property
    def there(self) -> int:
        return self.ready + len(self.due_s)

    def second(self, load: float) -> None:
        """Work for `load` replicas comes, and what can be served is; then a look, and what it asks for is done."""
        arrived = round((self.offered_s + load) / self.cost_s) - round(self.offered_s / self.cost_s)
        self.offered_s += load
        self.todo_s += arrived * self.cost_s
        served_s = min(self.todo_s, float(self.ready))
        completed = round((self.done_s + served_s) / self.cost_s) - round(self.done_s / self.cost_s)
        self.done_s += served_s
        self.todo_s -= served_s
        in_flight = round(self.todo_s / self.cost_s)
        self.waiting = max(in_flight - self.slots * self.ready, 0)
        self.waiting_max = max(self.waiting_max, self.waiting)
        before = self.there
        seen = Observation(
            ready=self.ready,
            starting=len(self.due_s),
            waiting=self.waiting,
            in_flight=in_flight,
            kv_utilization=min(in_flight / (self.slots * self.ready), 1.0) if self.ready else 0.0,
            arrived_work_s=arrived * self.cost_s,
            served_work_s=completed * self.cost_s,
            free_slices=64,
        )
        wanted = self.scaler.look(seen, now_s=float(self.now_s))
        self.check(before, wanted.replicas)
        if wanted.replicas != before:
            self.changes.append(Change(self.now_s, before, wanted.replicas, wanted.reason))
        self.due_s += [self.now_s + self.cold_start_s] * (wanted.replicas - before)
        while self.there > wanted.replicas:
            if self.due_s:
                self.due_s.pop()
            else:
                self.ready -= 1
        self.now_s += 1
        while self.due_s and self.due_s[0] <= self.now_s:
            self.due_s.pop(0)
            self.ready += 1

    def check(self, before: int, wanted: int) -> None:
        rule = self.rule
        assert -rule.step_down_max <= wanted - before <= rule.step_up_max
        assert rule.min_replicas <= wanted <= rule.max_replicas or not rule.min_replicas <= before <= rule.max_replicas

    def run(self, load: float, seconds: int) -> Loop:
        for _ in range(seconds):
            self.second(load)
        return self

    def at(self, seconds: int) -> int:
        """How many replicas were wanted at that time."""
        before = [c.after for c in self.changes if c.at_s <= seconds]
        return before[-1] if before else 1


def window_s(rule: AutoscaleRule, cold_start_s: float) -> float:
    default_s = max(SCALE_UP_WINDOW_S_MIN, SCALE_UP_WINDOW_SHARE * cold_start_s)
    return default_s if rule.scale_up_window is None else rule.scale_up_window


RULES = st.builds(
    AutoscaleRule,
    min_replicas=st.integers(1, 2),
    max_replicas=st.integers(2, 16),
    scale_up_at=st.sampled_from([2.0, 4.0, 16.0]),
    scale_down_at=st.sampled_from([0.0, 0.5, 2.0, 20.0]),
    load_scale_down_at=st.sampled_from([0.3, 0.6, 2.0]),
    tolerance=st.sampled_from([0.0, 0.1, 0.5]),
    scale_up_window=st.sampled_from([None, None, 0.0, 5.0]),
    stabilization_window=st.sampled_from([20.0, 60.0, 120.0]),
    cooldown=st.sampled_from([0.0, 5.0, 15.0]),
    step_up_max=st.integers(1, 4),
    step_down_max=st.integers(1, 3),
)
COLD_STARTS_S = st.sampled_from([0.0, 2.0, 10.0, 45.0, 90.0])
COSTS_S = st.sampled_from([0.02, 0.1, 0.5])
SLOTS = st.sampled_from([1, 8, 32])


@settings(deadline=None, max_examples=60)
@given(RULES, COLD_STARTS_S, COSTS_S, SLOTS, st.floats(0.0, 1.0))
@example(AutoscaleRule(max_replicas=16), 45.0, 0.1, 1, 3.0 / 16)
def test_under_constant_load_it_settles_and_stays(
    rule: AutoscaleRule, cold_start_s: float, cost_s: float, slots: int, share: float
) -> None:
    # Whole requests do not come evenly: with no window at all, two in one second are a rise like any other.
    assume(window_s(rule, cold_start_s) > 0)
    load = share * 1.2 * rule.max_replicas
    loop = Loop(rule, cold_start_s, cost_s=cost_s, slots=slots).run(load, 1800)
    assert not [c for c in loop.changes if c.at_s > 1500]
    assert [c.after < c.before for c in loop.changes] == sorted(c.after < c.before for c in loop.changes), (
        "up, then down"
    )
    if loop.there < rule.max_replicas:  # those at the most may still work off what came while they started
        assert loop.waiting <= rule.scale_up_at * (1 + rule.tolerance) * loop.there
    if load > 1.2 * rule.max_replicas / (1 + rule.tolerance):
        assert loop.there == rule.max_replicas


@settings(deadline=None, max_examples=100)
@given(COSTS_S, st.integers(1, 4), st.floats(0.0, 0.8), st.floats(1.0, 10.0), st.floats(1.0, 3.0))
def test_a_spike_that_is_served_within_a_cold_start_buys_nothing(
    cost_s: float, ready: int, share: float, times: float, slower: float
) -> None:
    worth_s = 2 * times
    rule = AutoscaleRule(max_replicas=16, min_replicas=ready)
    loop = Loop(rule, 1.0 + slower * worth_s, ready=ready, cost_s=cost_s).run(share * ready, 60)
    loop.run(times * ready, 2).run(0.0, 300)
    assert not loop.changes
    assert times < 1.5 or loop.waiting_max > 0, "there was something to be tempted by"


PHASES = st.lists(st.tuples(st.floats(0.0, 10.0), st.integers(1, 90)), min_size=3, max_size=12)


@settings(deadline=None, max_examples=100)
@given(RULES, COLD_STARTS_S, COSTS_S, SLOTS, PHASES)
@example(
    AutoscaleRule(max_replicas=8, stabilization_window=20.0, cooldown=0.0), 2.0, 0.1, 1, [(4.0, 15), (0.0, 15)] * 6
)
def test_nothing_flaps(
    rule: AutoscaleRule, cold_start_s: float, cost_s: float, slots: int, phases: list[tuple[float, int]]
) -> None:
    """What came stays for a stabilization window, so that there is one way back down in each; nothing comes back
    within a cooldown."""
    loop = Loop(rule, cold_start_s, ready=rule.min_replicas, cost_s=cost_s, slots=slots)
    for load, seconds in phases:
        loop.run(load, seconds)
    for first, then in itertools.pairwise(loop.changes):
        if then.after < then.before:
            rest_s = rule.cooldown if first.after < first.before else rule.stabilization_window
        else:
            rest_s = rule.cooldown if first.after < first.before else 1.0
        assert then.at_s - first.at_s >= rest_s, (first, then)
    up_s, ups = window_s(rule, cold_start_s), [c for c in loop.changes if c.after > c.before]
    for last in ups:
        within = [c for c in ups if last.at_s - up_s < c.at_s <= last.at_s]
        assert sum(c.after - c.before for c in within) <= rule.step_up_max


@settings(deadline=None, max_examples=60)
@given(COLD_STARTS_S, st.sampled_from([0.02, 0.1]), SLOTS, st.floats(0.0, 0.5), st.floats(1.5, 5.0))
def test_a_step_is_followed_and_a_fall_only_after_its_window(
    cold_start_s: float, cost_s: float, slots: int, low: float, high: float
) -> None:
    rule = AutoscaleRule(max_replicas=16, stabilization_window=60.0)
    loop = Loop(rule, cold_start_s, cost_s=cost_s, slots=slots).run(low, 60)
    step_s, needed = loop.now_s, math.ceil(high)
    loop.run(high, 300)
    up_s = window_s(rule, cold_start_s)
    assert loop.changes and step_s <= loop.changes[0].at_s <= step_s + up_s + FEW_S
    steps = math.ceil((needed - 1) / rule.step_up_max)
    assert loop.at(step_s + math.ceil(steps * up_s + FEW_S)) >= needed, "no wait for the cold start of those before"
    fall_s = loop.now_s
    loop.run(low, 300)
    assert all(c.after >= needed for c in loop.changes if fall_s <= c.at_s < fall_s + rule.stabilization_window)
    assert loop.there == max(1, math.ceil(low / 0.81))


LOOKS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.1, 1.0, 1.0, 1.0, 7.3, 3600.0]),
        st.builds(
            Observation,
            ready=st.integers(0, 12),
            starting=st.integers(0, 12),
            waiting=st.integers(0, 300),
            in_flight=st.integers(0, 300),
            kv_utilization=st.floats(0.0, 1.0),
            arrived_work_s=st.floats(0.0, 100.0),
            served_work_s=st.floats(0.0, 100.0),
            free_slices=st.integers(0, 4),
        ),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(RULES, st.integers(0, 2), COLD_STARTS_S, LOOKS)
def test_bounds_hold_whatever_is_seen(
    rule: AutoscaleRule, fewest: int, cold_start_s: float, looks: list[tuple[float, Observation]]
) -> None:
    rule = msgspec.structs.replace(rule, min_replicas=fewest)
    scaler, now_s = Autoscaler(rule, cold_start_s), 1e9
    for gap_s, seen in looks:
        now_s += gap_s
        there, wanted = seen.ready + seen.starting, scaler.look(seen, now_s=now_s).replicas
        assert wanted <= max(there, min(there + seen.free_slices, rule.max_replicas))
        assert -rule.step_down_max <= wanted - there <= rule.step_up_max
        if there < fewest:
            assert wanted == min(fewest, there + seen.free_slices, there + rule.step_up_max)
        elif there > rule.max_replicas:
            assert wanted == max(rule.max_replicas, there - rule.step_down_max)
        else:
            assert fewest <= wanted <= rule.max_replicas


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, 4.0, 11.0]), st.integers(0, 9)), min_size=1),
    st.sampled_from([0.0, 3.0, 10.0]),
)
def test_the_lowest_of_a_window(words: list[tuple[float, int]], length_s: float) -> None:
    """Against the definition: each word holds until the next, and those that held within the window count."""
    lowest, now_s, said = _Lowest(length_s), 0.0, list[tuple[float, int]]()
    for gap_s, word in words:
        now_s += gap_s
        said.append((now_s, word))
        begin = [i for i, (at_s, _) in enumerate(said) if at_s <= now_s - length_s]
        assert lowest.add(word, now_s) == (min(w for _, w in said[begin[-1] :]) if begin else None)


def test_what_is_remembered_is_bounded() -> None:
    """However long the windows: as much as the averages need, and no more words than there are numbers of replicas."""
    rule = AutoscaleRule(max_replicas=8, scale_up_window=3600.0, stabilization_window=86_400.0)
    scaler = Autoscaler(rule, 45.0)
    for i in range(2_000):
        scaler.look(Observation(1 + i % 8, 0, i * 7 % 50, 50, 0.1, i * 13 % 9, i * 13 % 9, 9), now_s=i * 0.1)
    assert len(scaler._gaps) <= STEADY_S_MAX / 0.1 + 1
    assert len(scaler._needed._lows) <= 64 and len(scaler._asked._lows) <= 64
