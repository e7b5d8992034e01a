"""Layouts: what can exist, where it stands, and which wish is the first that cannot be met."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuplan.errors import InputError
from gpuplan.hardware import catalog, mig
from gpuplan.hardware.mig import Placement

A100 = catalog.gpu("a100-80gb")
CUT_CARDS = [catalog.gpu(name) for name in mig.PROFILES]


def assert_legal(placements: tuple[Placement, ...]) -> None:
    cells = [cell for p in placements for cell in range(p.start, p.start + p.profile.width)]
    assert len(cells) == len(set(cells)), "instances never overlap"
    assert all(cell < p.profile.cells for p in placements for cell in range(p.start, p.start + p.profile.width))
    assert all(p.start in p.profile.starts for p in placements), "only legal starts"
    assert all(n <= kind.count_max for kind, n in Counter(p.profile for p in placements).items())


def test_an_a100_has_297_placements_of_its_five_plain_profiles() -> None:
    plain = mig.profiles(A100)[:5]
    assert sum(1 for placed in mig.placements_all(plain) if placed) == 297


def test_19_of_them_can_take_no_further_slice() -> None:
    placed = [frozenset((p.profile.name, p.start) for p in ps) for ps in mig.placements_all(mig.profiles(A100)[:5])]
    assert sum(not any(one < other for other in placed) for one in placed) == 19


@pytest.mark.parametrize(
    ("card", "maximal"),
    [("a100-40gb", 28), ("a100-80gb", 28), ("h100-80gb", 28), ("h200-141gb", 28), ("a30", 4), ("l4", 0)],
)
def test_the_number_of_maximal_layouts(card: str, maximal: int) -> None:
    assert len(mig.maximal_layouts(catalog.gpu(card))) == maximal


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


@settings(deadline=None)
@given(st.data())
def test_what_place_accepts_is_legal_and_what_it_refuses_does_not_exist(data: st.DataObject) -> None:
    card = data.draw(st.sampled_from(CUT_CARDS))
    names = data.draw(st.lists(st.sampled_from([p.name for p in mig.profiles(card)]), min_size=1, max_size=8))
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
    assert exists
    assert Counter(p.profile.name for p in placements) == Counter(names), "each wish has its place"
    assert_legal(placements)


@pytest.mark.parametrize(
    ("names", "key", "text"),
    [
        (["4g.40gb", "4g.40gb"], "deployment.mig[1]", "4g.40gb does not fit beside 4g.40gb"),
        (["3g.40gb", "1g.10gb", "4g.40gb", "1g.10gb"], "deployment.mig[2]", "beside 3g.40gb, 1g.10gb"),  # 9 cells
        (["3g.40gb", "7g.80gb", "4g.40gb"], "deployment.mig[1]", "7g.80gb does not fit beside 3g.40gb"),  # not the last
        (["1g.10gb"] * 8, "deployment.mig[7]", "1g.10gb does not fit beside 1g.10gb, "),
        (["3g.20gb"], "deployment.mig[0]", "unknown MIG profile of a100-80gb"),  # the 40 GB card's name
        (["3g.40gb", "5g.40gb"], "deployment.mig[1]", "did you mean"),
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
    assert mig.valid_layouts(catalog.gpu("l4")) == ()


def test_placement_keeps_low_cells_free_for_4g() -> None:
    """A 1g goes to the highest cell it may start from: 4g, which starts only at 0, still fits afterwards."""
    (lone,) = mig.place(A100, ["1g.10gb"])
    assert lone.start == 6


def test_an_uncut_card_is_all_of_it() -> None:
    part = mig.whole(A100)
    assert (part.memory_bytes, part.sm_count, part.width / part.cells) == (A100.memory_bytes, 108, 1.0)


@pytest.mark.parametrize(
    ("card", "published"),
    [
        ("a30", "A30-24GB"),
        ("a100-40gb", "A100-40GB"),
        ("a100-80gb", "A100-80GB"),
        ("h100-80gb", "H100-80GB-SXM"),
        ("h200-141gb", "H200-141GB"),
    ],
)
def test_profiles_are_those_that_real_cards_report(card: str, published: str, data_file: Callable[[str], Path]) -> None:
    """Media variants (`+me`) are left out: they differ from the plain ones in nothing that serves a model."""
    rules = json.loads(data_file("mig/rules.json").read_text())["gpus"][published]
    reported = {
        p["profile"]: (p["compute_slices"], p["mem_width"], tuple(p["starts"]), p["max_instances"], p["sm"])
        for p in rules["profiles"]
        if "+" not in p["profile"]
    }
    ours = {p.name: (p.slices, p.width, p.starts, p.count_max, p.sm_count) for p in mig.profiles(catalog.gpu(card))}
    assert ours == reported
    assert {p.cells for p in mig.profiles(catalog.gpu(card))} == {rules["memory_grid"]}


@pytest.mark.parametrize("card", CUT_CARDS, ids=lambda card: card.name)
def test_a_larger_slice_never_has_less(card: catalog.Gpu) -> None:
    by_size = sorted(mig.profiles(card), key=lambda p: (p.slices, p.width))
    for small, large in itertools.pairwise(by_size):
        assert small.sm_count <= large.sm_count
    assert max(p.memory_bytes for p in by_size) <= card.memory_bytes
