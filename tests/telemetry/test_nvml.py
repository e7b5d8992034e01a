"""Asking a driver that may not be there, and one that answers by the book."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from gpuplan.hardware.catalog import GPUS
from gpuplan.telemetry import nvml


def test_discovery_never_raises() -> None:
    cards = nvml.discover()
    assert all(card.memory_bytes > 0 and card.product for card in cards)
    assert nvml.auto_gpu() in {None, *GPUS}


def test_sampling_never_raises() -> None:
    with nvml.NvmlCards() as cards:
        assert len(cards.read(0.0)) == len(nvml.discover())
    assert nvml.NvmlCards().read(0.0) == [], "not entered: no handle, no reading"


@pytest.mark.hardware
def test_a_real_card_says_what_it_draws() -> None:
    if not nvml.discover():
        pytest.skip("no NVIDIA card in this machine")
    with nvml.NvmlCards() as cards:
        (sample, *_) = cards.read(1.0)
    assert sample.source == "nvml" and sample.memory_total_bytes and sample.memory_total_bytes > 1e9
    assert sample.power_w is None or 1 < sample.power_w < 2000


class FakeDriver:
    """One A100 in MIG mode, where NVML has no utilisation of the card."""

    def __init__(self) -> None:
        self.millijoules = 5_000_000
        self.lost = False

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in (
            "nvmlInit nvmlShutdown nvmlDeviceGetCount nvmlDeviceGetHandleByIndex nvmlDeviceGetName nvmlDeviceGetUUID "
            "nvmlDeviceGetMemoryInfo nvmlDeviceGetMigMode nvmlDeviceGetUtilizationRates nvmlDeviceGetPowerUsage "
            "nvmlDeviceGetTotalEnergyConsumption"
        ).split():
            monkeypatch.setattr(pynvml, name, lambda *a, said=name: self.answer(said))

    def answer(self, question: str) -> Any:
        if question == "nvmlDeviceGetUtilizationRates":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        if self.lost and question.startswith("nvmlDeviceGet"):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        self.millijoules += 1_000 if question == "nvmlDeviceGetTotalEnergyConsumption" else 0
        return {
            "nvmlDeviceGetCount": 1,
            "nvmlDeviceGetHandleByIndex": "handle",
            "nvmlDeviceGetName": "NVIDIA A100-SXM4-80GB",
            "nvmlDeviceGetUUID": "GPU-1",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=2**30, total=80 * 2**30),
            "nvmlDeviceGetMigMode": [1, 1],
            "nvmlDeviceGetPowerUsage": 61_500,
            "nvmlDeviceGetTotalEnergyConsumption": self.millijoules,
        }.get(question)


def test_what_a_card_does_not_support_is_none_and_never_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    driver.patch(monkeypatch)
    (card,) = nvml.discover()
    assert (card.product, card.known_as, card.mig_enabled) == ("NVIDIA A100-SXM4-80GB", "a100-80gb", True)
    assert nvml.auto_gpu() == "a100-80gb"
    with nvml.NvmlCards() as cards:
        first, second = cards.read(0.0)[0], cards.read(1.0)[0]
        driver.lost = True
        lost = cards.read(2.0)[0]
    assert (first.gpu_utilization, first.power_w, first.memory_used_bytes) == (None, 61.5, float(2**30))
    assert (first.energy_j, second.energy_j) == (0.0, 1.0), "joules since the first sample"
    assert (lost.power_w, lost.energy_j, lost.memory_used_bytes) == (None, None, None), "a row without readings"


def test_a_card_lost_between_counting_and_asking_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    driver.lost = True
    driver.patch(monkeypatch)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 1)
    assert nvml.discover() == []
    with nvml.NvmlCards() as cards:
        assert cards.read(0.0) == []
