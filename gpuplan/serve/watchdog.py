"""Time that counts only while this process runs.

A server that stood still (a suspended machine, a stopped process) finds all its timers overdue when it goes on, those
of workers that have answered meanwhile among them, and of workers that stood still as well. So a `Watchdog` waits for
its time in TURNS turns, of which one that ends a whole turn late does not count: a worker that hangs is noticed as
much later as the server stood still, and a step loses at most one turn to each stop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

TURNS = 4


class Watchdog:
    """Calls `overdue` on the running event loop after `timeout_s` seconds, unless it is cancelled before."""

    __slots__ = ("_due_s", "_left", "_loop", "_overdue", "_timer", "_turn_s")

    def __init__(self, timeout_s: float, overdue: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._turn_s, self._left, self._overdue = timeout_s / TURNS, TURNS, overdue
        self._begin()

    def cancel(self) -> None:
        self._timer.cancel()

    def _begin(self) -> None:
        self._due_s = time.monotonic() + self._turn_s
        self._timer = self._loop.call_later(self._turn_s, self._over)

    def _over(self) -> None:
        if time.monotonic() - self._due_s < self._turn_s:
            self._left -= 1
        if self._left:
            self._begin()
        else:
            self._overdue()
