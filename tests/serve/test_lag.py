"""A loop that is held up is late, and says so; one that is not says nothing."""

from __future__ import annotations

import asyncio
import time

from gpuplan.serve.lag import TURN_S, LoopLag


def measured(*, hold_s: float) -> LoopLag:
    async def main() -> LoopLag:
        lag = LoopLag()
        lag.start()
        for _ in range(4):
            await asyncio.sleep(TURN_S / 2)
            time.sleep(hold_s)
        await asyncio.sleep(TURN_S * 1.5)
        lag.stop()
        return lag

    return asyncio.run(main())


def test_a_blocked_loop_is_noted_with_how_late_it_was() -> None:
    (note,) = measured(hold_s=0.2).notes()
    assert note.startswith("the server's event loop was late (p99 ")
    worst_ms = float(note.split("at most ")[1].split(" ms")[0])
    assert 100 < worst_ms < 1000


def test_nothing_is_said_before_anything_was_measured() -> None:
    assert LoopLag().notes() == []
