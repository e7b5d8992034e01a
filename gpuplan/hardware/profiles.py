"""MIG profiles as data: what a card can be cut into, as far as anyone has seen.

A card's memory is a row of cells: 8 on cards with 7 compute slices, 4 on an A30, 12 on an RTX PRO 6000. A profile
covers `width` cells from one of its `starts`. The tables are NVIDIA's MIG user guide and `nvidia-smi mig -lgip/-lgipp`
of real cards (drivers 535 to 575; memory varies by 1 to 3 % with driver and ECC). What nobody published is filled by a
rule that stands beside it, and the field is named in `assumed`; what NVML says of a real card wins over all of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MIB = 1 << 20
GIB = 1 << 30

MEDIA_ENGINES = ("nvdec", "nvenc", "jpeg", "ofa")


@dataclass(frozen=True, slots=True)
class Engines:
    """Units beside the SMs: copy engines, video decoders and encoders, JPEG, optical flow. None: not known."""

    copy: int | None = None
    nvdec: int | None = None
    nvenc: int | None = None
    jpeg: int | None = None
    ofa: int | None = None


@dataclass(frozen=True, slots=True)
class Profile:
    """A kind of slice. `slices` are compute slices, `width` and `starts` memory cells."""

    name: str
    slices: int
    width: int
    starts: tuple[int, ...]
    count_max: int
    memory_bytes: int
    sm_count: int
    cells: int
    """Memory cells of the whole card: `width / cells` is the slice's share of bandwidth."""
    suffix: str = ""
    """`+me` has the media extensions, `+me.all` all media engines, `-me` none, `+gfx` graphics. Plain profiles: ''."""
    profile_id: int | None = None
    """What `nvidia-smi mig -cgi` takes for a name; unlike names it does not change with the driver."""
    engines: Engines = Engines()
    assumed: frozenset[str] = frozenset()
    """Fields not seen on a real card; `starts` stands for the whole placement, `width` too."""


_NAME = re.compile(r"(\d+)g\.(\d+)gb(\S*)")


def parsed(name: str) -> tuple[int, int, str] | None:
    """(compute slices, GB, suffix) of a profile's name such as `1g.10gb+me`, or None for other words."""
    match = _NAME.fullmatch(name.strip().lower())
    return (int(match[1]), int(match[2]), match[3]) if match else None


# --- cards with 7 compute slices and 8 cells ------------------------------------------------------------------------

# The plain profiles, then the 1g with double memory, then the 1g with media extensions, alike on all of these cards:
# (slices, width, starts, count_max, suffix, profile_id).
_SEVEN = (
    (1, 1, tuple(range(7)), 7, "", 19),
    (2, 2, (0, 2, 4), 3, "", 14),
    (3, 4, (0, 4), 2, "", 9),
    (4, 4, (0,), 1, "", 5),
    (7, 8, (0,), 1, "", 0),
    (1, 2, (0, 2, 4, 6), 4, "", 15),
    (1, 1, tuple(range(7)), 1, "+me", 20),
)
# In that order: copy, nvdec, nvenc, jpeg, ofa. None of these cards has an NVENC.
_A100_ENGINES = tuple(
    Engines(*row)
    for row in (
        *((1, 0, 0, 0, 0), (2, 1, 0, 0, 0), (3, 2, 0, 0, 0), (4, 2, 0, 0, 0)),
        *((7, 5, 0, 1, 1), (1, 1, 0, 0, 0), (1, 1, 0, 1, 1)),
    )
)
_H100_ENGINES = tuple(
    Engines(*row)
    for row in (
        *((1, 1, 0, 1, 0), (2, 2, 0, 2, 0), (3, 3, 0, 3, 0), (4, 4, 0, 4, 0)),
        *((8, 7, 0, 7, 1), (1, 1, 0, 1, 0), (1, 1, 0, 1, 1)),
    )
)
_NOT_LISTED = (None, None, 0, None, None)
_B200_ENGINES = tuple(
    Engines(*row)
    for row in (
        *((2, 1, 0, 1, 0), (4, 2, 0, 2, None), _NOT_LISTED, _NOT_LISTED),
        *(_NOT_LISTED, (2, 1, 0, 1, 0), (2, 1, 0, 1, 1)),
    )
)
_WIDTHS = (1, 2, 4, 8)


