"""Layouts: what can exist, where it stands, and which wish is the first that cannot be met."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuplan.errors import InputError
from gpuplan.hardware import catalog, mig
from gpuplan.hardware.mig import Placement
from gpuplan.hardware.profiles import GIB

A100 = catalog.gpu("a100-80gb")
RTX = catalog.gpu("rtx-pro-6000-blackwell")
CUT_CARDS = [card for card in catalog.GPUS.values() if card.profiles]


def assert_legal(placements: tuple[Placement, ...]) -> None:
    cells = [cell for p in placements for cell in range(p.start, p.start + p.profile.width)]
    assert len(cells) == len(set(cells)), "instances never overlap"
    assert all(cell < p.profile.cells for p in placements for cell in range(p.start, p.start + p.profile.width))
    assert all(p.start in p.profile.starts for p in placements), "only legal starts"
    assert all(n <= kind.count_max for kind, n in Counter(p.profile for p in placements).items())


def test_an_a100_has_297_placements_of_its_five_plain_profiles() -> None:
    plain = A100.profiles[:5]
    assert sum(1 for placed in mig.placements_all(plain) if placed) == 297


def test_19_of_them_can_take_no_further_slice_and_12_layouts_are_in_no_other() -> None:
    plain = A100.profiles[:5]
    placed = [frozenset((p.profile.name, p.start) for p in ps) for ps in mig.placements_all(plain)]
    assert sum(not any(one < other for other in placed) for one in placed) == 19
    assert len(mig.maximal_layouts(replace(A100, profiles=plain))) == 12


@pytest.mark.parametrize("card", CUT_CARDS, ids=lambda card: card.name)
def test_the_number_of_maximal_layouts(card: catalog.Gpu) -> None:
    seven = card.profiles[0].cells == 8
    assert len(mig.maximal_layouts(card)) == (28 if seven else 4), "28 with the double-memory 1g"
    assert not any("+" in name or "-" in name for layout in mig.valid_layouts(card) for name in layout)


@pytest.mark.parametrize(
    ("layout", "exists"),
    [
        (("3g.40gb", "3g.40gb"), True),  # 3g starts at 0 and at 4
        (("4g.40gb", "3g.40gb"), True),  # the widest pair
        (("4g.40gb", "4g.40gb"), False),  # 4g starts only at 0
        (("1g.10gb",) * 7, True),
        (("1g.10gb",) * 8, False),  # the eighth cell has no compute slice
        (("7g.80gb", "1g.10gb"), False),
        (("2g.20gb",) * 3 + ("1g.10gb",), True),
        (("1g.20gb",) * 4, True),  # double-memory slices fill the eighth cell
    ],
)
def test_what_an_a100_can_be_cut_into(layout: tuple[str, ...], exists: bool) -> None:
    assert (layout in mig.valid_layouts(A100)) == exists


@pytest.mark.parametrize("card", CUT_CARDS, ids=lambda card: card.name)
def test_every_valid_layout_can_be_placed_and_lies_within_a_maximal_one(card: catalog.Gpu) -> None:
    maximal = [Counter(layout) for layout in mig.maximal_layouts(card)]
    assert len(set(mig.valid_layouts(card))) == len(mig.valid_layouts(card)), "each once"
    for layout in mig.valid_layouts(card):
        placements = mig.place(card, layout)
        assert_legal(placements)
        assert Counter(p.profile.name for p in placements) == Counter(layout)
        assert any(Counter(layout) <= whole for whole in maximal)


# --- the order of creation ----------------------------------------------------------------------------------------

# Which start an A100's driver prefers, after the listings in NVIDIA's MIG guide, by (compute slices, width). Where it
# puts a double-memory 1g is in no listing.
GUIDE = {(1, 1): (6, 4, 5, 0, 1, 2, 3), (2, 2): (4, 0, 2), (3, 4): (4, 0), (4, 4): (0,), (7, 8): (0,)}


def created(kinds: Iterable[mig.Profile], preferences: dict[tuple[int, int], tuple[int, ...]]) -> list[int] | None:
    """The starts a driver picks that takes each profile's first free one; None where it finds none."""
    taken: set[int] = set()
    starts = []
    for kind in kinds:
        free = (s for s in preferences[kind.slices, kind.width] if not taken & set(range(s, s + kind.width)))
        start = next(free, None)
        if start is None:
            return None
        taken |= set(range(start, start + kind.width))
        starts.append(start)
    return starts


