"""How batch times move between slices: what is sure, and what 11 networks on an A100 took."""

from __future__ import annotations

import csv
import itertools
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuplan.hardware import catalog, mig, slices
from gpuplan.hardware.slices import BatchTimes, Measured

A100 = catalog.gpu("a100-80gb")
PARTS = {p.slices: p for p in mig.plain_profiles(A100) if p.slices != 1 or p.width == 1}
CUT = [card for card in catalog.GPUS.values() if card.profiles]


@pytest.mark.parametrize("card", CUT, ids=lambda card: card.name)
def test_more_of_a_card_is_faster_and_the_whole_is_1(card: catalog.Gpu) -> None:
    by_size = sorted(mig.plain_profiles(card), key=lambda p: (p.slices, p.width))
    speeds = [slices.speed(card, p) for p in by_size]
    assert speeds == sorted(speeds) and 0.1 < speeds[0] < speeds[-1] <= 1
    assert slices.speed(card, mig.whole(card)) == 1
    for p in by_size:
        shares = sorted((p.sm_count / card.sm_count, p.width / p.cells))
        assert shares[0] * 0.999 <= slices.speed(card, p) <= shares[1] * 1.001


def test_seven_small_slices_do_what_was_measured_of_the_whole_card() -> None:
    """MLPerf Inference v1.1, an A100-80GB with seven busy 1g slices: 0.864 to 0.932 of it uncut."""
    seven = 7 * slices.speed(A100, PARTS[1]) * (1 - slices.neighbour_loss(A100, PARTS[1]))
    assert 0.864 < seven < 0.932


@pytest.mark.parametrize(("card", "part", "low", "high"), [("a100-80gb", "1g.10gb", 0.006, 0.024), ("a30", "1g.6gb", 0.057, 0.094), ("a30", "4g.24gb", 0.0, 0.0)])  # fmt: skip
def test_neighbours_take_what_was_measured(card: str, part: str, low: float, high: float) -> None:
    gpu = catalog.gpu(card)
    assert low <= slices.neighbour_loss(gpu, mig.profile(gpu, part)) <= high


@given(st.floats(1e-5, 1e-2), st.floats(1e-4, 1e-1), st.floats(0, 1e-2), st.floats(1e-5, 1e-2), st.integers(1, 512))
def test_time_never_falls_with_the_batch_and_never_grows_with_the_slice(
    host: float, launch: float, work: float, item: float, batch: int
) -> None:
    times = BatchTimes(A100, host, launch, work, item)
    for small, large in itertools.pairwise(PARTS[n] for n in (1, 2, 3, 4, 7)):
        assert times.seconds(large, batch) <= times.seconds(small, batch) <= times.seconds(small, batch + 1)
        alone, three = times.seconds(small, batch), times.seconds(small, batch, processes=3)
        assert alone <= three <= 3 * alone


def test_what_made_the_points_is_found_again() -> None:
    truth = BatchTimes(A100, 1e-4, 5e-3, 1e-3, 3e-4)
    points = [
        Measured(part, batch, truth.seconds(part, batch))
        for part in (PARTS[1], PARTS[7])
        for batch in (1, 2, 4, 8, 16, 32, 64, 128)
    ]
    found = BatchTimes.fit(A100, points)
    for n, batch in itertools.product((2, 3, 4), (1, 10, 100)):
        assert found.seconds(PARTS[n], batch) == pytest.approx(truth.seconds(PARTS[n], batch), rel=0.02)


def test_2g_3g_and_4g_follow_from_1g_and_7g(data_file: Callable[[str], Path]) -> None:
    """11 networks, every batch that fitted, by one process: 3.8 % off on average (`a + b / slices`: 8.2 %)."""
    points: dict[str, list[Measured]] = defaultdict(list)
    with data_file("mig-profiles/a100-80gb-models.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            rate, batch = float(row["throughput_per_process_per_s"]), int(row["batch_size"])
            if rate > 0 and row["processes"] == "1":
                points[row["model"]].append(Measured(PARTS[int(row["gpu_instance_slices"])], batch, batch / rate))
    errors: dict[tuple[str, int, int], float] = {}
    for model, measured in points.items():
        fitted = BatchTimes.fit(A100, [p for p in measured if p.part.slices in (1, 7)])
        for p in measured:
            if p.part.slices in (2, 3, 4):
                off = fitted.seconds(p.part, p.batch_size) / p.seconds - 1
                errors[model, p.part.slices, p.batch_size] = abs(off)
    assert len(errors) == 256
    assert fmean(errors.values()) < 0.04
    # Twice as fast as half and double their batch: the table's only outliers.
    assert {point for point, error in errors.items() if error > 0.3} == {("densenet169", n, 128) for n in (3, 4)}
