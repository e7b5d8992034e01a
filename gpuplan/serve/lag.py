"""How late the server's event loop is: what a sleep takes beyond its time.

Every answer passes through that loop, so a late loop is a late server, whatever the card did. `LoopLag` sleeps in small
turns while it runs; `last_s` is for `/metrics`, `notes` for the run's report.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque

TURN_S = 0.05
KEPT = 72_000
"""The last hour of turns."""
LATE_S = 0.010
"""A p99 beyond this is worth a note: tens of times what a timer of an idle loop oversleeps."""


class LoopLag:
    """Measures the running event loop from `start` to `stop`."""

    def __init__(self) -> None:
        self.last_s = 0.0
        self._lags_s: deque[float] = deque(maxlen=KEPT)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._measure())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def notes(self) -> list[str]:
        """One sentence when the loop was late, with how late; none when it was not."""
        lags_s = sorted(self._lags_s)
        if not lags_s:
            return []
        p99_s = lags_s[math.ceil(len(lags_s) * 0.99) - 1]
        if p99_s <= LATE_S:
            return []
        late_ms, worst_ms = p99_s * 1e3, lags_s[-1] * 1e3
        return [
            f"the server's event loop was late (p99 {late_ms:.0f} ms, at most {worst_ms:.0f} ms): its host was a limit"
        ]

    async def _measure(self) -> None:
        while True:
            before_s = time.monotonic()
            await asyncio.sleep(TURN_S)
            self.last_s = max(time.monotonic() - before_s - TURN_S, 0.0)
            self._lags_s.append(self.last_s)