@pytest.mark.parametrize(
    ("order", "starts"),
    [
        (["1g.10gb", "2g.20gb", "4g.40gb"], [6, 4, 0]),  # -cgi 19,14,5
        (["1g.10gb", "1g.10gb", "2g.20gb", "3g.40gb"], None),  # -cgi 19,19,14,9: Insufficient Resources
        (["3g.40gb", "1g.10gb", "2g.20gb", "1g.10gb"], [4, 0, 2, 1]),  # -cgi 9,19,14,19
        (["2g.20gb"] + ["1g.10gb"] * 5, [4, 6, 0, 1, 2, 3]),  # -cgi 14,19,19,19,19,19
    ],
)
def test_the_preferences_are_those_of_the_guide_s_listings(order: list[str], starts: list[int] | None) -> None:
    assert created([mig.profile(A100, name) for name in order], GUIDE) == starts


@pytest.mark.parametrize("card", CUT_CARDS, ids=lambda card: card.name)
def test_every_layout_is_reached_by_its_order_of_creation(card: catalog.Gpu) -> None:
    last_first = {(p.slices, p.width): tuple(reversed(p.starts)) for p in mig.plain_profiles(card)}
    guide = {**GUIDE, (1, 2): (6, 4, 2, 0)} if card.profiles[0].cells == 8 else last_first
    for layout in mig.valid_layouts(card):
        placements = mig.place(card, layout)
        order = [p.profile for p in placements]
        assert created(order, last_first) == [p.start for p in placements], "the last free start, without a way back"
        assert created(order, guide) is not None


@settings(deadline=None)
@given(st.data())
def test_what_place_accepts_is_legal_and_what_it_refuses_does_not_exist(data: st.DataObject) -> None:
    card = data.draw(st.sampled_from(CUT_CARDS))
    names = data.draw(st.lists(st.sampled_from([p.name for p in card.profiles]), min_size=1, max_size=8))
    plain = [p.name for p in mig.plain_profiles(card)]
    exists = Counter(names) in [Counter(layout) for layout in mig.valid_layouts(card)]
    try:
        placements = mig.place(card, names)
    except InputError as error:
        assert not exists
        first = int(error.key.removeprefix("deployment.mig[").removesuffix("]"))
        if first:
            mig.place(card, names[:first])
        with pytest.raises(InputError):
            mig.place(card, names[: first + 1])
        return
    assert exists or not set(names) <= set(plain)
    assert Counter(p.profile.name for p in placements) == Counter(names), "each wish has its place"
    assert_legal(placements)


# --- media and graphics variants ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "layout", "refused"),
    [
        ("a100-80gb", ["1g.10gb+me"] + ["1g.10gb"] * 6, None),  # it stands where a plain 1g would
        ("a100-80gb", ["1g.10gb+me", "1g.10gb+me"], 1),  # one only
        ("a100-80gb", ["1g.10gb+me"] + ["1g.10gb"] * 7, 7),  # seven cells in all
        ("a30", ["2g.12gb+me", "1g.6gb+me"], 1),  # one of each may exist, but there is one OFA
        ("rtx-pro-6000-blackwell", ["1g.24gb+me.all", "1g.24gb-me", "2g.48gb-me"], None),  # -me takes no engine
        ("rtx-pro-6000-blackwell", ["1g.24gb+me.all", "1g.24gb"], 1),  # no engine is left
        ("rtx-pro-6000-blackwell", ["1g.24gb+gfx", "1g.24gb", "2g.48gb+gfx"], None),
    ],
)
def test_variants_take_a_place_and_engines(card: str, layout: list[str], refused: int | None) -> None:
    if refused is None:
        placements = mig.place(catalog.gpu(card), layout)
        assert_legal(placements)
        assert Counter(p.profile.name for p in placements) == Counter(layout)
        return
    with pytest.raises(InputError) as caught:
        mig.place(catalog.gpu(card), layout)
    assert caught.value.key == f"deployment.mig[{refused}]"


def test_engines_that_are_not_known_refuse_nothing() -> None:
    parts = tuple(p for p in A100.profiles if p.slices < 7)  # a card that does not list its whole
    assert mig.place(replace(A100, profiles=parts), ["2g.20gb"] * 3)
    assert mig.place(catalog.gpu("b200"), ["1g.23gb+me"] + ["1g.23gb"] * 6)


