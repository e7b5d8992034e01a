"""GPM, NVML's performance counters of Hopper and later: what they say between two samples of a card or a slice.

The one way to the utilisation of a MIG slice; NVML's ordinary query is not supported there. A metric that the driver
leaves out is missing. Takes the NVML module from its caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from gpuplan.hardware.profiles import MIB
from gpuplan.record.recorder import Sample

PERIOD_S = 0.15
"""NVML's reference: two samples have to lie more than 100 ms apart, the rate at which the counters refresh."""


class Gpm(NamedTuple):
    """Means between two samples. Utilisations go from 0 to 1: busy SMs of all SMs, DRAM traffic of the peak."""

    gpu_utilization: float | None = None
    memory_utilization: float | None = None
    pcie_tx_bytes_per_s: float | None = None
    pcie_rx_bytes_per_s: float | None = None

    def added_to(self, row: Sample) -> Sample:
        """The row, where it lacks a reading with the one from here."""
        return row._replace(
            gpu_utilization=self.gpu_utilization if row.gpu_utilization is None else row.gpu_utilization,
            memory_utilization=self.memory_utilization if row.memory_utilization is None else row.memory_utilization,
            pcie_tx_bytes_per_s=self.pcie_tx_bytes_per_s,
            pcie_rx_bytes_per_s=self.pcie_rx_bytes_per_s,
        )


NOTHING = Gpm()


class GpmMeter:
    """Counters of a card, or of the GPU instance `gpu_instance_id` on it. `ask` gives None where NVML has no answer."""

    def __init__(self, nvml: Any, ask: Callable[..., Any], handle: Any, gpu_instance_id: int | None = None) -> None:
        self._nvml, self._ask = nvml, ask
        self._query = nvml.nvmlGpmSampleGet if gpu_instance_id is None else nvml.nvmlGpmMigSampleGet
        self._whose = (handle,) if gpu_instance_id is None else (handle, gpu_instance_id)
        # By position the fields of `Gpm`, each with what makes it a fraction or bytes.
        self._metrics = (
            (nvml.NVML_GPM_METRIC_SM_UTIL, 0.01),
            (nvml.NVML_GPM_METRIC_DRAM_BW_UTIL, 0.01),
            (nvml.NVML_GPM_METRIC_PCIE_TX_PER_SEC, MIB),
            (nvml.NVML_GPM_METRIC_PCIE_RX_PER_SEC, MIB),
        )
        self._request = nvml.c_nvmlGpmMetricsGet_t()
        self._request.version = nvml.NVML_GPM_METRICS_GET_VERSION
        self._request.numMetrics = len(self._metrics)
        self._answers = [self._request.metrics[i] for i in range(len(self._metrics))]
        for answer, (metric, _) in zip(self._answers, self._metrics, strict=True):
            answer.metricId = metric
        self._samples = [s for _ in range(2) if (s := ask("GPM", nvml.nvmlGpmSampleAlloc)) is not None]
        self._taken_s: float | None = None

    def read(self, now_s: float) -> Gpm:
        """What happened since the last sample; nothing at the first, and where the last is too fresh."""
        if len(self._samples) < 2 or (self._taken_s is not None and now_s - self._taken_s < PERIOD_S):
            return NOTHING
        older, newer = self._samples
        if self._ask("GPM", self._query, *self._whose, older) is None:  # takes the older one's place
            return NOTHING
        self._samples = [newer, older]
        first, self._taken_s = self._taken_s is None, now_s
        self._request.sample1, self._request.sample2 = self._samples
        if first or self._ask("GPM", self._nvml.nvmlGpmMetricsGet, self._request) is None:
            return NOTHING
        return Gpm(
            *(
                answer.value * factor if answer.nvmlReturn == 0 and math.isfinite(answer.value) else None
                for answer, (_, factor) in zip(self._answers, self._metrics, strict=True)
            )
        )

    def close(self) -> None:
        """Gives the samples back to NVML."""
        for sample in self._samples:
            self._ask("GPM", self._nvml.nvmlGpmSampleFree, sample)
        self._samples = []
