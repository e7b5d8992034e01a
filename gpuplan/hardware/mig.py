"""How a card can be cut: MIG profiles, where each may start, and every layout that can exist.

A card's memory is a row of cells (8 on cards with 7 compute slices, 4 on an A30). An instance of a profile covers
`width` consecutive cells from one of its `starts`; instances never overlap, and at most `count_max` of a profile
exist. That is the whole rule: compute slices need no second check, because the starts already encode it.

Figures: NVIDIA's MIG user guide and `nvidia-smi mig -lgip/-lgipp` output of real cards (driver 535 and later);
memory varies by 1 to 3 % with driver and ECC. Profile names carry the card's memory, so they are per card.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from gpuplan.errors import InputError, unknown_name
from gpuplan.hardware.catalog import GIB, Gpu

WHOLE = "whole"
"""The name of the one slice of a card that is not cut."""


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


@dataclass(frozen=True, slots=True)
class Placement:
    """A slice at its place: it covers cells `start` to `start + profile.width - 1`."""

    profile: Profile
    start: int


def _seven_slice(names: Sequence[str], memory_gib: Sequence[float], sms: Sequence[int]) -> tuple[Profile, ...]:
    """The plain profiles 1g 2g 3g 4g 7g, then the double-memory 1g, of a card with 7 compute slices and 8 cells."""
    shapes = (
        (1, 1, tuple(range(7)), 7),
        (2, 2, (0, 2, 4), 3),
        (3, 4, (0, 4), 2),
        (4, 4, (0,), 1),
        (7, 8, (0,), 1),
        (1, 2, (0, 2, 4, 6), 4),
    )
    return tuple(
        Profile(name, slices, width, starts, count_max, int(gib * GIB), sm, 8)
        for (slices, width, starts, count_max), name, gib, sm in zip(shapes, names, memory_gib, sms, strict=True)
    )


_A100_SMS = (14, 28, 42, 56, 98, 14)
_H100_SMS = (16, 32, 60, 64, 132, 26)

PROFILES: dict[str, tuple[Profile, ...]] = {
    "a30": (
        Profile("1g.6gb", 1, 1, (0, 1, 2, 3), 4, int(5.81 * GIB), 14, 4),
        Profile("2g.12gb", 2, 2, (0, 2), 2, int(11.69 * GIB), 28, 4),
        Profile("4g.24gb", 4, 4, (0,), 1, int(23.44 * GIB), 56, 4),
    ),
    "a100-40gb": _seven_slice(
        ("1g.5gb", "2g.10gb", "3g.20gb", "4g.20gb", "7g.40gb", "1g.10gb"),
        (4.75, 9.62, 19.5, 19.5, 39.25, 9.62),
        _A100_SMS,
    ),
    "a100-80gb": _seven_slice(
        ("1g.10gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb", "1g.20gb"),
        (9.5, 19.5, 39.25, 39.25, 78.75, 19.5),
        _A100_SMS,
    ),
    "h100-80gb": _seven_slice(
        ("1g.10gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb", "1g.20gb"),
        (9.75, 19.62, 39.5, 39.5, 79.25, 19.62),
        _H100_SMS,
    ),
    "h200-141gb": _seven_slice(
        ("1g.18gb", "2g.35gb", "3g.71gb", "4g.71gb", "7g.141gb", "1g.35gb"),
        (16.0, 32.25, 69.5, 69.5, 140.0, 32.25),
        _H100_SMS,
    ),
}


def profiles(card: Gpu) -> tuple[Profile, ...]:
    """The MIG profiles of a card; empty when it cannot be cut."""
    return PROFILES.get(card.name, ())


def whole(card: Gpu) -> Profile:
    """The uncut card as one slice with all its SMs, memory and bandwidth."""
    return Profile(WHOLE, 0, 1, (0,), 1, card.memory_bytes, card.sm_count, 1)


def profile(card: Gpu, name: str, *, key: str = "deployment.mig") -> Profile:
    """The profile of that name. Raises InputError with the names this card has."""
    for candidate in profiles(card):
        if candidate.name == name:
            return candidate
    if not profiles(card):
        raise InputError(f"{card.name} has no MIG: leave the layout out", key=key, value=name)
    raise unknown_name(f"MIG profile of {card.name}", name, [p.name for p in profiles(card)], key=key)


def place(card: Gpu, names: Sequence[str], *, key: str = "deployment.mig") -> tuple[Placement, ...]:
    """Start cells for every named profile, in an order in which they can be created.

    Raises InputError naming the first profile of `names` that does not fit beside those before it.
    """
    wanted = [profile(card, name, key=f"{key}[{i}]") for i, name in enumerate(names)]
    found = _first_fit(tuple(wanted))
    if found is not None:
        return found
    for i in range(1, len(wanted) + 1):
        if _first_fit(tuple(wanted[:i])) is None:
            beside = ", ".join(names[: i - 1]) or "nothing"
            raise InputError(
                f"this layout cannot exist on {card.name}: {names[i - 1]} does not fit beside {beside}",
                key=f"{key}[{i - 1}]",
                value=list(names),
                allowed=f"e.g. {_examples(card)}",
            )
    raise AssertionError("a layout that does not fit has a first profile that does not fit")


@cache
def valid_layouts(card: Gpu) -> tuple[tuple[str, ...], ...]:
    """Every non-empty layout a card can have, as sorted profile names (a multiset), largest first."""
    found = {tuple(p.profile for p in placements) for placements in placements_all(profiles(card)) if placements}
    unique = {tuple(sorted(names, key=_size, reverse=True)) for names in found}
    return tuple(
        tuple(p.name for p in layout)
        for layout in sorted(unique, key=lambda layout: [_size(p) for p in layout], reverse=True)
    )


def maximal_layouts(card: Gpu) -> tuple[tuple[str, ...], ...]:
    """The valid layouts to which no slice can be added: every other one is contained in one of these."""
    layouts = [Counter(layout) for layout in valid_layouts(card)]
    return tuple(
        names
        for names, layout in zip(valid_layouts(card), layouts, strict=True)
        if not any(layout < other for other in layouts)
    )


def placements_all(kinds: Iterable[Profile]) -> Iterator[tuple[Placement, ...]]:
    """Every set of non-overlapping placements, the empty one included, by start cell."""
    options = [Placement(kind, start) for kind in kinds for start in kind.starts]

    def extend(chosen: tuple[Placement, ...], first_free: int) -> Iterator[tuple[Placement, ...]]:
        yield chosen
        for option in options:
            used = sum(1 for p in chosen if p.profile == option.profile)
            if option.start >= first_free and used < option.profile.count_max:
                yield from extend((*chosen, option), option.start + option.profile.width)

    return extend((), 0)


@cache
def _first_fit(wanted: tuple[Profile, ...]) -> tuple[Placement, ...] | None:
    """A placement found by trying the widest first, each from its last start down to its first.

    The driver fills from the high cells too; leaving low cells free keeps room for 4g, which starts only at 0.
    """
    if any(count > kind.count_max for kind, count in Counter(wanted).items()):
        return None
    order = sorted(wanted, key=lambda p: (-p.width, -p.slices))

    def extend(i: int, taken: frozenset[int]) -> tuple[Placement, ...] | None:
        if i == len(order):
            return ()
        for start in reversed(order[i].starts):
            cells = frozenset(range(start, start + order[i].width))
            if not cells & taken:
                rest = extend(i + 1, taken | cells)
                if rest is not None:
                    return (Placement(order[i], start), *rest)
        return None

    return extend(0, frozenset())


def _size(kind: Profile) -> tuple[int, int]:
    return (kind.slices, kind.memory_bytes)


def _examples(card: Gpu) -> str:
    return "; ".join("[" + ", ".join(layout) + "]" for layout in maximal_layouts(card)[:4])
