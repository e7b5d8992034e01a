"""Reads telemetry at a steady rate, in a thread of its own.

Readings are due on a fixed grid, so a slow one causes no drift; those that were missed meanwhile are left out, not made
up for in a burst. A reading that raises is said once and ends the sampling, never the run.
"""

from __future__ import annotations

import math
import threading
import time
from typing import Protocol

from gpuplan.errors import InputError
from gpuplan.record.recorder import Sample
from gpuplan.record.run import TelemetrySource
from gpuplan.telemetry.source import Source

HZ = 10.0
HZ_MIN, HZ_MAX = 0.1, 100.0
STOP_S = 1.0
"""What a reading under way gets to end. A driver or an exporter that hangs longer is left behind."""


class Sink(Protocol):
    """Whoever wants the readings."""

    def sampled(self, samples: list[Sample]) -> None: ...


class Sampler:
    """Samples `source` at `hz` on the monotonic clock from `start` to `stop`, into every sink."""

    def __init__(self, source: Source, *sinks: Sink, hz: float = HZ) -> None:
        self._source, self._sinks, self._period_s = source, sinks, 1.0 / hz
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        self._ended: str | None = None
        self._origin = "none"

    @property
    def origin(self) -> TelemetrySource:
        """What the rows say of themselves; `none` as long as there is no row."""
        return self._origin  # type: ignore[return-value]

    @property
    def problems(self) -> list[str]:
        """What could not be read, and why the sampling ended early if it did."""
        return [*self._source.problems, *([self._ended] if self._ended else [])]

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stops after the reading that is under way; nothing is recorded after this."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=STOP_S)

    def _run(self) -> None:
        try:
            with self._source as source:
                self._sample(source)
        except Exception as error:
            self._ended = f"telemetry ended: {error}"

    def _sample(self, source: Source) -> None:
        first_s = time.monotonic()
        turn = 0
        while not self._stop.wait(max(first_s + turn * self._period_s - time.monotonic(), 0.0)):
            samples = source.read(time.monotonic())
            if self._stop.is_set():
                return
            if samples and self._origin == "none":
                self._origin = samples[0].source
            for sink in self._sinks:
                sink.sampled(samples)
            turn = max(turn + 1, math.ceil((time.monotonic() - first_s) / self._period_s))


def check_hz(value: float, *, key: str = "--sample-hz") -> float:
    """The rate, if it is one. Raises InputError."""
    if not HZ_MIN <= value <= HZ_MAX:
        raise InputError("not a sampling rate", key=key, value=value, allowed=f"{HZ_MIN:g} to {HZ_MAX:g}")
    return value
