"""What this machine's cards say while they work: `NvmlCards` samples them by NVML.

A row for each card and, under MIG, one for each slice. A reading that a card or its mode does not support is missing,
never zero. Slow questions are asked less often than the rest, and the rows between hold nothing for them: a value
stands once, at the time it was read. A card that is lost has no rows from then on; the others go on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import cycle
from typing import Any, Self

from gpuplan.record.recorder import Sample
from gpuplan.telemetry import nvml
from gpuplan.telemetry.gpm import GpmMeter
from gpuplan.telemetry.nvml import Device, Library, Lost
from gpuplan.telemetry.source import Source, slice_name, throttle_names

PROCESSES_S = 1.0
"""Listing processes walks the driver's tables, and nobody looks for one that lives for less."""
PCIE_S = 1.0
"""How often each PCIe rate is asked for where there is no GPM. NVML counts bytes for 20 ms before it answers, so the
questions take turns: one at most in a reading, none within `PCIE_APART_S` of the last. The byte counters among its
field values do not block, but wrap around at a width that is not documented."""
PCIE_APART_S = 0.1
EARLY = 0.95
"""A question is due a little early, so that a jitter of the sampler's does not put it off by a whole turn."""


class NvmlCards(Source):
    """Every card of this machine. Entered where it is read; `read` gives nothing before."""

    def __init__(self) -> None:
        self._library = Library()
        self._cards: list[_Card] = []
        self._pcie: Iterator[tuple[_Card, bool]] = iter(())
        self._pcie_every_s = PCIE_S
        self._pcie_due_s = 0.0

    def __enter__(self) -> Self:
        self._library.__enter__()
        if self._library.module is not None:
            self._cards = [card for device in self._library.devices() if (card := _Card.of(device)) is not None]
            turns = [(card, into) for card in self._cards if card.pcie_in_turns for into in (True, False)]
            self._pcie = cycle(turns)
            self._pcie_every_s = max(PCIE_S / max(len(turns), 1), PCIE_APART_S) * EARLY
        return self

    def __exit__(self, *_: object) -> None:
        for card in self._cards:
            with contextlib.suppress(Lost):
                card.close()
        self._cards = []
        self._library.__exit__()

    @property
    def problems(self) -> list[str]:
        why = self._library.problem
        return [*([f"no telemetry: {why}"] if why else []), *self._library.faults.sentences()]

    def read(self, now_s: float) -> list[Sample]:
        """One row for each card that answers, and one for each of its slices."""
        turn, into = None, True
        if now_s >= self._pcie_due_s:
            turn, into = next(self._pcie, (None, True))
            self._pcie_due_s = now_s + self._pcie_every_s
        samples: list[Sample] = []
        for card in list(self._cards):
            try:
                samples += card.read(now_s, pcie_into=into if card is turn else None)
            except Lost as lost:
                self._library.faults.add(f"lost in mid-run ({lost}); no readings from then on", card.name)
                self._cards.remove(card)
        return samples


