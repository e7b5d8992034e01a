"""How a card can be cut: which profiles fit beside each other, where each stands, and every layout that can exist.

Takes a card, whose `profiles` are data (`profiles.py`, or what NVML said of a real one). An instance covers `width`
consecutive memory cells from one of its profile's `starts`; instances never overlap, at most `count_max` of a profile
exist, and they share the card's media engines. Compute slices need no check of their own: the starts encode it.

`+me`, `-me` and `+gfx` variants have the SMs, memory and place of the plain profile. They can be placed like any other,
but `valid_layouts` leaves them out: they change nothing that a model is served with.

Which free place the driver takes for a profile that is given without one is not documented, and the order of a list
decides whether it fits: the MIG guide has `-cgi 19,19,14,9` fail on an A100 and `-cgi 9,19,14,19` succeed ("3g must be
specified first"), and mig-parted tries one order after another. All listings in the guide agree with fixed preferences:
3g 4, 0; 2g 4, 0, 2; 1g 6, 4, 5, 0, 1, 2, 3. `place` names every start (nvidia-smi takes `profile:start`), and gives
them widest first, an order that also succeeds with those preferences and wherever the last free start is taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from gpuplan.errors import InputError, unknown_name
from gpuplan.hardware.catalog import Gpu
from gpuplan.hardware.profiles import GIB, MEDIA_ENGINES, Engines, parsed
from gpuplan.hardware.profiles import Profile as Profile

WHOLE = "whole"
"""The name of the one slice of a card that is not cut."""

NAME_TOLERANCE = 0.15
"""Drivers name one profile 3g.39gb and 3g.40gb, 1g.23gb and 1g.24gb; the next one up has half as much again."""

MEMORY_TOLERANCE = 0.03
"""By how much a profile's memory varies with driver and ECC."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A slice at its place: it covers cells `start` to `start + profile.width - 1`."""

    profile: Profile
    start: int


def plain_profiles(card: Gpu) -> tuple[Profile, ...]:
    """The profiles without a suffix, the 1g with double memory among them."""
    return tuple(p for p in card.profiles if not p.suffix)


def whole(card: Gpu) -> Profile:
    """The uncut card as one slice with all its SMs, memory and bandwidth."""
    return Profile(WHOLE, 0, 1, (0,), 1, card.memory_bytes, card.sm_count, 1)


def profile(card: Gpu, name: str, *, key: str = "deployment.mig") -> Profile:
    """The profile of that name, or the one of as many slices and nearly its memory: names change with the driver.

    Raises InputError with the names this card has.
    """
    if not card.profiles:
        raise InputError(f"{card.name} has no MIG: leave the layout out", key=key, value=name)
    found = _named(card.profiles, name)
    if found is None:
        raise unknown_name(f"MIG profile of {card.name}", name, [p.name for p in card.profiles], key=key)
    return found


def part(card: Gpu, name: str, *, key: str = "deployment.mig") -> Profile:
    """The slice of that name: the uncut card, or one of its profiles. Raises InputError with the card's names."""
    return whole(card) if name == WHOLE else profile(card, name, key=key)


def place(card: Gpu, names: Sequence[str], *, key: str = "deployment.mig") -> tuple[Placement, ...]:
    """Start cells for every named profile, in an order in which they can be created.

    Raises InputError naming the first profile of `names` that does not fit beside those before it.
    """
    wanted = [profile(card, name, key=f"{key}[{i}]") for i, name in enumerate(names)]
    found = _fit(card, tuple(wanted))
    if found is not None:
        return found
    for i in range(1, len(wanted) + 1):
        if _fit(card, tuple(wanted[:i])) is None:
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
    """Every non-empty layout of plain profiles a card can have, as sorted names (a multiset), largest first."""
    found = {tuple(p.profile for p in placements) for placements in placements_all(plain_profiles(card)) if placements}
    unique = {tuple(sorted(names, key=_size, reverse=True)) for names in found}
    return tuple(
        tuple(p.name for p in layout)
        for layout in sorted(unique, key=lambda layout: [_size(p) for p in layout], reverse=True)
    )


@cache
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


def differences(table: tuple[Profile, ...], seen: tuple[Profile, ...]) -> list[str]:
    """What a real card says otherwise than the table, a sentence each; empty when they agree.

    Memory within 3 % is agreement. What the table only assumed is said to have been assumed.
    """
    found: list[str] = []
    missing = {p.name for p in seen}
    for row in table:
        real = _named(seen, row.name)
        if real is None:
            found.append(f"the card does not report {row.name}")
            continue
        missing.discard(real.name)
        if real.name != row.name:
            found.append(f"{row.name} is called {real.name} here")
        found += _figures_otherwise(row, real)
    return found + [f"the card also has {p.name}, which the table does not know" for p in seen if p.name in missing]


def _figures_otherwise(row: Profile, real: Profile) -> Iterator[str]:
    figures: list[tuple[str, object, object, str]] = [
        ("memory cells", row.width, real.width, "starts"),
        ("start cells", _list(row.starts), _list(real.starts), "starts"),
        ("instances at most", row.count_max, real.count_max, "count_max"),
        ("SMs", row.sm_count, real.sm_count, "sm_count"),
        ("cells of the card", row.cells, real.cells, "starts"),
    ]
    if abs(real.memory_bytes - row.memory_bytes) > MEMORY_TOLERANCE * row.memory_bytes:
        figures.append(("GiB", f"{row.memory_bytes / GIB:.2f}", f"{real.memory_bytes / GIB:.2f}", "memory_bytes"))
    for what, expected, reported, field in figures:
        if expected != reported:
            how = "assumed" if field in row.assumed else "listed"
            yield f"{real.name}: {what} {reported}, where {expected} was {how}"


def _named(among: tuple[Profile, ...], name: str) -> Profile | None:
    """The profile of that name, else of as many slices, the same suffix and the nearest memory by name."""
    exact = next((p for p in among if p.name == name), None)
    wanted = parsed(name)
    if exact is not None or wanted is None:
        return exact
    slices, gb, suffix = wanted
    alike = [
        (abs(named[1] - gb), p)
        for p in among
        if (named := parsed(p.name)) and (named[0], named[2]) == (slices, suffix)
        if abs(named[1] - gb) <= NAME_TOLERANCE * named[1]
    ]
    return min(alike, key=lambda pair: pair[0])[1] if alike else None


@cache
def _fit(card: Gpu, wanted: tuple[Profile, ...]) -> tuple[Placement, ...] | None:
    """A placement found by trying the widest first, each from its last start down to its first; None if none exists.

    Low cells are left free: 4g starts only there.
    """
    if any(count > kind.count_max for kind, count in Counter(wanted).items()) or not _engines_suffice(card, wanted):
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


def _engines_suffice(card: Gpu, wanted: tuple[Profile, ...]) -> bool:
    """Whether the card has the media engines: beside a 1g+me.all, which takes them all, only -me slices can exist.

    The profile of the whole card says how many there are. A number that is not known limits nothing.
    """
    whole = next((p.engines for p in card.profiles if p.width == p.cells), Engines())
    for kind in MEDIA_ENGINES:
        most = getattr(whole, kind)
        if most is not None and sum(getattr(p.engines, kind) or 0 for p in wanted) > most:
            return False
    return True


def _size(kind: Profile) -> tuple[int, int]:
    return (kind.slices, kind.memory_bytes)


def _list(starts: tuple[int, ...]) -> str:
    return ", ".join(map(str, starts))


def _examples(card: Gpu) -> str:
    return "; ".join("[" + ", ".join(layout) + "]" for layout in maximal_layouts(card)[:4])
