"""Sampling in a thread of its own: it begins, keeps its rate, ends when told, and never takes the run down."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

from gpuplan.errors import InputError
from gpuplan.record.recorder import Recorder, Sample
from gpuplan.scenario import deployment, files
from gpuplan.scenario.demand import Scenario
from gpuplan.telemetry import sampler as sampling
from gpuplan.telemetry.sampler import Sampler
from gpuplan.telemetry.source import Source
from tests.conftest import single_step


class Scripted(Source):
    """Says when it has been read `enough` times; raises from reading `broken` on; is slow at reading `slow`."""

    def __init__(self, enough: int, *, broken: int | None = None, slow: int | None = None, slow_s: float = 0.0) -> None:
        self.enough, self.broken, self.slow, self.slow_s = enough, broken, slow, slow_s
        self.times_s: list[float] = []
        self.read_enough = threading.Event()
        self.threads: list[str] = []

    def __enter__(self) -> Scripted:
        self.threads.append(threading.current_thread().name)
        return self

    def __exit__(self, *_: object) -> None:
        self.threads.append(threading.current_thread().name)

    def read(self, now_s: float) -> list[Sample]:
        if self.broken is not None and len(self.times_s) >= self.broken:
            self.read_enough.set()
            raise OSError("the card is gone")
        self.times_s.append(now_s)
        if len(self.times_s) >= self.enough:
            self.read_enough.set()
        if len(self.times_s) == self.slow:
            time.sleep(self.slow_s)
        return [Sample(now_s, "emulated", "gpu0", None, 0.5)]


def recorder() -> Recorder:
    return Recorder(deployment.resolve(files.build(single_step(), Scenario)))


def test_it_samples_at_its_rate_until_it_is_stopped() -> None:
    source, rows = Scripted(enough=5), recorder()
    sampler = Sampler(source, rows, hz=100.0)
    assert sampler.origin == "none"
    sampler.start()
    assert source.read_enough.wait(5.0)
    sampler.stop()
    taken = len(source.times_s)
    assert len(rows.server_rows().telemetry) == taken >= 5
    assert (sampler.problems, sampler.origin) == ([], "emulated")
    assert source.times_s[4] - source.times_s[0] >= 4 * 0.010 * 0.9, "never faster than asked"
    assert source.threads == ["telemetry", "telemetry"], "entered and left where it is read"
    threading.Event().wait(0.03)
    assert len(source.times_s) == taken, "nothing after stop"


def test_after_a_slow_reading_the_missed_ones_are_left_out_and_the_grid_stays() -> None:
    source = Scripted(enough=6, slow=2, slow_s=0.27)
    sampler = Sampler(source, recorder(), hz=20.0)
    sampler.start()
    assert source.read_enough.wait(5.0)
    sampler.stop()
    first_s = source.times_s[0]
    turns = [(at_s - first_s) / 0.05 for at_s in source.times_s]
    assert round(turns[2]) >= 7, "0.05 s and 0.27 s of reading: next on the grid is 0.35 s"
    assert all(later - earlier > 0.5 for earlier, later in itertools.pairwise(turns)), "no burst"
    assert all(turn - int(turn + 0.02) < 0.6 for turn in turns), "on the grid, but for a busy machine's delay"


def test_stopping_does_not_wait_for_a_reading_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "STOP_S", 0.05)
    source, rows = Scripted(enough=1, slow=1, slow_s=0.5), recorder()
    sampler = Sampler(source, rows)
    sampler.start()
    assert source.read_enough.wait(5.0)
    began_s = time.monotonic()
    sampler.stop()
    assert time.monotonic() - began_s < 0.4
    time.sleep(0.6)
    assert len(rows.server_rows().telemetry) == 0, "what comes after the stop is not recorded"


def test_a_source_that_raises_ends_the_sampling_and_says_so() -> None:
    source, rows = Scripted(enough=99, broken=2), recorder()
    sampler = Sampler(source, rows, hz=100.0)
    sampler.start()
    assert source.read_enough.wait(5.0)
    sampler.stop()
    assert sampler.problems == ["telemetry ended: the card is gone"]
    assert len(rows.server_rows().telemetry) == 2, "what was read stays"


def test_stopping_what_never_started_does_nothing() -> None:
    Sampler(Scripted(enough=1), recorder()).stop()


@pytest.mark.parametrize("hz", [0.0, 0.09, 100.1, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_none(hz: float) -> None:
    with pytest.raises(InputError, match=r"--sample-hz: not a sampling rate .* allowed: 0\.1 to 100"):
        sampling.check_hz(hz)
    assert sampling.check_hz(0.1) == 0.1 and sampling.check_hz(100.0) == 100.0
