"""How many requests run at once on one replica: as many as its memory and its speed allow.

Two limits, of which the lower one holds. Both go down by a share and up by one, as TCP's window does, which is what
lets such a limit settle (Chiu and Jain, 1989).

Memory: a step that had none halves the limit; CALM_STEPS full ones that went well raise it.

Speed: eight steps at a time are judged by their mean without the longest, which one hiccup does not move. They are too
slow when the mean is above the target; where there is none, when it is THRASHING times as much above what was expected
as it was at best (the card swaps, or its caches no longer hold). Then the limit falls by the share that they were over,
by a tenth at most (the gradient and the back-off of Netflix's concurrency-limits). Otherwise full steps raise it by
one, but to a size that was too slow only after a long calm. So it rests on the largest size that is fast enough, and
now and then tries the next.

- Steps that carry less than half the limit show what is best, and do not lower it (concurrency-limits again); those
  that carry more than it are of requests that joined before it fell, and show nothing.
- Where there is no target, and fewer at once are no faster, their number is not the reason: that is the new best.
"""

from __future__ import annotations

import math

CALM_STEPS = 32
"""Full steps for each raise after a lack of memory: a step lost to trying is dearer than one that is smaller than it
could be."""
WINDOW = 8
"""Steps that are judged together."""
CALM_WINDOWS = 32
"""Windows at the size below one that was too slow, until that is tried again: 1 step in 34 is spent on trying."""
FULL = 0.9
"""A step that carries this share of the limit would have carried more without it."""
BACK_OFF_MOST = 0.1
THRASHING = 2.0


class ConcurrencyLimit:
    """From 1 to `most`. `target_step_s` is how long a step may take, in seconds.

    `limit` says how many may run, and so who may join; `memory_limit`, never below it, how many fit into a step. Those
    that run already, more than `limit`, go on together: a latency limit that made them take turns would double theirs.
    """

    __slots__ = (
        "_before",
        "_best",
        "_calm_steps",
        "_calm_windows",
        "_full",
        "_light",
        "_most",
        "_speed_limit",
        "_target_s",
        "_too_slow",
        "limit",
        "memory_limit",
    )

    def __init__(self, most: int, *, target_step_s: float | None = None) -> None:
        self.limit = self.memory_limit = self._speed_limit = self._most = most
        self._calm_steps = 0
        self._target_s = target_step_s
        self._full, self._light = _Window(), _Window()
        self._too_slow = most + 1
        self._calm_windows = 0
        self._best = self._before = math.inf

    def out_of_memory(self, carried: int) -> None:
        """A step of `carried` requests had no memory: half as many may run together."""
        self.memory_limit = max(min(self.memory_limit, carried // 2), 1)
        self._calm_steps = 0
        self._update()

    def steps_done(self, carried: int, seconds: float, expected_s: float | None, steps: int) -> None:
        """Some steps of `carried` requests have run in a row, each in `seconds`; by its model each would have taken
        `expected_s`. What more than WINDOW of the same would say, so many have said."""
        for _ in range(min(steps, WINDOW)):
            self.step_done(carried, seconds, expected_s)

    def step_done(self, carried: int, seconds: float, expected_s: float | None) -> None:
        """A step of `carried` requests has run, in `seconds`; by its model it would have taken `expected_s`."""
        if self.memory_limit < self._most and carried >= FULL * self.memory_limit:
            self._calm_steps += 1
            if self._calm_steps == CALM_STEPS:
                self.memory_limit += 1
                self._calm_steps = 0
                self._update()
        if self._target_s is not None:
            self._add(carried, seconds)
        elif expected_s and seconds > 0.0:
            self._add(carried, seconds / expected_s)

    def _add(self, carried: int, time: float) -> None:
        if carried > self.limit:
            return
        if 2 * carried < self.limit:
            self._light.add(carried, time)
            if self._light.steps == WINDOW:
                self._best = min(self._best, self._light.mean)
                self._light.clear()
            return
        self._full.add(carried, time)
        if self._full.steps == WINDOW:
            self._judge(self._full.mean)
            self._update()

    def _judge(self, mean: float) -> None:
        allowed = self._target_s if self._target_s is not None else THRASHING * self._best
        if mean <= allowed:
            self._best = min(self._best, mean)
            self._before = math.inf
            if self._full.carried >= FULL * WINDOW * self._speed_limit:
                self._raise()
        elif self._target_s is None and mean >= self._before:  # fewer at once were no faster
            self._best = mean
            self._too_slow = self._most + 1
        else:
            self._before = mean
            self._too_slow = self._full.largest
            self._calm_windows = 0
            share = max(allowed / mean, 1.0 - BACK_OFF_MOST)
            self._speed_limit = max(int(self._too_slow * share), 1)

    def _raise(self) -> None:
        if self._speed_limit + 1 >= self._too_slow and self._calm_windows < CALM_WINDOWS:
            self._calm_windows += 1
            return
        self._speed_limit = min(self._speed_limit + 1, self._most)

    def _update(self) -> None:
        """What was measured under the old limits is done with."""
        self.limit = min(self.memory_limit, self._speed_limit)
        self._full.clear()


class _Window:
    """Steps that are judged together: how many, what they carried together and at most, and their times."""

    __slots__ = ("_longest", "_times", "carried", "largest", "steps")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.steps = self.carried = self.largest = 0
        self._times = self._longest = 0.0

    def add(self, carried: int, time: float) -> None:
        self.steps += 1
        self.carried += carried
        self._times += time
        if carried > self.largest:
            self.largest = carried
        if time > self._longest:
            self._longest = time

    @property
    def mean(self) -> float:
        """Time of a step, without the longest."""
        return (self._times - self._longest) / (self.steps - 1)
