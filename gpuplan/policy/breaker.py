"""When a replica, or a model as a whole, is left alone for a while because it fails (Nygard, Release It!, 2007).

Closed, everything goes there; open, nothing; half-open, one request that finds out, the probe. Rules:

- It opens after so many failures in a row; or when of the last `window` outcomes too large a share has failed, once
  half of the window is there, as two failures out of three say little; or when its steps take too long. A success
  never opens it.
- It is open for `open` seconds, and after each failed probe for twice as long, up to `open_max`. A slow probe has
  failed.
- When it closes, all of that is forgotten: the outcomes, and how long it was open.
- What comes in while it is open, or half-open before the probe is sent, is about what ran before, and changes nothing.

Precedents for the defaults: 5 in a row (Envoy's consecutive_5xx); half of them (Hystrix, resilience4j); of 50 (Hystrix
asks for 20 before it judges, which a bad streak can fill where a third fails; resilience4j has 100, too slow for
replicas with a few requests a second); open for 5 s, then one probe (Hystrix; Envoy has 30 s, and longer each time,
resilience4j 60 s).
"""

from __future__ import annotations

from collections import deque

from gpuplan.policy.vocabulary import BreakerState, Trip
from gpuplan.scenario.demand import BreakerSpec


class Breaker:
    """One breaker. Whatever changes its state returns the Trip that says so."""

    __slots__ = (
        "_due_s",
        "_failed_in_row",
        "_open_s",
        "_outcomes",
        "_probing",
        "_spec",
        "name",
        "slow_factor",
        "state",
    )

    def __init__(self, name: str, spec: BreakerSpec) -> None:
        self.name = name
        self.state: BreakerState = "closed"
        self._spec = spec
        self.slow_factor = spec.slow_factor
        """From how many times as long as they should on, steps are slow."""
        self._outcomes: deque[bool] = deque(maxlen=spec.window)
        self._failed_in_row = 0
        self._open_s = spec.open
        self._due_s = 0.0
        self._probing = False

    def allows(self) -> bool:
        """One more request may go there."""
        return self.state == "closed" or (self.state == "half_open" and not self._probing)

    def probe_sent(self) -> None:
        """A request has gone there: while half-open, the probe. No other goes until it is known what came of it."""
        self._probing = self.state == "half_open"

    def probe_lost(self) -> None:
        """The probe was cancelled, and says nothing: another may be sent."""
        self._probing = False

    def record(self, ok: bool, *, now_s: float) -> Trip | None:
        """What came of a request or a step. With the probe out, it is taken for the probe's."""
        if self._probing:
            return self._close() if ok else self._reopen("the probe failed", now_s)
        if self.state != "closed":
            return None
        self._outcomes.append(ok)
        if ok:
            self._failed_in_row = 0
            return None
        self._failed_in_row += 1
        if self._failed_in_row >= self._spec.consecutive_failures:
            failures = "1 failure" if self._failed_in_row == 1 else f"{self._failed_in_row} failures"
            return self._open(f"{failures} in a row", now_s)
        failed, known = self._outcomes.count(False), len(self._outcomes)
        if 2 * known >= self._spec.window and failed / known >= self._spec.failure_rate:
            return self._open(f"{failed} of the last {known} failed", now_s)
        return None

    def slow(self, ratio: float, *, now_s: float) -> Trip | None:
        """Its steps take `ratio` times as long as they should (smoothed by the caller, who has a sound neighbour to
        compare with and to send requests to). For a step that succeeds, to be called before `record`."""
        if ratio < self.slow_factor:
            return None
        reason = f"steps take {ratio:.1f} times as long as they should"
        if self._probing:
            return self._reopen(reason, now_s)
        return self._open(reason, now_s) if self.state == "closed" else None

    @property
    def probing(self) -> bool:
        """Half-open, and the probe is out."""
        return self._probing

    def due_s(self) -> float | None:
        """When it will be half-open, if it is open."""
        return self._due_s if self.state == "open" else None

    def wake(self, *, now_s: float) -> Trip | None:
        """Half-open, if it is open and that is due."""
        if self.state != "open" or now_s < self._due_s:
            return None
        return self._change("half_open", f"it was open for {self._open_s:g} s")

    def _open(self, reason: str, now_s: float) -> Trip:
        self._due_s = now_s + self._open_s
        return self._change("open", f"{reason}; open for {self._open_s:g} s")

    def _reopen(self, reason: str, now_s: float) -> Trip:
        self._open_s = min(2 * self._open_s, max(self._spec.open, self._spec.open_max))
        return self._open(reason, now_s)

    def _close(self) -> Trip:
        self._outcomes.clear()
        self._failed_in_row = 0
        self._open_s = self._spec.open
        return self._change("closed", "the probe succeeded")

    def _change(self, state: BreakerState, reason: str) -> Trip:
        self.state, self._probing = state, False
        return Trip(self.name, state, reason)
