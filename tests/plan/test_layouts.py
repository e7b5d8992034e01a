"""Assignments, and the bound that no plan can beat."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuplan.hardware import mig
from gpuplan.hardware.catalog import gpu
from gpuplan.plan import equal_cards, layouts

A100 = gpu("a100-80gb")
SIZES = {"1g.10gb": 1.0, "2g.20gb": 2.0, "3g.40gb": 3.0, "4g.40gb": 4.0, "7g.80gb": 7.0, "1g.20gb": 1.0, "whole": 7.5}


def capacities(*models: str) -> dict[tuple[str, str], float]:
    return {(model, name): size for model in models for name, size in SIZES.items()}


def test_every_maximal_layout_and_the_uncut_card_are_candidates() -> None:
    found = layouts.candidates(A100, 1, {"a": 1.0}, capacities("a"), best=1)
    assert set(found) == {("whole",), *mig.maximal_layouts(A100)}
    assert len(found) == 29
    assert all(len(choices) == 1 for choices in found.values())


def test_an_assignment_uses_each_slice_once_and_serves_every_model() -> None:
    found = layouts.candidates(A100, 2, {"a": 3.0, "b": 1.0}, capacities("a", "b"), best=100)
    for layout, choices in found.items():
        for choice in choices:
            used = Counter[str]()
            for replica in choice.replicas:
                used[replica.slice] += replica.count
            assert all(used[name] <= 2 * n for name, n in Counter(layout).items())
            assert {r.model for r in choice.replicas} == {"a", "b"}


def test_the_first_choice_has_the_least_loaded_busiest_model() -> None:
    (first, *rest) = layouts.candidates(A100, 1, {"a": 3.0, "b": 1.0}, capacities("a", "b"), best=9)[
        ("4g.40gb", "3g.40gb")
    ]
    assert {(r.model, r.slice) for r in first.replicas} == {("a", "4g.40gb"), ("b", "3g.40gb")}
    assert first.load == pytest.approx(3 / 4)
    assert all(first.load <= other.load for other in rest)


def test_a_model_that_fits_no_slice_leaves_a_layout_without_choice() -> None:
    only_large = {("a", "7g.80gb"): 7.0, ("a", "whole"): 7.5}
    found = layouts.candidates(A100, 1, {"a": 1.0}, only_large, best=3)
    assert [layout for layout, choices in found.items() if choices] == [("whole",), ("7g.80gb",)]


def test_where_assignments_are_too_many_one_that_serves_all_and_uses_all_slices_is_programmed() -> None:
    models = {f"m{i}": 1.0 + i for i in range(7)}
    found = layouts.candidates(A100, 6, models, capacities(*models), best=1)
    (choice,) = found[("1g.10gb",) * 7]
    assert {r.model for r in choice.replicas} == set(models)
    assert sum(r.count for r in choice.replicas) == 42


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(st.sampled_from("abc"), st.floats(0.1, 9.0), min_size=1))
def test_no_enumerated_assignment_beats_the_bound(demand: dict[str, float]) -> None:
    bound = equal_cards.cards_needed_min(A100, demand, capacities(*demand))
    assert bound is not None
    if bound > 1:
        found = layouts.candidates(A100, bound - 1, demand, capacities(*demand), best=1)
        assert all(choice.load > 1 - 1e-6 for choice in itertools.chain(*found.values()))


def test_the_programmed_assignment_is_near_the_best_of_all() -> None:
    demand = {"a": 3.0, "b": 2.0, "c": 1.5}
    layout = ("3g.40gb", "2g.20gb", "1g.10gb", "1g.10gb")
    (best,) = layouts.candidates(A100, 2, demand, capacities(*demand), best=1)[layout]
    chosen = equal_cards.most_headroom(A100, layout, 2, demand, capacities(*demand))
    assert chosen is not None
    served = {model: sum(n * SIZES[kind] for (m, kind), n in chosen.items() if m == model) for model in demand}
    load = max(rate / served[model] for model, rate in demand.items())
    assert load <= best.load * 1.03
    assert sum(chosen.values()) == 8, "every slice is used"


def test_a_model_without_a_slice_leaves_nothing_to_assign() -> None:
    only_large = {("a", "7g.80gb"): 7.0}
    assert equal_cards.most_headroom(A100, ("4g.40gb", "3g.40gb"), 2, {"a": 1.0}, only_large) is None
    many = {f"m{i}": 1.0 for i in range(3)}
    assert equal_cards.most_headroom(A100, ("4g.40gb", "3g.40gb"), 1, many, capacities(*many)) is None, "two slices"
