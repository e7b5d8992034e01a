"""Sampling cards of a driver that plays scripts: every reading, what is missing, and what breaks in mid-run."""

from __future__ import annotations

import time

import pytest

from gpuplan.record.recorder import Sample
from gpuplan.telemetry.cards import NvmlCards

from .conftest import Play
from .nvml_fake import a100, sliced

UNSUPPORTED, REFUSED, NO_FUNCTION, GONE, UNKNOWN = 3, 4, 13, 15, 999


def readings(seconds: int, hz: int = 10) -> tuple[list[Sample], list[str]]:
    """All rows of so many seconds, and the problems at their end."""
    with NvmlCards() as cards:
        rows = [row for i in range(seconds * hz + 1) for row in cards.read(i / hz)]
        return rows, cards.problems


def test_a_card_says_everything(play: Play) -> None:
    play(a100())
    rows, problems = readings(1)
    assert problems == []
    assert rows[0] == Sample(
        time_s=0.0,
        source="nvml",
        gpu="gpu0",
        slice=None,
        gpu_utilization=0.5,
        memory_used_bytes=2.0**30,
        memory_total_bytes=80 * 2.0**30,
        power_w=300.0,
        energy_j=0.0,
        memory_utilization=0.25,
        sm_clock_mhz=1410.0,
        memory_clock_mhz=1593.0,
        temperature_c=61.0,
        throttle_reasons="",
        pcie_rx_bytes_per_s=3e6,
        pcie_tx_bytes_per_s=None,  # its turn comes later
        processes=2,
    )
    assert rows[1].energy_j == 30.0, "joules since the first sample"
    assert not NvmlCards().read(0.0), "not entered: no handle, no reading"


def test_slow_questions_are_asked_once_a_second(play: Play) -> None:
    play(a100())
    rows, _ = readings(10)
    for column in ("processes", "pcie_rx_bytes_per_s", "pcie_tx_bytes_per_s"):
        asked = [row.time_s for row in rows if getattr(row, column) is not None]
        assert len(asked) in (10, 11), column
    assert all(row.pcie_rx_bytes_per_s is None or row.pcie_tx_bytes_per_s is None for row in rows), "one at a time"


def test_pcie_of_many_cards_takes_turns(play: Play) -> None:
    """NVML blocks 20 ms for each: of 16 rates at most one is asked for in a reading."""
    play("".join(a100(f"GPU-{i}") for i in range(8)))
    rows, _ = readings(4)
    asked = [r for r in rows if r.pcie_rx_bytes_per_s is not None or r.pcie_tx_bytes_per_s is not None]
    assert len(asked) == len({r.time_s for r in asked}) == 41
    assert {r.gpu for r in asked} == {f"gpu{i}" for i in range(8)}


@pytest.mark.parametrize(
    ("bits", "names"),
    [
        (0x0, ""),
        (0x1, "gpu_idle"),
        (0x44, "sw_power_cap|hw_thermal_slowdown"),
        (0x800 | 0x8, "hw_slowdown|0x800"),  # a bit that a later driver adds
    ],
)
def test_throttle_reasons_have_nvidia_smi_s_names(play: Play, bits: int, names: str) -> None:
    play(a100().replace("throttle 0", f"throttle {bits}"))
    assert readings(0)[0][0].throttle_reasons == names


@pytest.mark.parametrize(
    ("function", "column"),
    [
        ("DeviceGetUtilizationRates", "gpu_utilization"),
        ("DeviceGetMemoryInfo", "memory_used_bytes"),
        ("DeviceGetPowerUsage", "power_w"),
        ("DeviceGetTotalEnergyConsumption", "energy_j"),
        ("DeviceGetClockInfo", "sm_clock_mhz"),
        ("DeviceGetTemperature", "temperature_c"),
        ("DeviceGetPcieThroughput", "pcie_rx_bytes_per_s"),
    ],
)
@pytest.mark.parametrize(
    ("code", "said"),
    [
        (UNSUPPORTED, None),  # as many cards are
        (REFUSED, "may not be read: permission refused"),
        (UNKNOWN, "could not be read (NVML says: Unknown Error)"),
    ],
)
def test_a_missing_reading_is_missing_and_said_once(
    play: Play, function: str, column: str, code: int, said: str | None
) -> None:
    play(a100() + f"fail {function} {code}\n")
    rows, problems = readings(2)
    assert {getattr(row, column) for row in rows} == {None}
    assert {row.power_w is None or row.temperature_c is None for row in rows} == {
        column in ("power_w", "temperature_c")
    }
    assert len(problems) == (0 if said is None else 2 if function == "DeviceGetClockInfo" else 1)
    assert all(p.startswith("gpu0: ") and said is not None and said in p for p in problems)


@pytest.mark.parametrize(
    "function", ["DeviceGetCurrentClocksEventReasons", "DeviceGetComputeRunningProcesses"]
)  # newer names of old questions
def test_an_old_driver_is_asked_by_the_old_names(play: Play, function: str) -> None:
    play(a100() + f"fail {function} {NO_FUNCTION}\n")
    rows, problems = readings(0)
    assert (rows[0].throttle_reasons, rows[0].processes, problems) == ("", 2, [])