# --- names and errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "name", "found"),
    [
        ("a100-80gb", "3g.39gb", "3g.40gb"),  # drivers round differently
        ("a100-80gb", "3G.40GB", "3g.40gb"),
        ("a100-80gb", "1g.20gb", "1g.20gb"),  # not the 1g.10gb: memory decides between profiles of as many slices
        ("a100-80gb", "1g.11gb+me", "1g.10gb+me"),  # the suffix is kept
        ("gb200-186gb", "1g.24gb", "1g.23gb"),  # as another driver listed it
        ("gb200-186gb", "7g.189gb", "7g.186gb"),
    ],
)
def test_a_profile_is_found_by_slices_and_memory(card: str, name: str, found: str) -> None:
    assert mig.profile(catalog.gpu(card), name).name == found


@pytest.mark.parametrize(
    ("names", "key", "text"),
    [
        (["4g.40gb", "4g.40gb"], "deployment.mig[1]", "4g.40gb does not fit beside 4g.40gb"),
        (["3g.40gb", "1g.10gb", "4g.40gb", "1g.10gb"], "deployment.mig[2]", "beside 3g.40gb, 1g.10gb"),  # 9 cells
        (["3g.40gb", "7g.80gb", "4g.40gb"], "deployment.mig[1]", "7g.80gb does not fit beside 3g.40gb"),  # not the last
        (["1g.10gb"] * 8, "deployment.mig[7]", "1g.10gb does not fit beside 1g.10gb, "),
        (["3g.20gb"], "deployment.mig[0]", "unknown MIG profile of a100-80gb"),  # the 40 GB card's name
        (["1g.5gb"], "deployment.mig[0]", "did you mean"),  # the same, not the nearest of its own
        (["3g.40gb", "5g.40gb"], "deployment.mig[1]", "did you mean"),
        (["1g.10gb+gfx"], "deployment.mig[0]", "did you mean 1g.10gb"),
    ],
)
def test_an_impossible_layout_names_the_first_that_does_not_fit(names: list[str], key: str, text: str) -> None:
    with pytest.raises(InputError) as caught:
        mig.place(A100, names)
    assert caught.value.key == key
    assert text in str(caught.value)
    assert "allowed: " in str(caught.value)


def test_a_card_without_mig_cannot_be_cut() -> None:
    with pytest.raises(InputError, match=r"deployment.mig\[0\]: l4 has no MIG"):
        mig.place(catalog.gpu("l4"), ["1g.5gb"])
    assert mig.valid_layouts(catalog.gpu("l4")) == mig.maximal_layouts(catalog.gpu("l4")) == ()


def test_placement_keeps_low_cells_free_for_4g() -> None:
    """A 1g goes to the highest cell it may start from: 4g, which starts only at 0, still fits afterwards."""
    (lone,) = mig.place(A100, ["1g.10gb"])
    assert lone.start == 6


def test_an_uncut_card_is_all_of_it() -> None:
    part = mig.whole(A100)
    assert (part.memory_bytes, part.sm_count, part.width / part.cells) == (A100.memory_bytes, 108, 1.0)


# --- what a real card says ----------------------------------------------------------------------------------------


def test_a_card_that_says_what_the_table_says_differs_in_nothing() -> None:
    for card in CUT_CARDS:
        assert mig.differences(card.profiles, card.profiles) == []
    hair = tuple(replace(p, memory_bytes=int(p.memory_bytes * 1.02)) for p in A100.profiles)
    assert mig.differences(A100.profiles, hair) == [], "memory varies with driver and ECC"


def test_every_difference_is_a_sentence() -> None:
    b200 = catalog.gpu("b200-180gb").profiles
    one, two, three = b200[0], b200[1], b200[2]
    seen = (
        replace(one, memory_bytes=int(20.5 * GIB)),
        replace(two, name="2g.44gb", count_max=2),
        replace(three, starts=(0,), sm_count=70),
        RTX.profiles[0],
    )
    assert mig.differences((one, two, three, b200[3]), seen) == [
        "1g.23gb: GiB 20.50, where 22.00 was listed",
        "2g.45gb is called 2g.44gb here",
        "2g.44gb: instances at most 2, where 3 was listed",
        "3g.90gb: start cells 0, where 0, 4 was assumed",
        "3g.90gb: SMs 70, where 68 was assumed",
        "the card does not report 4g.90gb",
        "the card also has 1g.24gb, which the table does not know",
    ]
