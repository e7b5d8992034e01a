"""How many replicas a model should have.

Takes what a look at the model showed, and when; gives how many replicas are wanted from here on, and why. What was seen
holds until the next look. Rules:

- Queue, KV cache and arriving work each ask for total / threshold replicas, rounded up, unless that ratio is within
  `tolerance` of what is there; the most counts (Kubernetes, Horizontal Pod Autoscaler, "Algorithm details"). Replicas
  that start are there.
- A replica must be worth its cold start: queue and cache ask only if what waits, plus what arrives, less what is
  served, would still ask when it serves.
- Up goes the least that was asked for in `scale_up_window`, down the most that was needed in `stabilization_window`
  (the same, "Stabilization window"). All is needed while a signal is above its lower threshold; else as many as keep
  what was seen below the upper one by the tolerance.
- The first replica starts at once when a request is there. The last one goes after `scale_to_zero_after` without one.
- So much changes at most: `step_up_max` in a `scale_up_window`, `step_down_max` in a `cooldown`.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from gpuplan.scenario.demand import AutoscaleRule

SCALE_UP_WINDOW_S_MIN, SCALE_UP_WINDOW_SHARE = 3.0, 0.2
"""The default `scale_up_window`: a fifth of the cold start, so that waiting for certainty costs little beside waiting
for the replica. Three looks at the usual interval of 1 s are the fewest that tell a step from a spike of two."""
STEADY_S_MAX = 60.0
"""What is called low has been averaged over a fifth of `stabilization_window`, at most Knative's stable window. Over
less, a few dear requests in a row would keep a replica for good."""
PACE_MIN = 0.1
"""Slower than a tenth of the estimate is a fault, and no reason to buy replicas."""


@dataclass(frozen=True, slots=True)
class Observation:
    """One look at a model. Work is estimated, in seconds on one replica."""

    ready: int  # replicas that serve
    starting: int  # asked for, not serving yet
    waiting: int  # requests in the model's queue
    in_flight: int  # waiting and running
    kv_utilization: float  # share of the ready replicas' KV cache reserved; 0 without one
    arrived_work_s: float  # what arrived since the last look
    served_work_s: float  # what was completed, or left in another way, since the last look
    free_slices: int  # slices on which another replica of the model could be started now


@dataclass(frozen=True, slots=True)
class Wanted:
    """`replicas`, ready and starting, from here on; `reason` is a clause with the figures that decided."""

    replicas: int
    reason: str


class Autoscaler:
    """One model's rule and what it remembers. `cold_start_s` passes from asking for a replica until it serves."""

    def __init__(self, rule: AutoscaleRule, cold_start_s: float) -> None:
        default_s = max(SCALE_UP_WINDOW_S_MIN, SCALE_UP_WINDOW_SHARE * cold_start_s)
        self._rule, self._cold_start_s = rule, cold_start_s
        self._up_window_s = default_s if rule.scale_up_window is None else rule.scale_up_window
        # Half of it, so that a spike no longer than the other half has left the average when the window is over.
        self._brief_s = min(self._up_window_s / 2, STEADY_S_MAX)
        self._steady_s = max(self._brief_s, min(rule.stabilization_window / 5, STEADY_S_MAX))
        # As long as replicas took to come, they may take to work off the queue; and so long it shows their pace.
        self._drain_s = max(cold_start_s, SCALE_UP_WINDOW_S_MIN)
        self._asked = _Lowest(self._up_window_s)
        self._needed = _Lowest(rule.stabilization_window)  # of negative counts: the highest
        self._added: deque[tuple[float, int]] = deque()
        self._gaps: deque[_Gap] = deque()
        self._looked_s = self._changed_s = -math.inf
        self._busy_s = self._full_s = self._owed_work_s = self._full_work_s = 0.0
        self._full_ready, self._went_up = 0, False

    def look(self, seen: Observation, *, now_s: float) -> Wanted:
        """What is wanted after `seen`, at `now_s`: seconds, never less than at the last look."""
        self._measure(seen, now_s)
        there, (asked, why) = seen.ready + seen.starting, self._ask(seen)
        lowest = self._asked.add(asked, now_s)
        highest = self._needed.add(-max(asked, self._need(seen)), now_s)
        goal, why = self._goal(seen, asked, why, lowest or 0, there if highest is None else -highest)
        missing = there < max(self._rule.min_replicas, 1)
        while self._added and (missing or self._added[0][0] <= now_s - self._up_window_s):
            self._added.popleft()
        step_up = self._rule.step_up_max - sum(count for _, count in self._added)
        if goal > there and not seen.free_slices:
            why += ", but no slice is free"
        elif goal > there and not step_up:
            why += f", but {self._rule.step_up_max} in {self._up_window_s:g} s is the most"
        goal = max(min(goal, there + step_up, there + seen.free_slices), there - self._rule.step_down_max)
        if goal != there:
            self._changed_s, self._went_up = now_s, goal > there
        if goal > there:
            self._added.append((now_s, goal - there))
        return Wanted(goal, why)

    def _goal(self, seen: Observation, asked: int, why: str, lowest: int, highest: int) -> tuple[int, str]:
        """The first rule that applies, and why, before steps and slices limit it."""
        rule, there = self._rule, seen.ready + seen.starting
        rested_s, idle_s = self._looked_s - self._changed_s, self._looked_s - self._busy_s
        cooled = rested_s > 0 and rested_s >= rule.cooldown
        if not rule.min_replicas <= there <= rule.max_replicas:
            bound = rule.min_replicas if there < rule.min_replicas else rule.max_replicas
            return bound, f"{there} there, {bound} is the {'least' if there < bound else 'most'}"
        if not there and seen.in_flight:
            return 1, f"{seen.in_flight} in flight and no replica"
        if asked > there:
            if there == rule.max_replicas:
                return there, f"{why}, but {there} is the most"
            if lowest <= there:
                return there, f"{why}, but not yet for {self._up_window_s:g} s"
            if not (cooled or (self._went_up and rested_s > 0)):
                return there, f"{why}, but {rested_s:g} s after the last change"
            return min(lowest, rule.max_replicas), why
        if there == 1 and not rule.min_replicas and idle_s >= rule.scale_to_zero_after and cooled:
            return 0, f"no request for {idle_s:g} s"
        if highest < there and cooled:
            return highest, f"no need of more than {highest} for {rule.stabilization_window:g} s"
        return there, "nothing asks for a change"

    # --- the signals --------------------------------------------------------------------------------------------------

    def _ask(self, seen: Observation) -> tuple[int, str]:
        """How many replicas the upper thresholds ask for (0: none does), and the signal that asks for most."""
        rule, there, more = self._rule, max(seen.ready + seen.starting, 1), 1 + self._rule.tolerance
        load, pace = self._mean("work_s", self._brief_s), self._pace()
        # Until a replica that is asked for now serves. Those that start come halfway, on average.
        growth_s = (load - pace * (seen.ready + seen.starting / 2)) * self._cold_start_s
        cost_s = self._owed_work_s / seen.in_flight if seen.in_flight else 0.0
        waiting = seen.waiting + growth_s / cost_s if cost_s else float(seen.waiting)
        asks = [(0, "")]
        if load > rule.load_scale_up_at * more * there:
            why = f"load {load / there:.2f} per replica, more than {rule.load_scale_up_at:g}"
            asks.append((_ceil(load / rule.load_scale_up_at), why))
        # A cache is full at 1: there the tolerance takes at most half of what is left above the threshold.
        limit, in_use = rule.kv_scale_up_at, seen.kv_utilization * seen.ready
        if in_use > min(limit * more, (1 + limit) / 2) * there and self._owed_work_s + growth_s > 0:
            asks.append((_ceil(in_use / limit), f"KV cache {in_use / there:.0%} full, more than {limit:.0%}"))
        if min(seen.waiting, waiting) > rule.scale_up_at * more * there:
            # The ratio alone would buy a replica for every few that wait, however cheap: no more than drain the queue
            # in time, but one more in any case, unless some start.
            count = _ceil(waiting / rule.scale_up_at)
            if cost_s:
                drain = _ceil((load + waiting * cost_s / self._drain_s) / pace)
                count = min(count, max(drain, there + (not seen.starting)))
            asks.append((count, f"{seen.waiting / there:.1f} waiting per replica, more than {rule.scale_up_at:g}"))
        return max(asks, key=lambda ask: ask[0])

    def _need(self, seen: Observation) -> int:
        """The fewest replicas that would do, at most those that are there."""
        rule, there = self._rule, seen.ready + seen.starting
        signals = (
            (self._mean("waiting_s", self._steady_s), rule.scale_up_at, rule.scale_down_at),
            (self._mean("kv_s", self._steady_s), rule.kv_scale_up_at, rule.kv_scale_down_at),
            (self._mean("work_s", self._steady_s), rule.load_scale_up_at, rule.load_scale_down_at),
        )
        if not self._gaps or any(total > low * there for total, _, low in signals):
            return there
        spread = (_ceil(total / max(high * (1 - rule.tolerance), 1e-6)) for total, high, _ in signals)
        return min(there, max(rule.min_replicas, 1, *spread))

    # --- what is measured ---------------------------------------------------------------------------------------------

    def _measure(self, seen: Observation, now_s: float) -> None:
        """Takes note of the gap since the last look, of the work in flight, and of how fast a queue is served."""
        gap_s, in_use = now_s - self._looked_s, seen.kv_utilization * seen.ready
        if 0 < gap_s < math.inf:
            self._gaps.append(_Gap(now_s, gap_s, seen.arrived_work_s, seen.waiting * gap_s, in_use * gap_s))
        elif self._gaps:
            self._gaps[-1] = self._gaps[-1]._replace(work_s=self._gaps[-1].work_s + seen.arrived_work_s)
        while len(self._gaps) > 1 and self._gaps[0].until_s <= now_s - self._steady_s:
            self._gaps.popleft()
        if seen.in_flight or seen.arrived_work_s or gap_s == math.inf:
            self._busy_s = now_s
        self._looked_s = now_s
        owed_s = max(self._owed_work_s + seen.arrived_work_s - seen.served_work_s, 0.0)
        self._owed_work_s = owed_s if seen.in_flight else 0.0
        full = seen.waiting > 0 or seen.kv_utilization > self._rule.kv_scale_up_at
        if full and seen.ready == self._full_ready:
            self._full_work_s += seen.served_work_s
        else:
            self._full_s, self._full_work_s, self._full_ready = now_s, 0.0, seen.ready if full else 0

    def _pace(self) -> float:
        """Seconds of work that a replica does in a second: 1 by the estimate, until they have been full for so long
        that what was served tells better."""
        time_s = self._looked_s - self._full_s
        if not self._full_ready or time_s < self._drain_s:
            return 1.0
        return max(self._full_work_s / (time_s * self._full_ready), PACE_MIN)

    def _mean(self, name: str, length_s: float) -> float:
        """Over the latest gaps that fit in `length_s` together, and the very latest in any case; 0 before any."""
        total = time_s = 0.0
        for gap in reversed(self._gaps):
            if time_s and time_s + gap.length_s > length_s:
                break
            total, time_s = total + getattr(gap, name), time_s + gap.length_s
        return total / time_s if time_s else 0.0


class _Gap(NamedTuple):
    """The time between two looks: work that arrived, and requests waiting and caches in use, each times seconds."""

    until_s: float
    length_s: float
    work_s: float
    waiting_s: float
    kv_s: float


class _Lowest:
    """The lowest word of the last `length_s` seconds, where each holds until the next. Kept is how low it is from when
    until now, which only rises: no more entries than different words."""

    def __init__(self, length_s: float) -> None:
        self._length_s = length_s
        self._lows: deque[tuple[float, int]] = deque()

    def add(self, word: int, now_s: float) -> int | None:
        """The lowest, with `word` from `now_s` on; None while the first is younger than the window."""
        since_s = now_s
        while self._lows and self._lows[-1][1] >= word:
            since_s = self._lows.pop()[0]
        self._lows.append((since_s, word))
        while len(self._lows) > 1 and self._lows[1][0] <= now_s - self._length_s:
            self._lows.popleft()
        return self._lows[0][1] if self._lows[0][0] <= now_s - self._length_s else None


def _ceil(replicas: float) -> int:
    """Rounded up, but not for the error of a float."""
    return math.ceil(replicas - 1e-9)
