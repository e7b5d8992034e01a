"""A watchdog's time, where the process stands still meanwhile: `time.sleep` on the event loop's own thread."""

from __future__ import annotations

import asyncio
import time

import pytest

from gpuplan.serve.watchdog import TURNS, Watchdog

TIMEOUT_S = 0.4
TURN_S = TIMEOUT_S / TURNS


@pytest.mark.parametrize(
    ("stops", "least_s", "why"),
    [
        ((), TIMEOUT_S, "nothing stands still"),
        ((3 * TURN_S,), TIMEOUT_S + 2 * TURN_S, "the turn in which it stood still does not count"),
        ((10 * TURN_S,), TIMEOUT_S + 9 * TURN_S, "however long it stood still"),
        ((3 * TURN_S, 3 * TURN_S), TIMEOUT_S + 4 * TURN_S, "twice"),
    ],
)
def test_time_in_which_the_process_stood_still_does_not_count(
    stops: tuple[float, ...], least_s: float, why: str
) -> None:
    async def main() -> None:
        over = asyncio.Event()
        began_s = time.monotonic()
        Watchdog(TIMEOUT_S, over.set)
        for stop_s in stops:
            await asyncio.sleep(TURN_S / 10)
            time.sleep(stop_s)
        await asyncio.wait_for(over.wait(), 20)
        assert time.monotonic() - began_s >= least_s - 0.01, why

    asyncio.run(main())


def test_one_that_was_cancelled_is_silent() -> None:
    async def main() -> None:
        over = asyncio.Event()
        Watchdog(0.04, over.set).cancel()
        later = Watchdog(0.08, over.set)
        await asyncio.sleep(0.05)
        later.cancel()
        await asyncio.sleep(0.1)
        assert not over.is_set()

    asyncio.run(main())