def _seven_slice(
    gb: Sequence[int],
    memory_gib: Sequence[float],
    sm_count: Sequence[int],
    engines: Sequence[Engines],
    *,
    assumed: str = "",
    more: dict[str, str] | None = None,
) -> tuple[Profile, ...]:
    """`gb` (in names) and `memory_gib` are by width 1, 2, 4, 8; `sm_count` of 1g, 2g, 3g, 4g, 7g, double-memory 1g.

    `assumed` are fields of all profiles; `more` adds to it for some, by their names without the memory (`3g`).
    """
    sms = (*sm_count, sm_count[0])
    return tuple(
        Profile(
            name=f"{slices}g.{gb[_WIDTHS.index(width)]}gb{suffix}",
            slices=slices,
            width=width,
            starts=starts,
            count_max=count_max,
            memory_bytes=int(memory_gib[_WIDTHS.index(width)] * GIB),
            sm_count=sm,
            cells=8,
            suffix=suffix,
            profile_id=profile_id,
            engines=units,
            assumed=frozenset([*assumed.split(), *(more or {}).get(f"{slices}g", "").split()]),
        )
        for (slices, width, starts, count_max, suffix, profile_id), sm, units in zip(_SEVEN, sms, engines, strict=True)
    )


_A100_SMS = (14, 28, 42, 56, 98, 14)
_H100_SMS = (16, 32, 60, 64, 132, 26)
_H100_GB, _H100_GIB = (10, 20, 40, 80), (9.75, 19.62, 39.5, 79.25)
_NVL_GIB = (10.75, 21.62, 46.38, 93.12)


def _share_of_h100(sm_count: int) -> tuple[int, ...]:
    """SMs of the slices of a card that nobody listed: an H100's shares of the whole, in whole pairs (a TPC is two)."""
    return tuple(2 * round(sm_count * sm / _H100_SMS[4] / 2) for sm in _H100_SMS)


# --- an A30 ---------------------------------------------------------------------------------------------------------

_A30 = tuple(
    Profile(name, slices, slices, starts, count_max, int(gib * GIB), 14 * slices, 4, suffix, number, Engines(*engines))
    for name, slices, starts, count_max, gib, suffix, number, engines in (
        # The guide gives a 1g no NVDEC, one real card gave it one: not known.
        ("1g.6gb", 1, (0, 1, 2, 3), 4, 5.81, "", 14, (1, None, 0, 0, 0)),
        ("2g.12gb", 2, (0, 2), 2, 11.69, "", 5, (2, 2, 0, 0, 0)),
        ("4g.24gb", 4, (0,), 1, 23.44, "", 0, (4, 4, 0, 1, 1)),
        ("1g.6gb+me", 1, (0, 1, 2, 3), 1, 5.81, "+me", 21, (1, 1, 0, 1, 1)),
        ("2g.12gb+me", 2, (0, 2), 1, 11.69, "+me", 6, (2, 2, 0, 1, 1)),
    )
)

# --- an RTX PRO 6000 Blackwell --------------------------------------------------------------------------------------

# Of 1, 2 and 4 compute slices: (width, starts, instances, GiB, SMs).
_RTX_SIZES: dict[int, tuple[int, tuple[int, ...], int, float, int]] = {
    1: (3, (0, 3, 6, 9), 4, 23.62, 46),
    2: (6, (0, 6), 2, 47.38, 94),
    4: (12, (0,), 1, 95.0, 188),
}


