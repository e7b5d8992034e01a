"""How many of the requests that failed may be tried again: a tenth of the traffic, so that retries cannot become the
load that keeps a server down.

Each request pays in a tenth of a retry, each retry takes out a whole one (Finagle's RetryBudget, which allows a fifth;
gRPC's retry throttling; a tenth as in Beyer et al., Site Reliability Engineering, 2016, chapter 21). Two bounds need no
clock:

- There are RESERVE retries to begin with, so that a lone failure on an idle server is tried again. Time does not refill
  them, ten requests for each do: where fewer than ten come between two failures, retries are not what is missing.
- No more than BALANCE_MAX are saved, so that a day without failures does not pay for a storm. Finagle lets deposits
  expire after 10 s instead; at 100 requests a second that comes to the same.
"""

from __future__ import annotations

REQUESTS_PER_RETRY = 10
RESERVE = 10
BALANCE_MAX = 100
"""Enough for the batches of two or three replicas that are lost at once."""


class RetryBudget:
    """Retries that may be made now. It counts in requests paid in, so that ten tenths are exactly one."""

    __slots__ = ("_paid_in",)

    def __init__(self) -> None:
        self._paid_in = RESERVE * REQUESTS_PER_RETRY

    def deposit(self) -> None:
        """A request has come: a new one, not a retry."""
        self._paid_in = min(self._paid_in + 1, BALANCE_MAX * REQUESTS_PER_RETRY)

    def withdraw(self) -> bool:
        """Whether one retry more may be made; if so, it counts as made."""
        if self._paid_in < REQUESTS_PER_RETRY:
            return False
        self._paid_in -= REQUESTS_PER_RETRY
        return True
