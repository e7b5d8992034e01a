"""Packing: agrees with trying everything, and what holds of every plan."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuplan.hardware import mig
from gpuplan.hardware.catalog import gpu
from gpuplan.plan.cards import survives_card
from gpuplan.plan.equal_cards import cards_needed_min
from gpuplan.plan.packing import pack
from gpuplan.plan.packing_terms import CardKind, Option, Packing, Question, layouts_of
from gpuplan.plan.programme import Limits

A30, RTX, A100 = gpu("a30"), gpu("rtx-pro-6000-blackwell"), gpu("a100-80gb")
SEVEN = {"1g.10gb": 1.0, "2g.20gb": 2.0, "3g.40gb": 3.0, "4g.40gb": 4.0, "7g.80gb": 7.0, "whole": 7.5}


def options(*models: str, sizes: dict[str, float] = SEVEN, on: str = "a100-80gb") -> list[Option]:
    return [Option(model, on, profile, size) for model in models for profile, size in sizes.items()]


def question(demands: dict[str, float], count_max: int | None = None, **changes: object) -> Question:
    asked = Question(demands, [CardKind(A100, 2.0, count_max)], options(*demands))
    return replace(asked, **changes)  # type: ignore[arg-type]


def check(asked: Question, plan: Packing) -> None:
    """What holds of every plan: slices where the card can have them, each used once, and demand met."""
    best = asked.best()
    for card in plan.cards:
        names = [s.placement.profile.name for s in card.slices]
        if names != [mig.WHOLE]:
            mig.place(card.kind.gpu, names)
            cells = [
                cell
                for s in card.slices
                for cell in range(s.placement.start, s.placement.start + s.placement.profile.width)
            ]
            assert len(cells) == len(set(cells))
            assert all(s.placement.start in s.placement.profile.starts for s in card.slices)
        for s in card.slices:
            if s.option is not None:
                assert best[(card.kind.gpu.name, s.placement.profile.name, s.option.model)] == s.option
    capacities, loads, largest = plan.capacities(), Counter[str](), Counter[str]()
    for s in (s for card in plan.cards for s in card.slices if s.option):
        assert s.option is not None
        loads[s.option.model] += s.load_per_s  # type: ignore[assignment]
        largest[s.option.model] = max(largest[s.option.model], s.option.capacity_per_s)  # type: ignore[assignment]
    for model, demand in asked.demands.items():
        assert capacities[model] >= demand * (1 - 1e-6)
        assert loads[model] == pytest.approx(demand)
        if asked.survive == "replica":
            assert capacities[model] - largest[model] >= demand * (1 - 1e-6)
    if asked.survive == "card":
        assert survives_card(asked, plan.cards)
    used = Counter(card.kind.gpu.name for card in plan.cards)
    assert all(kind.count_max is None or used[kind.gpu.name] <= kind.count_max for kind in asked.kinds)
    assert plan.cost_per_hour == pytest.approx(sum(card.kind.price_per_hour for card in plan.cards))
    assert plan.lp_bound_per_hour <= plan.bound_per_hour + 1e-6 <= plan.cost_per_hour + 2e-6


# --- against trying everything ---------------------------------------------------------------------------------------

Outcome = tuple[tuple[float, ...], ...]
"""What a card's replicas serve, one by one, for each model."""


def outcomes(asked: Question, kind: CardKind) -> set[Outcome]:
    """Everything that can stand on one card."""
    best, models = asked.best(), list(asked.demands)
    found: set[Outcome] = set()
    for layout in layouts_of(kind.gpu):
        for chosen in itertools.product([None, *models], repeat=len(layout)):
            rows: dict[str, list[float]] = {model: [] for model in models}
            for profile, model in zip(layout, chosen, strict=True):
                option = best.get((kind.gpu.name, profile, model)) if model else None
                if model and option:
                    rows[model].append(option.capacity_per_s)
            found.add(tuple(tuple(sorted(rows[model])) for model in models))
    return found


