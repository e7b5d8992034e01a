"""What a source of telemetry is, and the names that all of them share."""

from __future__ import annotations

from typing import Self

from gpuplan.record.recorder import Sample

THROTTLE_REASONS = (
    (0x001, "gpu_idle"),
    (0x002, "applications_clocks_setting"),
    (0x004, "sw_power_cap"),
    (0x008, "hw_slowdown"),
    (0x010, "sync_boost"),
    (0x020, "sw_thermal_slowdown"),
    (0x040, "hw_thermal_slowdown"),
    (0x080, "hw_power_brake_slowdown"),
    (0x100, "display_clock_setting"),
)
"""Bits of NVML's clock event reasons, by the names of `nvidia-smi --help-query-gpu`. DCGM has the same bits."""


class Source:
    """Readings of cards. Entered before the first and left after the last, both in the thread that reads."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def read(self, now_s: float) -> list[Sample]:
        """A row for each card and each slice that has something to say at `now_s`."""
        raise NotImplementedError

    @property
    def problems(self) -> list[str]:
        """What could not be read and why: each said once, however often it happened. May be asked by any thread."""
        return []


def throttle_names(bits: int) -> str:
    """The reasons in a bit mask, joined by `|`; a bit of a newer driver keeps its number."""
    known = [name for bit, name in THROTTLE_REASONS if bits & bit]
    rest = bits & ~sum(bit for bit, _ in THROTTLE_REASONS)
    return "|".join([*known, *([hex(rest)] if rest else [])])


def slice_name(gpu: str, profile: str | None, start: int | None, gpu_instance_id: int) -> str:
    """`gpu0/1g.10gb@6`, as deployments name it; by the number of the GPU instance where its place is not told."""
    if profile is None:
        return f"{gpu}/gi{gpu_instance_id}"
    return f"{gpu}/{profile}@{start}" if start is not None else f"{gpu}/{profile}#{gpu_instance_id}"
