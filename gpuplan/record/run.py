"""A Run: raw rows first. Bench and simulate fill the same columns, so two runs can lie side by side.

Times are seconds after the run's start; a null is a fact that nobody told (a foreign server says nothing of its
queue). A new fact is a column here and a line in the recorder.

History of the schema:
1  first form
2  telemetry has memory utilisation, clocks, temperature, throttle reasons, PCIe and processes, and may come from an
   exporter (`prometheus`)
3  batches have how late an emulated step ended (`late_ms`)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from gpuplan.record.counts import StepCounts

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 3

Source = Literal["bench", "simulate"]
TelemetrySource = Literal["nvml", "emulated", "prometheus", "none"]
Provenance = Literal["hardware", "cpu", "emulated", "simulated", "remote"]
"""Where a model's times come from: a real GPU, the host's CPU, an emulated GPU, a simulation, or a server that does
not say."""

REQUEST_COLUMNS: dict[str, str] = {
    "request_id": "int64",
    "traffic_class": "string",
    "model": "string",
    "warmup": "bool",  # left out of summaries
    "prompt_tokens": "int64",  # asked
    "output_tokens": "int64",  # asked; 0 where the model streams none
    "scheduled_s": "float64",  # when the schedule wanted it
    "sent_s": "float64",  # when its bytes left
    "first_token_s": "float64",
    "done_s": "float64",  # when its last byte came
    "tokens": "int64",  # received
    "merged_tokens": "int64",  # of those, how many came in one chunk with others
    "gaps_ms": "list",  # between tokens, in order
    "status": "string",  # completed | rejected | error | interrupted
    "error": "string",  # its kind; null when completed
    "message": "string",
    "http_status": "int64",  # null where nothing was answered
    "replica": "string",  # from here: what the server tells
    "arrived_s": "float64",
    "started_s": "float64",  # start of its first step
    "finished_s": "float64",
}

SERVER_VIEW = ("replica", "arrived_s", "started_s", "finished_s")

BATCH_COLUMNS: dict[str, str] = {
    "step_id": "int64",
    "model": "string",
    "replica": "string",  # chat-0, or chat-0#2 for its second version
    "slice": "string",
    "started_s": "float64",
    "done_s": "float64",
    "batch_size": "int64",  # sequences in the step
    "prefill_tokens": "int64",  # padding included
    "attended_pairs": "int64",
    "decodes": "int64",
    "context_tokens": "int64",
    "samples": "int64",
    "waiting": "int64",  # the model's queue when the step began
    "failed": "bool",
    "late_ms": "float64",  # after the emulated card would have ended it; null where nothing is emulated
}

TELEMETRY_COLUMNS: dict[str, str] = {
    "time_s": "float64",
    "source": "string",  # nvml | emulated | prometheus
    "gpu": "string",
    "slice": "string",  # null: the whole card
    "gpu_utilization": "float64",  # 0 to 1
    "memory_used_bytes": "float64",
    "memory_total_bytes": "float64",
    "power_w": "float64",
    "energy_j": "float64",  # since the first sample
    "memory_utilization": "float64",  # 0 to 1
    "sm_clock_mhz": "float64",
    "memory_clock_mhz": "float64",
    "temperature_c": "float64",
    "throttle_reasons": "string",  # joined by |, empty when there is none
    "pcie_rx_bytes_per_s": "float64",  # into the card
    "pcie_tx_bytes_per_s": "float64",
    "processes": "int64",  # that compute on it
}

SERVED_COLUMNS = {"client_id": "string", **{name: REQUEST_COLUMNS[name] for name in SERVER_VIEW}}
"""What a server keeps of each request until its client's row joins it, by the id that the client sent."""


class RunMeta(msgspec.Struct, frozen=True, kw_only=True):
    """`run.json`: what was asked, of what, on what, and how it ended."""

    schema_version: int = SCHEMA_VERSION
    name: str
    source: Source
    scenario: dict[str, Any]
    deployment: dict[str, Any]
    seed: int
    rate_scale: float = 1.0
    speed: float = 1.0
    started_at: str
    duration_s: float
    measured_s: float
    target: str
    provenance: dict[str, Provenance]
    engines: dict[str, str] = {}
    telemetry_source: TelemetrySource = "none"
    machine: dict[str, Any] = {}
    interrupted: bool = False
    failure: str | None = None
    notes: list[str] = []
    gpuplan_version: str = ""


@dataclass(frozen=True, slots=True)
class Run:
    """The whole record. Tables hold the columns above; `decisions` the core's log, line by line, or nothing. A
    simulation that kept no rows has requests without their tokens' times, and `steps` by model instead of batches."""

    meta: RunMeta
    requests: pd.DataFrame
    batches: pd.DataFrame
    telemetry: pd.DataFrame
    decisions: tuple[bytes, ...] = ()
    steps: Mapping[str, StepCounts] | None = None