def cheapest(asked: Question, cards_max: int) -> float:
    """The least cost of up to so many cards, by trying everything; infinity where there is none."""
    everything = [(kind, sorted(outcomes(asked, kind))) for kind in asked.kinds]
    least = math.inf
    for count in range(1, cards_max + 1):
        for kinds in itertools.combinations_with_replacement(everything, count):
            used = Counter(kind.gpu.name for kind, _ in kinds)
            cost = sum(kind.price_per_hour for kind, _ in kinds)
            allowed = all(k.count_max is None or used[k.gpu.name] <= k.count_max for k in asked.kinds)
            if allowed and cost < least and any(holds(asked, on) for on in itertools.product(*(o for _, o in kinds))):
                least = cost
    return least


def holds(asked: Question, on: tuple[Outcome, ...]) -> bool:
    """Whether demand is met, whatever of what has to be survived is lost."""
    models = range(len(asked.demands))
    left = [[[size for card in on for size in card[m]] for m in models]]
    if asked.survive == "card":
        others = [[*on[:lost], *on[lost + 1 :]] for lost in range(len(on))]
        left = [[[size for card in rest for size in card[m]] for m in models] for rest in others]
    elif asked.survive == "replica":
        left = [[sorted(replicas)[:-1] for replicas in left[0]]]
    demands = asked.demands.values()
    return all(
        replicas and sum(replicas) >= demand for case in left for replicas, demand in zip(case, demands, strict=True)
    )


@st.composite
def small(draw: st.DrawFn) -> Question:
    """Up to two cards, of one kind or one of each, and three models."""
    kinds = [CardKind(A30, draw(st.sampled_from([1.0, 1.5, 0.7]))), CardKind(RTX, draw(st.sampled_from([1.0, 2.5])))]
    one_kind = draw(st.booleans())
    kinds = [replace(kinds[0], count_max=2)] if one_kind else [replace(kind, count_max=1) for kind in kinds]
    models = ["a", "b", "c"][: draw(st.integers(1, 3))]
    rows = [
        Option(model, kind.gpu.name, profile, draw(st.integers(0, 9)))
        for kind in kinds
        for model in models
        for profile in ("whole", *(p.name for p in mig.plain_profiles(kind.gpu)))
    ]
    survive = draw(st.sampled_from([None, None, "replica", "card"]))
    return Question({model: draw(st.integers(0, 14)) for model in models}, kinds, rows, survive=survive)


@settings(deadline=None, max_examples=60)
@given(small())
def test_costs_what_trying_everything_finds(asked: Question) -> None:
    least = cheapest(asked, 2)
    plan = pack(asked)
    if least == math.inf:
        assert plan.status == "not possible" and plan.why
    else:
        assert plan.proven_optimal
        assert plan.cost_per_hour == pytest.approx(least)
        check(asked, plan)


@settings(deadline=None, max_examples=15)
@given(
    st.dictionaries(st.sampled_from("abcdef"), st.floats(0.1, 30), min_size=1),
    st.sampled_from(["headroom", "free"]),
)
def test_plans_of_any_size_hold(demands: dict[str, float], prefer: str) -> None:
    asked = question(demands, prefer=prefer)
    plan = pack(asked)
    check(asked, plan)
    assert plan.proven_optimal
    assert plan.growth >= 1 - 1e-6


# --- single cases ----------------------------------------------------------------------------------------------------

CASES = [
    ({"a": 1.0}, 1, "one slice is enough"),
    ({"a": 7.5}, 1, "just the whole card"),
    ({"a": 7.6}, 2, "a little more than the whole card"),
    ({"a": 15.1}, 3, "a little more than two"),
    ({"a": 4.0, "b": 3.0}, 1, "4g + 3g"),
    ({"a": 4.1, "b": 3.0}, 2, "4g is too small"),
    ({f"m{i}": 0.5 for i in range(7)}, 1, "seven small models on seven slices"),
    ({f"m{i}": 0.5 for i in range(8)}, 2, "the eighth needs another card"),
    ({"a": 0.0}, 1, "a model without demand still has a replica"),
    ({"a": 300.0}, 40, "as many as it takes"),
]


