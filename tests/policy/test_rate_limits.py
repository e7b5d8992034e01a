"""Nobody goes faster than the rule allows, and whoever is told to wait may go after exactly that."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuplan.policy.rate_limits import KeyedLimiters, RateLimiter, TokenBucket
from gpuplan.scenario.demand import RateLimit

RULE = RateLimit(requests_per_s=2.0, tokens_per_s=100.0, burst=2.0)
EPS_S = 1e-6


def wait_s_of(limiter: RateLimiter, tokens: int, *, now_s: float) -> float:
    """Both buckets are asked for a request of so many tokens."""
    return max(limiter.requests.wait_s(1, now_s=now_s), limiter.tokens.wait_s(tokens, now_s=now_s))


def take(limiter: RateLimiter, tokens: int, *, now_s: float) -> None:
    limiter.requests.take(1, now_s=now_s)
    limiter.tokens.take(tokens, now_s=now_s)


def follow(limiter: RateLimiter, table: list[tuple[float, str, int, float]]) -> None:
    """Rows of (now_s, what is done, tokens, how long it has to wait before); who has to wait does not go."""
    for row, (now_s, what, tokens, expected_s) in enumerate(table):
        if what == "back":
            limiter.give_back(tokens)
            continue
        waits_s = {
            "ask": wait_s_of(limiter, tokens, now_s=now_s),
            "head": limiter.requests.wait_s(1, now_s=now_s),
            "prompt": limiter.tokens.wait_s(tokens, now_s=now_s),
        }
        assert waits_s[what] == pytest.approx(expected_s), f"row {row} at {now_s} s"
        if waits_s[what] == 0:
            if what != "prompt":
                limiter.requests.take(1, now_s=now_s)
            if what != "head":
                limiter.tokens.take(tokens, now_s=now_s)


def test_a_limiter_over_time() -> None:
    table: list[tuple[float, str, int, float]] = [
        (10.0, "ask", 50, 0.0),  # full: 4 requests, 200 tokens
        (10.0, "ask", 150, 0.0),  # all of its tokens
        (10.0, "ask", 1, 0.01),  # at 100 a second the next is there in 10 ms
        (10.5, "ask", 51, 0.01),  # 50 are there
        (10.5, "ask", 50, 0.0),
        (10.5, "back", 30, 0.0),  # it ended early
        (10.5, "ask", 31, 0.01),
        (10.5, "ask", 30, 0.0),
        (10.5, "ask", 0, 0.0),
        (10.5, "ask", 0, 0.5),  # requests: four, and one in half a second, have gone
        (10.5, "ask", 0, 0.5),  # being refused costs nothing
        (11.0, "ask", 0, 0.0),
        (99.0, "ask", 300, 0.0),  # more than it ever holds: it may when it is full
        (99.0, "ask", 0, 1.0),  # and nothing more may until the debt is paid
        (100.0, "ask", 0, 0.0),
        (100.0, "ask", 500, 2.0),
        (100.0, "back", 10_000, 0.0),  # what is given back fills it, and no more than that
        (100.0, "ask", 200, 0.0),
        (100.0, "ask", 1, 0.01),
    ]
    follow(RateLimiter(RULE), table)


def test_a_server_that_knows_the_head_first() -> None:
    table: list[tuple[float, str, int, float]] = [
        (0.0, "head", 0, 0.0),
        (0.0, "prompt", 200, 0.0),
        (0.0, "head", 0, 0.0),
        (0.0, "prompt", 100, 1.0),  # refused: its request stays used up
        (0.0, "head", 0, 0.0),
        (0.0, "head", 0, 0.0),
        (0.0, "head", 0, 0.5),
        (1.0, "prompt", 100, 0.0),
    ]
    follow(RateLimiter(RULE), table)


@pytest.mark.parametrize(
    ("rule", "tokens", "waits_s"),
    [
        (RateLimit(), 10**9, [0.0, 0.0, 0.0]),  # no limit at all
        (RateLimit(requests_per_s=0.5, burst=1.0), 10**9, [0.0, 2.0, 2.0]),  # half a request in a burst: yet one may go
        (RateLimit(tokens_per_s=10.0, burst=1.0), 10, [0.0, 1.0, 1.0]),  # any number of requests
        (RateLimit(requests_per_s=2.0, tokens_per_s=1e9, burst=1.0), 1, [0.0, 0.0, 0.5]),  # both: the longer wait
    ],
)
def test_what_is_not_limited_does_not_wait(rule: RateLimit, tokens: int, waits_s: list[float]) -> None:
    limiter = RateLimiter(rule)
    for expected_s in waits_s:
        wait_s = wait_s_of(limiter, tokens, now_s=5.0)
        assert wait_s == pytest.approx(expected_s)
        if not wait_s:
            take(limiter, tokens, now_s=5.0)


STEPS = st.lists(
    st.tuples(
        st.one_of(st.just(0.0), st.floats(0.0, 3.0), st.floats(0.0, 1e5)), st.integers(0, 500), st.floats(0.0, 1.0)
    ),
    max_size=60,
)


@given(STEPS, st.floats(0.5, 1000.0), st.floats(0.1, 5.0))
def test_no_interval_carries_more_than_the_rate_and_one_burst(
    steps: list[tuple[float, int, float]], per_s: float, burst_s: float
) -> None:
    bucket, now_s = TokenBucket(per_s, burst_s), 0.0
    moves: list[tuple[float, float]] = []
    for gap_s, amount, unused in steps:
        now_s += gap_s
        if bucket.wait_s(amount, now_s=now_s) == 0:
            bucket.take(amount, now_s=now_s)
            moves.append((now_s, amount))
            if unused > 0.5:
                bucket.give_back(amount * unused)
                moves.append((now_s, -amount * unused))
    capacity = per_s * burst_s
    overdraft = max(500 - capacity, 0.0)
    for i, (from_s, _) in enumerate(moves):
        passed = 0.0
        for until_s, amount in moves[i:]:
            passed += amount
            assert passed <= per_s * (until_s - from_s + EPS_S) + capacity + overdraft


@given(STEPS, st.integers(0, 500))
def test_a_wait_is_as_long_as_it_says(steps: list[tuple[float, int, float]], amount: int) -> None:
    bucket, now_s = TokenBucket(40.0, 2.0), 0.0
    for gap_s, taken, _ in steps:
        now_s += gap_s
        bucket.take(taken, now_s=now_s)
    wait_s = bucket.wait_s(amount, now_s=now_s)
    assert bucket.wait_s(amount, now_s=now_s + wait_s + EPS_S) == 0.0
    if wait_s > EPS_S:
        assert bucket.wait_s(amount, now_s=now_s + wait_s - EPS_S) > 0.0


def test_keys_do_not_share_and_the_fullest_is_forgotten() -> None:
    keys = KeyedLimiters(RateLimit(tokens_per_s=10.0, burst=10.0), keys_max=3)
    for key, tokens in (("a", 100), ("b", 20), ("c", 50)):
        assert wait_s_of(keys.of(key), 100, now_s=0.0) == 0.0
        take(keys.of(key), tokens, now_s=0.0)
    take(keys.of("d"), 90, now_s=0.0)  # b goes: it is full in 2 s, the others later
    assert wait_s_of(keys.of("a"), 1, now_s=0.0) > 0
    assert wait_s_of(keys.of("c"), 51, now_s=0.0) > 0
    take(keys.of("c"), 50, now_s=0.0)  # now c is the last but one to be full
    keys.of("e")  # so d goes
    assert len(keys) == 3
    assert wait_s_of(keys.of("c"), 1, now_s=0.0) > 0
    assert wait_s_of(keys.of("a"), 1, now_s=0.0) > 0
    assert wait_s_of(keys.of("d"), 100, now_s=0.0) == 0.0  # begun anew; e, which was never taken from, has gone for it
    assert len(keys) == 3


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 30), st.integers(0, 40), st.sampled_from([0.0, 0.3, 5.0])),
        max_size=200,
    )
)
def test_forgetting_loses_nothing_while_someone_is_full(moves: list[tuple[int, int, int, float]]) -> None:
    """Beside limiters that forget nobody: they differ only where all that could be forgotten were short of something."""
    rule = RateLimit(requests_per_s=2.0, tokens_per_s=20.0, burst=2.0)
    keys, all_of_them = KeyedLimiters(rule, keys_max=4), KeyedLimiters(rule)
    known: dict[str, None] = {}
    now_s = 0.0
    for number, tokens, back, gap_s in moves:
        now_s, key = now_s + gap_s, str(number)
        some_full = any(all_of_them.of(k).full_s <= now_s for k in known)
        if key not in known and len(known) >= 4 and not some_full:
            continue
        one, other = keys.of(key), all_of_them.of(key)
        known = {k: None for k in [*known, key] if k in keys._limiters}
        assert len(keys) == len(known) <= 4
        assert wait_s_of(one, tokens, now_s=now_s) == pytest.approx(wait_s_of(other, tokens, now_s=now_s))
        for limiter in (one, other):
            take(limiter, tokens, now_s=now_s)
            if back <= tokens:
                limiter.give_back(back)


def test_a_bucket_that_was_never_taken_from_is_full() -> None:
    bucket = TokenBucket(1.0, 1.0)
    bucket.give_back(5)
    assert bucket.full_s == -math.inf
    assert bucket.wait_s(1, now_s=-1e9) == 0.0
