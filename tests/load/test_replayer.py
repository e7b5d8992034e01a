"""Open loop: requests leave at their times whatever the server does."""

from __future__ import annotations

import asyncio
import time

from gpuplan.load.replayer import Replay
from gpuplan.load.wire import Exchange
from gpuplan.scenario.schedule import ScheduledRequest


class StalledPool:
    """Takes every request and answers none before `release`."""

    def __init__(self) -> None:
        self.sent_s: list[float] = []
        self.release = asyncio.Event()

    async def send(self, data: bytes, exchange: Exchange, patience_s: float | None = None) -> None:
        exchange.sent_s = time.monotonic()
        self.sent_s.append(exchange.sent_s)
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            exchange.end(time.monotonic(), "interrupted")
            raise
        exchange.end(time.monotonic())


def requests(count: int, gap_s: float) -> list[ScheduledRequest]:
    return [ScheduledRequest(i, i * gap_s, "c", "m", 1, 1) for i in range(count)]


def test_a_server_that_stalls_delays_no_request() -> None:
    async def main() -> None:
        pool = StalledPool()
        asked = requests(40, 0.005)
        replay = Replay(asked, [b""] * 40, pool)  # type: ignore[arg-type]
        start_s = time.monotonic() + 0.02
        running = asyncio.create_task(replay.run(start_s=start_s))
        await asyncio.sleep(start_s + asked[-1].scheduled_s + 0.05 - time.monotonic())
        assert not running.done(), "answers that are late are waited for: their own timeout bounds them"
        replay.stop()
        replay.stop()
        await asyncio.wait_for(running, 1)
        lags_s = sorted(sent - start_s - r.scheduled_s for r, sent in zip(asked, pool.sent_s, strict=True))
        assert len(lags_s) == 40
        assert lags_s[0] >= 0, "never early"
        assert lags_s[20] < 0.005, "the median leaves within a gap"
        assert {e.error for e in replay.exchanges} == {"interrupted"}, "what is open at the end is said to be"

    asyncio.run(main())


def test_stopping_once_drains_and_twice_ends() -> None:
    async def main() -> None:
        pool = StalledPool()
        replay = Replay(requests(1000, 0.01), [b""] * 1000, pool)  # type: ignore[arg-type]
        running = asyncio.create_task(replay.run(start_s=time.monotonic()))
        await asyncio.sleep(0.05)
        replay.stop()
        await asyncio.sleep(0.03)
        sent = len(replay.exchanges)
        assert 0 < sent < 20
        assert not running.done(), "it waits for the answers"
        replay.stop()
        await asyncio.wait_for(running, 1)
        assert len(replay.exchanges) == sent

    asyncio.run(main())
