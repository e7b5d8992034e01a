"""Sampling in a thread of its own: it begins, keeps its rate, ends when told, and never takes the run down."""

from __future__ import annotations

import threading

from gpuplan.record.recorder import Recorder, Sample
from gpuplan.scenario import deployment, files
from gpuplan.scenario.demand import Scenario
from gpuplan.telemetry.sampler import Sampler
from tests.conftest import single_step


class Source:
    """Says when it has been read `enough` times; raises from reading `broken` on."""

    def __init__(self, enough: int, broken: int | None = None) -> None:
        self.enough, self.broken = enough, broken
        self.times_s: list[float] = []
        self.read_enough = threading.Event()

    def read(self, now_s: float) -> list[Sample]:
        if self.broken is not None and len(self.times_s) >= self.broken:
            self.read_enough.set()
            raise OSError("the card is gone")
        self.times_s.append(now_s)
        if len(self.times_s) >= self.enough:
            self.read_enough.set()
        return [Sample(now_s, "emulated", "gpu0", None, 0.5, None, None, None, None)]


def recorder() -> Recorder:
    return Recorder(deployment.resolve(files.build(single_step(), Scenario)))


def test_it_samples_at_its_rate_until_it_is_stopped() -> None:
    source, rows = Source(enough=5), recorder()
    sampler = Sampler(source, rows, hz=100.0)
    sampler.start()
    assert source.read_enough.wait(5.0)
    sampler.stop()
    taken = len(source.times_s)
    assert len(rows.server_rows().telemetry) == taken >= 5
    assert sampler.problem is None
    assert source.times_s[4] - source.times_s[0] >= 4 * 0.010 * 0.9, "never faster than asked"
    threading.Event().wait(0.03)
    assert len(source.times_s) == taken, "nothing after stop"


def test_a_source_that_raises_ends_the_sampling_and_says_so() -> None:
    source, rows = Source(enough=99, broken=2), recorder()
    sampler = Sampler(source, rows, hz=200.0)
    sampler.start()
    assert source.read_enough.wait(5.0)
    sampler.stop()
    assert sampler.problem == "telemetry ended: the card is gone"
    assert len(rows.server_rows().telemetry) == 2, "what was read stays"


def test_stopping_what_never_started_does_nothing() -> None:
    Sampler(Source(enough=1), recorder()).stop()