class _Card:
    """A card, its slices, and what is remembered between readings."""

    def __init__(self, device: Device) -> None:
        module, ask, handle = device.nvml, device.ask, device.handle
        self.name = device.name
        self._device = device
        support = ask("GPM", module.nvmlGpmQueryDeviceSupport, handle)
        counted = support is not None and bool(support.isSupportedDevice)
        self.gpm = GpmMeter(module, ask, handle) if counted else None
        mode = ask("MIG mode", module.nvmlDeviceGetMigMode, handle)
        self._slices = list(_slices(device, counted)) if mode and mode[0] else []
        # Whether the card's own counters go on under MIG is not documented.
        self.pcie_in_turns = self.gpm is None or bool(self._slices)
        self._processes_due_s = 0.0
        self._first_mj: int | None = None

    @classmethod
    def of(cls, device: Device) -> _Card | None:
        """The card, or None when it is lost already."""
        try:
            return cls(device)
        except Lost as lost:
            device.faults.add(f"the card does not answer ({lost})", device.name)
            return None

    def read(self, now_s: float, *, pcie_into: bool | None) -> list[Sample]:
        """The card's row and its slices'. `pcie_into` asks for one direction of PCIe. Raises Lost."""
        listed = now_s >= self._processes_due_s
        if listed:
            self._processes_due_s = now_s + PROCESSES_S * EARLY
        # Memory before counters, for all: reports have it that reading GPM can upset the next memory query on MIG.
        rows = [self._read(now_s, listed)]
        rows += [part.read(now_s, listed) for part in self._slices]
        rows[0] = self._with_counters(rows[0], now_s, pcie_into)
        return [rows[0], *(part.with_counters(row, now_s) for part, row in zip(self._slices, rows[1:], strict=True))]

    def _read(self, now_s: float, listed: bool) -> Sample:
        device = self._device
        module, ask, handle = device.nvml, device.ask, device.handle
        memory = ask("memory", module.nvmlDeviceGetMemoryInfo, handle)
        usage = ask("utilisation", module.nvmlDeviceGetUtilizationRates, handle)
        milliwatts = ask("power", module.nvmlDeviceGetPowerUsage, handle)
        millijoules = ask("energy", module.nvmlDeviceGetTotalEnergyConsumption, handle)
        if millijoules is not None and self._first_mj is None:
            self._first_mj = millijoules
        reasons = ask("throttle reasons", module.nvmlDeviceGetCurrentClocksEventReasons, handle)
        if reasons is None:  # its name before driver 535
            reasons = ask("throttle reasons (old)", module.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
        return Sample(
            now_s,
            "nvml",
            self.name,
            None,
            usage.gpu / 100 if usage is not None else None,
            float(memory.used) if memory is not None else None,
            float(memory.total) if memory is not None else None,
            milliwatts / 1e3 if milliwatts is not None else None,
            (millijoules - (self._first_mj or 0)) / 1e3 if millijoules is not None else None,
            usage.memory / 100 if usage is not None else None,
            _number(ask("SM clock", module.nvmlDeviceGetClockInfo, handle, module.NVML_CLOCK_SM)),
            _number(ask("memory clock", module.nvmlDeviceGetClockInfo, handle, module.NVML_CLOCK_MEM)),
            _number(ask("temperature", module.nvmlDeviceGetTemperature, handle, module.NVML_TEMPERATURE_GPU)),
            throttle_names(reasons) if reasons is not None else None,
            None,
            None,
            _processes(device) if listed else None,
        )

    def _with_counters(self, row: Sample, now_s: float, pcie_into: bool | None) -> Sample:
        if self.gpm is not None:
            counted = self.gpm.read(now_s)
            self.pcie_in_turns &= counted.pcie_rx_bytes_per_s is None
            row = counted.added_to(row)  # NVML's plain utilisation first: the figure that users know
        if pcie_into is None or not self.pcie_in_turns:
            return row
        device = self._device
        direction = device.nvml.NVML_PCIE_UTIL_RX_BYTES if pcie_into else device.nvml.NVML_PCIE_UTIL_TX_BYTES
        kilobytes = device.ask("PCIe", device.nvml.nvmlDeviceGetPcieThroughput, device.handle, direction)
        rate = kilobytes * 1e3 if kilobytes is not None else None
        return row._replace(pcie_rx_bytes_per_s=rate) if pcie_into else row._replace(pcie_tx_bytes_per_s=rate)

    def close(self) -> None:
        for meter in (self.gpm, *(part.gpm for part in self._slices)):
            if meter is not None:
                meter.close()


class _Slice:
    """A GPU instance of a card: its memory, its processes, and its utilisation where the card has GPM."""

    def __init__(self, card: Device, handle: Any, instance: nvml.Instance, counted: bool) -> None:
        profile = instance.profile.name if instance.profile else None
        self.name = slice_name(card.name, profile, instance.start, instance.gpu_instance_id)
        self._gpu = card.name
        self._device = Device(card.nvml, handle, self.name, card.faults)
        meter = GpmMeter(card.nvml, self._device.ask, card.handle, instance.gpu_instance_id) if counted else None
        self.gpm = meter

    def read(self, now_s: float, listed: bool) -> Sample:
        device = self._device
        memory = device.ask("memory", device.nvml.nvmlDeviceGetMemoryInfo, device.handle)
        return Sample(
            now_s,
            "nvml",
            self._gpu,
            self.name,
            memory_used_bytes=float(memory.used) if memory is not None else None,
            memory_total_bytes=float(memory.total) if memory is not None else None,
            processes=_processes(device) if listed else None,
        )

    def with_counters(self, row: Sample, now_s: float) -> Sample:
        return self.gpm.read(now_s).added_to(row) if self.gpm is not None else row


def _slices(device: Device, counted: bool) -> Iterator[_Slice]:
    handles = nvml.mig_devices(device)
    for instance in nvml.instances(device, nvml.mig_profiles(device)):
        if instance.gpu_instance_id in handles:  # without a compute instance there is nothing to ask
            yield _Slice(device, handles[instance.gpu_instance_id], instance, counted)


def _processes(device: Device) -> int | None:
    """How many processes compute there."""
    found = nvml.process_ids(device)
    return len(found) if found is not None else None


def _number(value: int | None) -> float | None:
    return float(value) if value is not None else None
