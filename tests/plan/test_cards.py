"""Concrete cards: places that the driver accepts, what stays of what is there, and who goes where."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuplan.errors import InputError
from gpuplan.hardware import mig
from gpuplan.hardware.catalog import gpu
from gpuplan.plan.cards import kept, placed
from gpuplan.plan.packing import pack
from gpuplan.plan.packing_terms import CardKind, Option, Packing, Present, PresentCard, Question

A100 = gpu("a100-80gb")
SIZES = {"1g.10gb": 1.0, "2g.20gb": 2.0, "3g.40gb": 3.0, "4g.40gb": 4.0, "7g.80gb": 7.0, "whole": 7.5}


def question(demands: dict[str, float], *current: PresentCard, **changes: object) -> Question:
    options = [Option(model, "a100-80gb", profile, size) for model in demands for profile, size in SIZES.items()]
    asked = Question(demands, [CardKind(A100, 2.0)], options, current=current)
    return replace(asked, **changes)  # type: ignore[arg-type]


def there(*instances: tuple[str, int] | tuple[str, int, str]) -> PresentCard:
    return PresentCard("a100-80gb", tuple(Present(*one) for one in instances))


def as_current(plan: Packing) -> list[PresentCard]:
    return [
        PresentCard(
            card.kind.gpu.name,
            tuple(
                Present(s.placement.profile.name, s.placement.start, s.option.model if s.option else None)
                for s in card.slices
                if s.placement.profile.name != mig.WHOLE
            ),
        )
        for card in plan.cards
    ]


KEPT = [
    (
        ("3g.40gb", "1g.10gb", "1g.10gb", "1g.10gb"),
        (("1g.10gb", 4),),
        1,
        "the 3g goes below it, not to its usual place",
    ),
    (("3g.40gb", "2g.20gb", "2g.20gb"), (("2g.20gb", 4),), 0, "no second 2g fits beside a 3g below"),
    (("4g.40gb", "3g.40gb"), (("3g.40gb", 0),), 0, "4g only starts where it is"),
    (("4g.40gb", "3g.40gb"), (("3g.40gb", 4), ("1g.10gb", 0)), 1, "the 1g is in the way of 4g"),
    (("1g.10gb",) * 7, (("1g.10gb", 2), ("1g.10gb", 6)), 2, "both stay"),
    ((mig.WHOLE,), (("1g.10gb", 2),), 0, "nothing stays on an uncut card"),
]


@pytest.mark.parametrize(("layout", "present", "stays", "why"), KEPT, ids=[case[3] for case in KEPT])
def test_as_much_stays_as_can(
    layout: tuple[str, ...], present: tuple[tuple[str, int], ...], stays: int, why: str
) -> None:
    assert kept(A100, layout, present) == stays
    assert Counter(p.profile.name for p in placed(A100, layout, present)) == Counter(layout)


def test_without_anything_there_it_is_where_place_puts_it() -> None:
    for layout in mig.maximal_layouts(A100):
        assert placed(A100, layout) == mig.place(A100, layout)


def test_slices_are_given_widest_first() -> None:
    widths = [p.profile.width for p in placed(A100, ("3g.40gb", "2g.20gb", "2g.20gb"), (("2g.20gb", 4),))]
    assert widths == sorted(widths, reverse=True)


def test_nothing_is_destroyed_where_what_is_there_is_enough() -> None:
    current = there(("3g.40gb", 0), ("2g.20gb", 4))
    plan = pack(question({"a": 2.5, "b": 1.5}, current))
    assert plan.destroyed == 0
    assert plan.cards[0].current == 0
    assert sum(s.kept for s in plan.cards[0].slices) == 2


def test_cost_comes_before_what_is_destroyed() -> None:
    current = [there(*(("1g.10gb", start) for start in range(7)))] * 2
    plan = pack(question({"a": 7.5}, *current))
    assert len(plan.cards) == 1
    assert plan.destroyed == 14, "seven make way for an uncut card, and a card with seven is given back"


def test_the_card_with_most_to_keep_is_kept() -> None:
    plan = pack(question({"a": 3.0, "b": 4.0}, there(("1g.10gb", 0)), there(("4g.40gb", 0), ("3g.40gb", 4))))
    assert [card.current for card in plan.cards] == [1]
    assert plan.destroyed == 1


def test_replicas_stay_where_they_are() -> None:
    first = pack(question({"a": 3.0, "b": 4.0, "c": 5.0}))
    again = pack(question({"a": 3.0, "b": 4.0, "c": 5.0}, *as_current(first)))
    assert again.destroyed == 0
    on = [
        Counter((s.placement.start, s.option and s.option.model) for c in p.cards for s in c.slices)
        for p in (first, again)
    ]
    moved = (on[0] - on[1]).total()
    assert moved == 0


@settings(deadline=None, max_examples=12)
@given(
    st.dictionaries(st.sampled_from("abcd"), st.floats(0.1, 12), min_size=1),
    st.dictionaries(st.sampled_from("abcd"), st.floats(0.1, 12), min_size=1),
)
def test_what_is_said_to_stay_stays(before: dict[str, float], after: dict[str, float]) -> None:
    current = as_current(pack(question(before)))
    plan, anew = pack(question(after, *current)), pack(question(after))
    assert plan.cost_per_hour == anew.cost_per_hour
    was = [{(i.profile, i.start) for i in card.instances} for card in current]
    stays = 0
    for card in plan.cards:
        mine = was[card.current] if card.current is not None else set()
        for s in card.slices:
            assert s.kept == ((s.placement.profile.name, s.placement.start) in mine)
            stays += s.kept
    assert plan.destroyed == sum(map(len, was)) - stays
    used = [card.current for card in plan.cards if card.current is not None]
    assert len(used) == len(set(used))


def test_a_profile_the_card_does_not_have_is_an_error() -> None:
    with pytest.raises(InputError, match="unknown MIG profile of a100-80gb"):
        pack(question({"a": 1.0}, there(("5g.50gb", 0))))


def test_replicas_of_a_model_are_spread_over_cards() -> None:
    plan = pack(question({"a": 12.0, "b": 1.0}, survive=None))
    on = [sum(s.option is not None and s.option.model == "a" for s in card.slices) for card in plan.cards]
    assert len(plan.cards) == 2
    assert max(on) - min(on) <= 2


def test_all_replicas_of_a_model_are_utilised_alike() -> None:
    plan = pack(question({"a": 11.0, "b": 3.0}))
    for model in "ab":
        shares = {
            round(s.load_per_s / s.option.capacity_per_s, 9)
            for card in plan.cards
            for s in card.slices
            if s.option and s.option.model == model
        }
        assert len(shares) == 1
