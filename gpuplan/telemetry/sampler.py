"""Reads telemetry at a steady rate, in a thread of its own, into a recorder.

Takes anything with `read(now_s) -> list[Sample]`. A reading that raises is said once and ends the sampling, never
the run.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

from gpuplan.record.recorder import Recorder, Sample


class Readable(Protocol):
    """A source of telemetry."""

    def read(self, now_s: float) -> list[Sample]: ...


class Sampler:
    """Samples `source` at `hz` on the monotonic clock from `start` to `stop`. `problem` says why it ended early."""

    def __init__(self, source: Readable, recorder: Recorder, *, hz: float = 10.0) -> None:
        self._source, self._recorder, self._period_s = source, recorder, 1.0 / hz
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="telemetry", daemon=True)
        self.problem: str | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stops after the reading that is under way."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2.0)

    def _loop(self) -> None:
        due_s = time.monotonic()
        while not self._stop.wait(max(due_s - time.monotonic(), 0.0)):
            try:
                self._recorder.sampled(self._source.read(time.monotonic()))
            except Exception as error:
                self.problem = f"telemetry ended: {error}"
                return
            due_s = max(due_s + self._period_s, time.monotonic())
