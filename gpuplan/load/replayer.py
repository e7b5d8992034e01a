"""Sends a schedule, each request at its time, whatever the server does (open loop).

Takes requests already serialised and a pool; gives an Exchange for each, in order of the schedule. The loop sleeps
until shortly before a request is due and then turns the event loop until it is, because timers alone wake up to two
milliseconds late. `stop()` once: no more is sent, what is under way may finish; twice: everything ends now.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Sequence
from functools import partial

from gpuplan.load.wire import Exchange, Pool
from gpuplan.scenario.schedule import ScheduledRequest

SPIN_S = 0.002
"""How long before its time a request is waited for by turning the loop: the worst oversleep of an event loop timer."""
RECENT = 1000
"""How many of the last answers a live display looks at."""


class Replay:
    """One pass over a schedule. `start_s` is the moment of its time zero on the monotonic clock. For a live display,
    `failed` counts what was not answered 200, and `recent_ms` holds the last latencies, from the schedule."""

    def __init__(self, requests: Sequence[ScheduledRequest], payloads: Sequence[bytes], pool: Pool) -> None:
        self._requests, self._payloads, self._pool = requests, payloads, pool
        self._stopping = asyncio.Event()
        self._sends: set[asyncio.Task[None]] = set()
        self.exchanges: list[Exchange] = []
        self.start_s = 0.0
        self.failed = 0
        self.recent_ms: deque[float] = deque(maxlen=RECENT)

    async def run(self, *, start_s: float) -> None:
        """Sends everything, then waits for the last answers: each is bounded by the pool's own timeout."""
        self.start_s = start_s
        for request, payload in zip(self._requests, self._payloads, strict=True):
            await self._until(start_s + request.scheduled_s)
            if self._stopping.is_set():
                break
            exchange = Exchange()
            self.exchanges.append(exchange)
            task = asyncio.get_running_loop().create_task(self._pool.send(payload, exchange, request.abandon_s))
            self._sends.add(task)
            task.add_done_callback(partial(self._ended, request, exchange))
        if self._sends:
            await asyncio.wait(self._sends)
        await self._interrupt()

    def stop(self) -> None:
        """Ends the sending; called again, ends everything."""
        if self._stopping.is_set():
            for task in self._sends:
                task.cancel()
        self._stopping.set()

    @property
    def stopped(self) -> bool:
        """`stop` was called."""
        return self._stopping.is_set()

    @property
    def in_flight(self) -> int:
        """Requests sent and not yet ended."""
        return len(self._sends)

    def _ended(self, request: ScheduledRequest, exchange: Exchange, task: asyncio.Task[None]) -> None:
        self._sends.discard(task)
        if exchange.error or exchange.status != 200 or exchange.done_s is None:
            self.failed += 1
        else:
            self.recent_ms.append((exchange.done_s - self.start_s - request.scheduled_s) * 1e3)

    async def _until(self, due_s: float) -> None:
        left_s = due_s - time.monotonic()
        if left_s > SPIN_S:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), left_s - SPIN_S)
        while not self._stopping.is_set() and time.monotonic() < due_s:
            await asyncio.sleep(0)

    async def _interrupt(self) -> None:
        tasks = list(self._sends)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
