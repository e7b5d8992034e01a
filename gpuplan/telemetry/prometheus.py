"""What an exporter says: a Prometheus `/metrics` URL read as cards, for servers on other machines.

Knows the names of NVIDIA's DCGM exporter and those of gpuplan's own server, whose rows keep their origin: what a server
emulates is `emulated` here too. An exporter that does not answer is said once and asked again; what it lacks is said
once. No redirect is followed, no proxy is used, and an answer has bounds in time and size.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import math
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from gpuplan.hardware.profiles import MIB
from gpuplan.record.recorder import Sample
from gpuplan.telemetry.source import Source, slice_name, throttle_names

PERIOD_S = 1.0
"""Never asked more often: DCGM's own readings are a second old or more, and its exporter's default is 30 s."""
TIMEOUT_S = 1.0
BYTES_MAX = 8 << 20
"""An exporter of 8 cards with 7 slices each answers some 200 KB."""


def _same(value: float) -> float:
    return value


def _percent(value: float) -> float:
    return value / 100


def _mib(value: float) -> float:
    return value * MIB


# Columns by a metric's name, in order of preference, each with what turns its unit into the column's. Units are those
# of DCGM's field reference; its PCIe fields are rates, whatever type an exporter's configuration gives them.
DCGM: dict[str, tuple[tuple[str, Callable[[float], Any]], ...]] = {
    "gpu_utilization": (
        ("DCGM_FI_DEV_GPU_UTIL", _percent),
        ("DCGM_FI_PROF_SM_ACTIVE", _same),
        ("DCGM_FI_PROF_GR_ENGINE_ACTIVE", _same),
    ),
    "memory_utilization": (("DCGM_FI_DEV_MEM_COPY_UTIL", _percent), ("DCGM_FI_PROF_DRAM_ACTIVE", _same)),
    "memory_used_bytes": (("DCGM_FI_DEV_FB_USED", _mib),),
    "power_w": (("DCGM_FI_DEV_POWER_USAGE", _same),),
    "energy_j": (("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", lambda millijoules: millijoules / 1e3),),
    "sm_clock_mhz": (("DCGM_FI_DEV_SM_CLOCK", _same),),
    "memory_clock_mhz": (("DCGM_FI_DEV_MEM_CLOCK", _same),),
    "temperature_c": (("DCGM_FI_DEV_GPU_TEMP", _same),),
    "throttle_reasons": (
        ("DCGM_FI_DEV_CLOCKS_EVENT_REASONS", lambda bits: throttle_names(int(bits))),
        ("DCGM_FI_DEV_CLOCK_THROTTLE_REASONS", lambda bits: throttle_names(int(bits))),
    ),
    "pcie_rx_bytes_per_s": (("DCGM_FI_PROF_PCIE_RX_BYTES", _same),),
    "pcie_tx_bytes_per_s": (("DCGM_FI_PROF_PCIE_TX_BYTES", _same),),
}
_DCGM_MEMORY = ("DCGM_FI_DEV_FB_USED", "DCGM_FI_DEV_FB_FREE", "DCGM_FI_DEV_FB_RESERVED")
_OF_THE_CARD = (
    "power_w", "energy_j", "sm_clock_mhz", "memory_clock_mhz", "temperature_c", "throttle_reasons",
    "pcie_rx_bytes_per_s", "pcie_tx_bytes_per_s",
)  # fmt: skip
"""What a slice has not: under MIG the DCGM exporter repeats the card's reading at each of its slices."""

OWN = {
    f"gpuplan_gpu_{column.removeprefix('gpu_')}": column
    for column in Sample._fields[4:]
    if column != "throttle_reasons"  # words, not a number
}
"""Columns by what gpuplan's server calls them; its labels are `gpu`, `slice` and `source`."""

_EXPECTED = {
    "gpu_utilization": "utilisation",
    "memory_used_bytes": "memory",
    "power_w": "power",
    "energy_j": "energy",
    "sm_clock_mhz": "clocks",
    "temperature_c": "temperature",
}

_Readings = dict[tuple[str, str | None], dict[str, Any]]
"""Columns by card and slice."""


