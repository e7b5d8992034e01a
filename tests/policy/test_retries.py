"""Retries stay a tenth of the traffic, whatever happens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gpuplan.policy.retries import BALANCE_MAX, REQUESTS_PER_RETRY, RESERVE, RetryBudget


def spend(budget: RetryBudget) -> int:
    """All that may be tried again now."""
    made = 0
    while budget.withdraw():
        made += 1
    return made


def test_a_budget_over_time() -> None:
    budget = RetryBudget()
    table = [
        (0, RESERVE),  # an idle server: what is in reserve
        (0, 0),  # it does not come back by itself
        (9, 0),  # nine tenths
        (1, 1),  # ten tenths are exactly one
        (500, 50),
        (100_000, BALANCE_MAX),  # a quiet day does not pay for a storm
    ]
    for row, (requests, retries) in enumerate(table):
        for _ in range(requests):
            budget.deposit()
        assert spend(budget) == retries, f"row {row}"


@given(st.lists(st.one_of(st.just("retry"), st.integers(1, 300)), max_size=100))
def test_no_history_has_more_retries_than_a_tenth_and_the_reserve(history: list[str | int]) -> None:
    """And none has fewer than it may, unless more was paid in than is saved."""
    budget, requests, retries = RetryBudget(), 0, 0
    for what in history:
        if isinstance(what, int):
            requests += what
            for _ in range(what):
                budget.deposit()
            continue
        left = RESERVE * REQUESTS_PER_RETRY + requests - retries * REQUESTS_PER_RETRY
        may = budget.withdraw()
        retries += may
        assert retries <= RESERVE + 0.1 * requests
        if requests <= (BALANCE_MAX - RESERVE) * REQUESTS_PER_RETRY:
            assert may == (left >= REQUESTS_PER_RETRY)