@pytest.mark.parametrize(("demands", "cards", "why"), CASES, ids=[case[2] for case in CASES])
def test_the_fewest_cards(demands: dict[str, float], cards: int, why: str) -> None:
    plan = pack(question(demands))
    assert len(plan.cards) == cards
    assert plan.cost_per_hour == plan.bound_per_hour == 2.0 * cards
    assert cards_needed_min(A100, demands, {(o.model, o.profile): o.capacity_per_s for o in options(*demands)}) == cards
    assert plan.sentence == f"cost {2 * cards:.2f} $/h, no plan can cost less (proven optimal)"


def test_a_model_that_fits_nowhere_has_no_fewest_cards() -> None:
    assert cards_needed_min(A100, {"a": 1.0, "giant": 1.0}, {("a", "1g.10gb"): 1.0}) is None


def test_the_cheaper_kind_is_taken_where_it_is_enough() -> None:
    kinds = [CardKind(A100, 3.0), CardKind(A30, 1.0)]
    small_card = options("a", "b", sizes={"1g.6gb": 0.5, "4g.24gb": 2.0}, on="a30")
    asked = Question({"a": 2.0, "b": 0.5}, kinds, [*options("a", "b"), *small_card])
    assert Counter(card.kind.gpu.name for card in pack(asked).cards) == {"a30": 2}
    dear = replace(asked, demands={"a": 6.0, "b": 1.0})
    assert Counter(card.kind.gpu.name for card in pack(dear).cards) == {"a100-80gb": 1}, "3 $/h where four A30s cost 4"
    plan = pack(replace(asked, demands={"a": 9.0, "b": 1.0}))
    assert Counter(card.kind.gpu.name for card in plan.cards) == {"a100-80gb": 1, "a30": 2}


def test_of_equal_options_the_one_with_fewest_processes_and_the_smallest_batch() -> None:
    rows = [Option("a", "a100-80gb", "1g.10gb", 1.0, processes, batch) for processes in (3, 1) for batch in (8, 4)]
    (option,) = Question({"a": 1.0}, [CardKind(A100, 1.0)], rows).best().values()
    assert (option.processes, option.batch_size) == (1, 4)


def test_processes_may_share_a_whole_card_that_has_no_mig() -> None:
    l4 = gpu("l4")
    asked = Question({"a": 9.0}, [CardKind(l4, 0.7)], [Option("a", "l4", "whole", 2.0 * n, n) for n in (1, 2, 3)])
    plan = pack(asked)
    check(asked, plan)
    assert [s.option.processes for card in plan.cards for s in card.slices if s.option] == [3, 3]


def test_headroom_uses_what_is_paid_for_and_free_leaves_it() -> None:
    headroom, free = (pack(question({"a": 1.0}, prefer=prefer)) for prefer in ("headroom", "free"))
    assert headroom.growth == pytest.approx(7.5)
    assert free.growth == 1.0
    assert [s.option is not None for card in free.cards for s in card.slices].count(True) == 1


def test_room_left_free_is_gathered() -> None:
    plan = pack(question({"a": 4.0, "b": 3.0, "c": 1.0}, prefer="free"))
    idle = sorted(sum(s.option is None for s in card.slices) for card in plan.cards)
    assert len(plan.cards) == 2
    assert idle[0] == 0, "one card is full"


SURVIVE = [
    ({"a": 3.0}, None, 1, "nothing is lost"),
    ({"a": 3.0}, "replica", 1, "3g + 4g"),
    ({"a": 3.0}, "card", 2, "each card must do alone"),
    ({"a": 6.0}, "replica", 1, "seven 1g, of which six do"),
    ({"a": 6.5}, "replica", 2, "six of seven do not"),
    ({"a": 9.0}, "card", 3, "4.5 of each of three, or more"),
]