class PrometheusCards(Source):
    """The cards that a URL tells of. `read` asks it once a second at most, and gives nothing in between."""

    def __init__(self, url: str) -> None:
        self._parts = urlsplit(url)
        # Without what may stand before an @: problems go into a run folder, which is passed on.
        self._shown = self._parts._replace(netloc=self._parts.netloc.rpartition("@")[2]).geturl()
        self._headers = {"Accept": "text/plain;version=0.0.4", "Connection": "close", **_authorization(self._parts)}
        self._due_s = -math.inf
        self._first_j: dict[tuple[str, str | None], float] = {}
        self._problems: dict[str, None] = {}
        self._looked = False

    @property
    def problems(self) -> list[str]:
        return list(self._problems)

    def read(self, now_s: float) -> list[Sample]:
        if now_s < self._due_s:
            return []
        self._due_s = now_s + PERIOD_S * 0.95  # a little early: a sampler's jitter must not cost a whole turn
        try:
            readings = parse(self._fetch())
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._say(f"telemetry: {self._shown} did not answer as expected at times: {_reason(error)}")
            return []
        if not self._looked:
            self._look(readings)
        return [self._sample(now_s, who, columns) for who, columns in sorted(readings.items(), key=_order)]

    def _fetch(self) -> str:
        path = self._parts.path or "/metrics"
        end_s = time.monotonic() + TIMEOUT_S
        with contextlib.closing(_connection(self._parts)) as connection:
            connection.request("GET", f"{path}?{self._parts.query}".rstrip("?"), headers=self._headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise ValueError(f"HTTP {answer.status}")
            body = bytearray()
            while piece := answer.read1(1 << 16):
                body += piece
                if len(body) > BYTES_MAX:
                    raise ValueError(f"more than {BYTES_MAX >> 20} MiB")
                if time.monotonic() > end_s:
                    raise TimeoutError
        return body.decode(errors="replace")

    def _sample(self, now_s: float, who: tuple[str, str | None], columns: dict[str, Any]) -> Sample:
        energy_j = columns.get("energy_j")
        if energy_j is not None:
            columns["energy_j"] = energy_j - self._first_j.setdefault(who, energy_j)
        return Sample(now_s, columns.pop("source", "prometheus"), *who, **columns)

    def _look(self, readings: _Readings) -> None:
        """Says what there is not, at the first answer."""
        self._looked = True
        if not readings:
            self._say(f"telemetry: {self._shown} tells of no GPU (known are the DCGM exporter and gpuplan serve)")
            return
        told = {column for columns in readings.values() for column, value in columns.items() if value is not None}
        lacking = [word for column, word in _EXPECTED.items() if column not in told]
        if lacking:
            self._say(f"telemetry: {self._shown} has no {', '.join(lacking)}")

    def _say(self, problem: str) -> None:
        self._problems.setdefault(problem)


def parse(text: str) -> _Readings:
    """The columns of every card and slice that an exposition tells of. Raises ValueError for what is none."""
    from prometheus_client.parser import text_string_to_metric_families

    dcgm: dict[tuple[str, ...], dict[str, float]] = {}
    profiles: dict[tuple[str, ...], str] = {}
    readings: _Readings = {}
    wanted = {name for names in DCGM.values() for name, _ in names} | set(_DCGM_MEMORY)
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = sample.name.removesuffix("_total")  # which the parser adds to counters
                labels, value = sample.labels, sample.value
                if not math.isfinite(value):
                    continue
                if name in wanted:
                    who = _who(labels)
                    dcgm.setdefault(who, {})[name] = value
                    profiles[who] = labels.get("GPU_I_PROFILE", "")
                elif column := OWN.get(name):
                    row = readings.setdefault((labels.get("gpu", "gpu"), labels.get("slice") or None), {})
                    row[column] = int(value) if column == "processes" else value
                    row["source"] = "emulated" if labels.get("source") == "emulated" else "prometheus"
    except (ValueError, LookupError, AttributeError):  # what the parser raises for a text of another kind
        raise ValueError("not Prometheus text") from None
    several = len({host for host, *_ in dcgm}) > 1
    for (host, gpu, number), metrics in dcgm.items():
        card = f"{host}/gpu{gpu}" if several else f"gpu{gpu}"
        columns = _columns(metrics)
        if number:
            profile = profiles[host, gpu, number] or None
            part = slice_name(card, profile, None, int(number) if number.isdigit() else 0)
            whole = readings.setdefault((card, None), {})
            for column in _OF_THE_CARD:
                if column in columns:
                    whole.setdefault(column, columns.pop(column))
            readings.setdefault((card, part), {}).update(columns)
        else:
            readings.setdefault((card, None), {}).update(columns)
    return readings


def _who(labels: Mapping[str, str]) -> tuple[str, str, str]:
    host = labels.get("Hostname") or labels.get("hostname") or labels.get("instance") or ""
    return host, labels.get("gpu", ""), labels.get("GPU_I_ID", "")


def _columns(metrics: Mapping[str, float]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for column, names in DCGM.items():
        found = next(((name, convert) for name, convert in names if name in metrics), None)
        if found is not None:
            columns[column] = found[1](metrics[found[0]])
    if "DCGM_FI_DEV_FB_USED" in metrics and "DCGM_FI_DEV_FB_FREE" in metrics:
        columns["memory_total_bytes"] = _mib(sum(metrics.get(name, 0.0) for name in _DCGM_MEMORY))
    return columns


def _order(row: tuple[tuple[str, str | None], Any]) -> tuple[str, str]:
    (gpu, part), _ = row
    return gpu, part or ""


def _connection(parts: SplitResult) -> http.client.HTTPConnection:
    host = parts.hostname or ""
    if parts.scheme == "https":
        return http.client.HTTPSConnection(host, parts.port, timeout=TIMEOUT_S, context=ssl.create_default_context())
    return http.client.HTTPConnection(host, parts.port, timeout=TIMEOUT_S)


def _authorization(parts: SplitResult) -> dict[str, str]:
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it took too long"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
