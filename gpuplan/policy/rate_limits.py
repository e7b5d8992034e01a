"""How fast a traffic class or an API key may ask: token buckets, for requests and for tokens.

A bucket fills at its rate up to its capacity, and whoever goes takes out what it costs. Rules: it starts full; one that
costs more than the capacity may go when the bucket is full, and leaves a debt, as it could never go otherwise; what was
taken and not used is given back, and whatever that adds beyond the capacity is lost. So in any time T no more than
rate * T + capacity goes, and one debt.

A bucket is one number, the time when it will be full: nothing has to be refilled, and time that stands still or jumps
is no special case (the generic cell rate algorithm in its virtual-scheduling form, ITU-T I.371).

Ask with `wait_s`, then `take`; the two are apart, so that a request which its class lets go and its key does not costs
nobody anything.
"""

from __future__ import annotations

import heapq
import math

from gpuplan.scenario.demand import RateLimit

KEYS_MAX = 10_000
"""Keys remembered at a time: some MB, and more than have requests in flight anywhere."""


class TokenBucket:
    """`per_s` a second (infinite: no limit), and at once as many as come in `burst_s` seconds; were that less than one
    request, one may go all the same, as with everything that costs more than the capacity."""

    __slots__ = ("_burst_s", "_per_s", "full_s")

    def __init__(self, per_s: float, burst_s: float) -> None:
        self._per_s = per_s
        self._burst_s = burst_s
        self.full_s = -math.inf
        """When it will be full, or has been: seconds on the caller's clock."""

    def wait_s(self, amount: float, *, now_s: float) -> float:
        """Seconds until so many may go, if nobody takes any before; 0 when they may now."""
        left_s = self._burst_s - min(amount / self._per_s, self._burst_s)
        return max(self.full_s - left_s - now_s, 0.0)

    def take(self, amount: float, *, now_s: float) -> None:
        """So many go, whether they may or not."""
        self.full_s = max(self.full_s, now_s) + amount / self._per_s

    def give_back(self, amount: float) -> None:
        """So many of those taken were not used."""
        self.full_s -= amount / self._per_s


class RateLimiter:
    """The two buckets of one rule: `requests` is asked for one when a request's head is there, `tokens` when its prompt
    has been counted (prompt and most output together). One that is refused then has used up its request all the same,
    as with OpenAI's limits."""

    __slots__ = ("requests", "tokens")

    def __init__(self, rule: RateLimit) -> None:
        self.requests = TokenBucket(rule.requests_per_s or math.inf, rule.burst)
        self.tokens = TokenBucket(rule.tokens_per_s or math.inf, rule.burst)

    def give_back(self, tokens: int) -> None:
        """So many tokens were taken and not used: the answer ended early, or there was none."""
        self.tokens.give_back(tokens)

    @property
    def full_s(self) -> float:
        """When both buckets will be full, or have been."""
        return max(self.requests.full_s, self.tokens.full_s)


class KeyedLimiters:
    """One limiter for each key, for at most `keys_max` of them. For a new one too many, that goes which has been full
    the longest; a full one forgets nothing. Where none is full, the next that would be goes: it forgets the least. Ties
    go by name."""

    def __init__(self, rule: RateLimit, keys_max: int = KEYS_MAX) -> None:
        self._rule = rule
        self._keys_max = keys_max
        self._limiters: dict[str, RateLimiter] = {}
        self._by_full_s: list[tuple[float, str]] = []  # a heap with one entry for each key, as it was last seen

    def of(self, key: str) -> RateLimiter:
        """The key's limiter. Ask for it before each `take`; give back to the one that was taken from."""
        limiter = self._limiters.get(key)
        if limiter is None:
            if len(self._limiters) >= self._keys_max:
                self._forget_one()
            limiter = self._limiters[key] = RateLimiter(self._rule)
            heapq.heappush(self._by_full_s, (limiter.full_s, key))
        return limiter

    def __len__(self) -> int:
        return len(self._limiters)

    def _forget_one(self) -> None:
        while True:
            seen_s, key = self._by_full_s[0]
            full_s = self._limiters[key].full_s
            if full_s <= seen_s:
                break
            heapq.heapreplace(self._by_full_s, (full_s, key))  # it has been taken from since
        heapq.heappop(self._by_full_s)
        del self._limiters[key]