@pytest.mark.parametrize(("demands", "survive", "cards", "why"), SURVIVE, ids=[case[3] for case in SURVIVE])
def test_losses_survived(demands: dict[str, float], survive: str | None, cards: int, why: str) -> None:
    asked = question(demands, survive=survive)
    plan = pack(asked)
    assert len(plan.cards) == cards
    assert plan.proven_optimal
    check(asked, plan)


def test_fixed_cards_are_all_there_and_cut_for_the_most_headroom() -> None:
    asked = question({"a": 4.0, "b": 3.0}, 3, fixed=True)
    plan = pack(asked)
    check(asked, plan)
    assert len(plan.cards) == 3
    assert plan.cost_per_hour == plan.bound_per_hour == 6.0
    assert plan.growth == pytest.approx(12.5 / 4, rel=0.02), "22.5 in all, of 7"


IMPOSSIBLE = [
    (question({"a": 9.0}, 1), "1 x a100-80gb can serve 83% of the demand at most; 2 x a100-80gb would do for 4.00 $/h"),
    (question({f"m{i}": 0.5 for i in range(8)}, 1), "at most 7 slices, too few or too small for 8 models at once"),
    (question({"a": 1.0, "giant": 1.0}, options=options("a")), "no slice of a100-80gb serves giant"),
    (question({"a": 1.0}, 1, survive="card"), "to survive the loss of a card takes two, and there is at most one"),
    (question({"a": 7.0}, 1, survive="replica"), "1 x a100-80gb can serve the demand, and not any more after the loss"),
    (question({"a": 9.0}, 2, survive="card"), "2 x a100-80gb can serve the demand, and not any more after the loss"),
    (question({"a": 20.0}, 2, fixed=True), "2 x a100-80gb can serve 75% of the demand at most; 3 x a100-80gb would do"),
    (question({"a": 20.0}, 2, fixed=True, survive="card"), "can serve 75% of the demand at most"),
    (question({"a": 1.0}, kinds=[]), "no slice of no card serves a"),
]


@pytest.mark.parametrize(("asked", "why"), IMPOSSIBLE)
def test_what_stands_in_the_way_is_said(asked: Question, why: str) -> None:
    plan = pack(asked)
    assert plan.status == "not possible"
    assert why in plan.why
    assert plan.sentence.startswith("not possible: ")


def test_a_limit_before_the_proof_is_named() -> None:
    demands = {f"m{i}": 3.3 + i * 0.37 for i in range(12)}
    sizes = {"1g.10gb": 1.0, "2g.20gb": 2.17, "3g.40gb": 3.31, "4g.40gb": 4.43, "7g.80gb": 7.1}
    kinds = [CardKind(A100, 1.0), CardKind(A30, 0.53)]
    rows = [*options(*demands, sizes=sizes), *options(*demands, sizes={"1g.6gb": 0.93, "2g.12gb": 1.9}, on="a30")]
    plan = pack(Question(demands, kinds, rows, prefer="free"), Limits(gap=0.2))
    assert plan.bound_per_hour <= plan.cost_per_hour
    assert plan.gap <= 0.2
    if not plan.proven_optimal:
        assert plan.sentence.endswith(f"(gap {plan.gap:.0%})")


def test_no_time_is_not_no_plan() -> None:
    assert replace(Packing("unknown", why="no plan was found in 0 s")).sentence == "unknown: no plan was found in 0 s"


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        CardKind(A100, 0.0)
    with pytest.raises(ValueError, match="requests per second"):
        question({"a": -1.0})
    with pytest.raises(ValueError, match="have a number"):
        question({"a": 1.0}, fixed=True)
    with pytest.raises(ValueError, match="every kind of card once"):
        question({"a": 1.0}, kinds=[CardKind(A100, 1.0), CardKind(A100, 2.0)])
