"""How the time of a batch moves from one slice of a card to another, for a model known only by measurements.

A batch of `b` costs `host * b + (launch^p + (work(b) / speed)^p)^(1/p)` seconds: preparing the input on the host, and
the larger of launching the kernels and computing them. Only the work feels the slice. Its speed lies between the
slice's share of the SMs and its share of the memory cells, so a 3g slice, with half the memory of a 7g one, is faster
than three sevenths. Processes that share a slice (MPS) share its work and nothing else.

`benchmarks/emulator_fidelity.py` fits this to 1g and 7g slices of an A100-80GB, 11 networks, and predicts 2g, 3g, 4g.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpuplan.hardware.catalog import Gpu
from gpuplan.hardware.profiles import Profile

MEMORY_SHARE = 0.4
"""How much of the work waits for memory. Convolutional networks on an A100 agree best with 0.3 to 0.5."""
SHARPNESS = 5.0

# What busy neighbours take from a slice: A100 0.6 to 2.4 %, A30 5.7 to 9.4 % (NVIDIA's MLPerf Inference v1.1 results,
# one 1g slice alone and beside six or three busy ones). Cards nobody published for are taken as A100s.
NEIGHBOUR_LOSS = {"a30": 0.075}
NEIGHBOUR_LOSS_ELSEWHERE = 0.017


def speed(card: Gpu, part: Profile) -> float:
    """What a slice does in the time in which the uncut card does 1, when all of both is busy."""
    return 1 / ((1 - MEMORY_SHARE) * card.sm_count / part.sm_count + MEMORY_SHARE * part.cells / part.width)


def neighbour_loss(card: Gpu, part: Profile) -> float:
    """The share of its speed that a slice loses to busy neighbours; 0 where there is no room for one."""
    if part.width == part.cells:
        return 0.0
    return NEIGHBOUR_LOSS.get(card.name, NEIGHBOUR_LOSS_ELSEWHERE)


@dataclass(frozen=True, slots=True)
class Measured:
    """One measurement: a batch of `batch_size` took `seconds` on `part`."""

    part: Profile
    batch_size: int
    seconds: float


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """A fitted model: seconds on a slice of speed 1."""

    card: Gpu
    host_s_per_item: float
    launch_s: float
    work_s: float
    work_s_per_item: float

    @classmethod
    def fit(cls, card: Gpu, points: Sequence[Measured]) -> BatchTimes:
        """From measurements on at least two slices of different speed, a few batch sizes each."""
        import numpy as np
        from scipy.optimize import least_squares

        seconds = np.array([point.seconds for point in points])
        each_s = min(point.seconds * speed(card, point.part) / point.batch_size for point in points)

        def times(logs: Sequence[float]) -> BatchTimes:
            return cls(card, *(float(value) for value in np.exp(logs)))

        def off(logs: Sequence[float]) -> object:
            fitted = times(logs)
            return np.log([fitted.seconds(point.part, point.batch_size) for point in points] / seconds)

        start = np.log([each_s * 0.1, seconds.min(), each_s, each_s])
        # Errors beyond some 5 % count in proportion, not squared: tables of measurements have outliers.
        return times(least_squares(off, start, loss="soft_l1", f_scale=0.05).x)

    def seconds(self, part: Profile, batch_size: int, processes: int = 1) -> float:
        """Seconds of a batch on a slice that `processes` busy processes share."""
        work_s = processes * (self.work_s + self.work_s_per_item * batch_size) / speed(self.card, part)
        return self.host_s_per_item * batch_size + float(
            (self.launch_s**SHARPNESS + work_s**SHARPNESS) ** (1 / SHARPNESS)
        )
