"""Which telemetry a run reads: what was asked for, or what fits where the server runs."""

from __future__ import annotations

from urllib.parse import urlsplit

from gpuplan.errors import InputError
from gpuplan.telemetry.cards import NvmlCards
from gpuplan.telemetry.emulated import EmulatedCards
from gpuplan.telemetry.prometheus import PrometheusCards
from gpuplan.telemetry.source import Source

AUTO = "auto"


def check(asked: str, *, key: str = "--telemetry") -> str:
    """The choice, if it is one. Raises InputError."""
    parts = urlsplit(asked)
    try:
        port_is_one = parts.port != 0
    except ValueError:
        port_is_one = False
    url = parts.scheme in ("http", "https") and parts.hostname and port_is_one and asked.isprintable()
    if asked not in (AUTO, "nvml", "none") and not (url and " " not in asked):
        allowed = "auto, nvml, none, or http(s)://host[:port]/metrics"
        raise InputError("not a source of telemetry", key=key, value=asked, allowed=allowed)
    return asked


def source(asked: str, *, emulated: EmulatedCards | None = None, cards_here: bool) -> Source | None:
    """The source of a checked choice. `auto` is the emulated cards where there are any, else NVML if the server's cards
    are in this machine, else none."""
    if asked == "none" or (asked == AUTO and emulated is None and not cards_here):
        return None
    if asked == AUTO and emulated is not None:
        return emulated
    return NvmlCards() if asked in (AUTO, "nvml") else PrometheusCards(asked)