def test_a_card_lost_in_mid_run_is_said_once_and_the_others_go_on(play: Play) -> None:
    play(f"{a100('GPU-1')}fail DeviceGetPowerUsage {GONE} 5\n{a100('GPU-2')}")
    rows, problems = readings(2)
    assert [row.time_s for row in rows if row.gpu == "gpu0"] == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert len([row for row in rows if row.gpu == "gpu1"]) == 21
    assert problems == ["gpu0: lost in mid-run (NVML says: GPU is lost); no readings from then on"]


def test_a_driver_unloaded_in_mid_run_takes_all_cards(play: Play) -> None:
    play(f"fail DeviceGetPowerUsage 1 8\n{a100('GPU-1')}{a100('GPU-2')}")
    rows, problems = readings(2)
    assert len(rows) == 8
    assert problems == ["gpu0, gpu1: lost in mid-run (NVML says: Uninitialized); no readings from then on"]


def test_a_driver_that_is_not_there_is_said(play: Play) -> None:
    play("fail InitWithFlags 9\n")
    assert readings(1) == ([], ["no telemetry: there is no NVIDIA driver on this machine"])


# --- MIG ----------------------------------------------------------------------------------------------------------


def test_slices_have_their_memory_and_by_gpm_their_utilisation(play: Play) -> None:
    play(sliced(gpm=True))
    rows, problems = readings(2)
    assert problems == []
    wide = [row for row in rows if row.slice == "gpu0/3g.40gb@4"]
    narrow = [row for row in rows if row.slice == "gpu0/1g.10gb@0"]
    assert len(wide) == len(narrow) == 21 and len(rows) == 63, "a slice without a compute instance has no row"
    assert (wide[0].memory_used_bytes, wide[0].memory_total_bytes) == (19 * 2**30, 40192 * 2**20)
    assert (wide[0].processes, narrow[0].processes) == (1, 0), "nought is a reading"
    assert wide[0].gpu_utilization is None, "counters need two samples"
    assert {row.gpu_utilization for row in wide} == {None, 0.8}
    assert {row.gpu_utilization for row in narrow} == {None, 0.1}
    assert {row.memory_utilization for row in wide} == {None, 0.4}
    assert sum(row.gpu_utilization is not None for row in wide) == 10, "not closer than 100 ms"
    assert {row.power_w for row in wide} == {None}, "power is the card's"


def test_without_gpm_the_utilisation_of_slices_is_not_available_and_never_zero(play: Play) -> None:
    play(sliced(gpm=False))
    rows, problems = readings(2)
    assert {row.gpu_utilization for row in rows} == {None}
    assert {row.memory_utilization for row in rows} == {None}
    assert {row.power_w for row in rows if row.slice is None} == {250.0}
    assert problems == []


def test_a_card_with_gpm_and_no_mig_keeps_nvml_s_utilisation(play: Play) -> None:
    play(a100().replace("mig 0", "mig 0\ngpm\ngpm_sm 20\ngpm_dram 10\ngpm_tx 2\ngpm_rx 4"))
    rows, _ = readings(2)
    assert {row.gpu_utilization for row in rows} == {0.5}
    assert {row.memory_utilization for row in rows} == {0.25}
    assert {row.pcie_rx_bytes_per_s for row in rows} == {None, 4.0 * 2**20}, "in MiB a second, and without blocking"
    assert {row.pcie_tx_bytes_per_s for row in rows} == {None, 2.0 * 2**20}


def test_a_metric_that_gpm_leaves_out_is_missing(play: Play) -> None:
    play(sliced(gpm=True).replace("gpm_dram 40", "gpm_dram nan"))
    wide = [row for row in readings(2)[0] if row.slice == "gpu0/3g.40gb@4"]
    assert {row.gpu_utilization for row in wide} == {None, 0.8}
    assert {row.memory_utilization for row in wide} == {None}


def test_slices_of_unknown_place_are_named_by_their_instance(play: Play) -> None:
    play(sliced(gpm=True) + f"fail DeviceGetGpuInstances {REFUSED}\n")
    rows, problems = readings(0)
    assert [row.slice for row in rows] == [None, "gpu0/3g.40gb#1", "gpu0/1g.10gb#7"]
    assert problems == ["gpu0: MIG layout may not be read: permission refused"]


def test_a_slice_that_is_gone_leaves_the_card(play: Play) -> None:
    play(sliced(gpm=True) + "fail SliceGetMemoryInfo 6 10\nfail GpmMigSampleGet 2 10\n")
    rows, problems = readings(2)
    assert len([row for row in rows if row.slice is None and row.power_w == 250.0]) == 21
    assert {row.memory_used_bytes for row in rows if row.slice and row.time_s > 1.0} == {None}
    assert "gpu0/1g.10gb@0, gpu0/3g.40gb@4: memory could not be read (NVML says: Not Found)" in problems


@pytest.mark.hardware
def test_a_real_card_says_what_it_draws() -> None:
    with NvmlCards() as cards:
        first = cards.read(time.monotonic())
        if not first:
            pytest.skip("no NVIDIA card in this machine")
        time.sleep(0.3)
        rows = [*first, *cards.read(time.monotonic())]
        assert cards.problems == []
    whole = [row for row in rows if row.slice is None]
    assert all(row.source == "nvml" and row.memory_total_bytes and row.memory_total_bytes > 1e9 for row in whole)
    assert all(row.power_w is None or 1 < row.power_w < 2000 for row in whole)
    assert all(row.gpu_utilization is None or 0 <= row.gpu_utilization <= 1 for row in rows)