def _rtx_pro_6000(rows: Iterable[tuple[int, str, int, int | None, int, int]]) -> Iterable[Profile]:
    """From (slices, suffix, profile_id, count_max or None for as many as fit, decoders, OFA units): a slice has as many
    NVENC and JPEG units as decoders."""
    for slices, suffix, number, count_max, decoders, ofa in rows:
        width, starts, fit, gib, sm = _RTX_SIZES[slices]
        engines = Engines(slices, decoders, decoders, decoders, ofa)
        name, count = f"{slices}g.{24 * slices}gb{suffix}", count_max or fit
        yield Profile(name, slices, width, starts, count, int(gib * GIB), sm, 12, suffix, number, engines)


PROFILES: dict[str, tuple[Profile, ...]] = {
    "a30": _A30,
    "a100-40gb": _seven_slice((5, 10, 20, 40), (4.75, 9.62, 19.5, 39.25), _A100_SMS, _A100_ENGINES),
    "a100-80gb": _seven_slice((10, 20, 40, 80), (9.5, 19.5, 39.25, 78.75), _A100_SMS, _A100_ENGINES),
    "h100-80gb": _seven_slice(_H100_GB, _H100_GIB, _H100_SMS, _H100_ENGINES),
    # The guide lists one table for both H100s with 80 GB. The PCIe card has 114 SMs: how they are shared out and what
    # memory its driver gives were not seen.
    "h100-80gb-pcie": _seven_slice(
        _H100_GB, _H100_GIB, _share_of_h100(114), _H100_ENGINES, assumed="memory_bytes sm_count starts"
    ),
    "h100-nvl-94gb": _seven_slice((12, 24, 47, 94), _NVL_GIB, _H100_SMS, _H100_ENGINES),
    # Names, counts and engines are in the guide; memory is an H100 NVL's, by 96/94. The 144 GB GH200 has an H100's SMs.
    "gh200-96gb": _seven_slice(
        (12, 24, 48, 96),
        tuple(gib * 96 / 94 for gib in _NVL_GIB),
        _H100_SMS,
        _H100_ENGINES,
        assumed="memory_bytes sm_count starts",
    ),
    # The real listing ends before 7g, which is given twice the memory of 3g.
    "h200-141gb": _seven_slice(
        (18, 35, 71, 141),
        (16.0, 32.25, 69.5, 139.0),
        _H100_SMS,
        _H100_ENGINES,
        assumed="starts",
        more={"7g": "memory_bytes sm_count"},
    ),
    # The published listings of both Blackwells end before 3g: 4 and 8 cells are given 2 and 4 times the memory of 2,
    # and SMs an H100's shares. 1g had 22.00 GiB in January 2025 and 20.50 in March (on a GB200 also 20.00).
    "b200-180gb": _seven_slice(
        (23, 45, 90, 180),
        (22.0, 44.25, 88.5, 177.0),
        (18, 36, *_share_of_h100(148)[2:5], 30),
        _B200_ENGINES,
        assumed="starts",
        more=dict.fromkeys(("3g", "4g", "7g"), "memory_bytes sm_count"),
    ),
    "gb200-186gb": _seven_slice(
        (23, 47, 93, 186),
        (22.0, 45.5, 91.0, 182.0),
        (18, 38, *_share_of_h100(152)[2:5], 32),
        _B200_ENGINES,
        assumed="starts",
        more=dict.fromkeys(("3g", "4g", "7g"), "memory_bytes sm_count"),
    ),
    "rtx-pro-6000-blackwell": tuple(
        _rtx_pro_6000(
            (
                *((1, "", 14, None, 1, 0), (2, "", 5, None, 2, 0), (4, "", 0, None, 4, 1)),
                *((1, "+me", 21, 1, 1, 1), (1, "+me.all", 65, 1, 4, 1), (2, "+me.all", 64, 1, 4, 1)),
                *((1, "-me", 67, None, 0, 0), (2, "-me", 66, None, 0, 0)),
                *((1, "+gfx", 47, None, 1, 0), (2, "+gfx", 35, None, 2, 0), (4, "+gfx", 32, None, 4, 1)),
            )
        )
    ),
}
"""By the card's name in the catalogue. The A100s' PCIe cards report the tables of the SXM ones."""
