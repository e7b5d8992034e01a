"""Who waits, and who goes next.

A `Line` holds the sequences that wait for one replica. Inside a priority the earliest deadline goes first (Liu and
Layland, 1973: what can be met at all is met that way); whoever has none is taken to have one PATIENCE_S after its
arrival, so without deadlines it is first come, first served. Between priorities the lower number goes first, unless the
other has waited `ageing` longer for each priority that lies between them. So nobody starves: those that come later fall
behind in the end, whatever their priority and deadline.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpuplan.policy.state import Sequence

PATIENCE_S = 60.0
"""In the order alone: as Nginx's and most clients' time limit."""
Entry = tuple[float, int, int, "Sequence"]
"""When it is due, its number, its ticket, and who it is."""


class Ahead:
    """What goes before a sequence of some priority: requests, their prompt tokens, and the KV cache of all of them."""

    __slots__ = ("kv_tokens", "prompt_tokens", "requests")

    def __init__(self, requests: int, prompt_tokens: int, kv_tokens: int) -> None:
        self.requests = requests
        self.prompt_tokens = prompt_tokens
        self.kv_tokens = kv_tokens


NOBODY = Ahead(0, 0, 0)


class _Level(Ahead):
    """One priority's heap, and what is in it. Entries of sequences that have left, or come anew, are dead: theirs is no
    longer the sequence's ticket. They go when they come to the top, or when there are more of them than of the
    living."""

    __slots__ = ("heap", "priority")

    def __init__(self, priority: int) -> None:
        super().__init__(0, 0, 0)
        self.priority = priority
        self.heap: list[Entry] = []

    def top(self) -> Sequence | None:
        heap = self.heap
        while heap:
            _, _, ticket, s = heap[0]
            if s.ticket == ticket:
                return s
            heapq.heappop(heap)
        return None


class Line:
    """The sequences that wait for one replica. Each is in one line at most."""

    __slots__ = ("_ageing_s", "_levels")

    def __init__(self, ageing_s: float) -> None:
        self._ageing_s = ageing_s
        self._levels: list[_Level] = []

    def __len__(self) -> int:
        levels = self._levels
        return levels[0].requests if len(levels) == 1 else sum([level.requests for level in levels])

    def __iter__(self) -> Iterator[Sequence]:
        """In no order in particular."""
        return (s for level in self._levels for _, _, ticket, s in level.heap if s.ticket == ticket)

    def push(self, s: Sequence) -> None:
        level = self._level(s.priority)
        due_s = s.arrived_s + PATIENCE_S if s.deadline_s is None else s.deadline_s
        s.ticket += 1
        heapq.heappush(level.heap, (due_s, s.request_id, s.ticket, s))
        level.requests += 1
        level.prompt_tokens += s.prompt_tokens
        level.kv_tokens += s.kv_tokens

    def head(self) -> Sequence | None:
        """Who goes next."""
        levels = self._levels
        if len(levels) == 1:
            return levels[0].top()
        heads = [(s, level.priority) for level in levels if (s := level.top()) is not None]
        if not heads:
            return None
        return min(heads, key=lambda head: (head[0].arrived_s + head[1] * self._ageing_s, head[1]))[0]

    def remove(self, s: Sequence) -> None:
        """It must be here."""
        level = self._level(s.priority)
        s.ticket += 1
        level.requests -= 1
        level.prompt_tokens -= s.prompt_tokens
        level.kv_tokens -= s.kv_tokens
        if len(level.heap) > 2 * level.requests + 16:
            level.heap = [entry for entry in level.heap if entry[3].ticket == entry[2]]
            heapq.heapify(level.heap)

    def ahead_of(self, priority: int) -> Ahead:
        """Those of this priority and of the more urgent ones; who would go last of them is not told apart. To be read
        at once: it changes with the line."""
        levels = self._levels
        if len(levels) == 1:
            return levels[0] if levels[0].priority <= priority else NOBODY
        ahead = Ahead(0, 0, 0)
        for level in levels:
            if level.priority <= priority:
                ahead.requests += level.requests
                ahead.prompt_tokens += level.prompt_tokens
                ahead.kv_tokens += level.kv_tokens
        return ahead

    def _level(self, priority: int) -> _Level:
        for level in self._levels:
            if level.priority == priority:
                return level
        self._levels.append(_Level(priority))
        self._levels.sort(key=lambda level: level.priority)
        return self._level(priority)
