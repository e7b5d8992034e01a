"""When a simulation may end early: an SLO can no longer be met, whatever becomes of the requests that are still open.

`EarlyStop` looks on while requests are simulated and raises `BeyondDoubt` at the first moment at which some SLO fails
even if every other request of its class is answered at once. It knows no rule of its own: it asks `summary.slo_met`
about that best case, so it never ends a run that would have held.

A request misses for good when it was not completed, when it was completed late, and when it is still waiting beyond the
limit. The last kind may yet be lost, and of a percentile between two values one lost counts a hair less than one late:
therefore such a verdict waits for one miss more than it needs. An inter-token SLO is given up for lost requests only,
and a request of the warm-up for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from gpuplan.policy.vocabulary import Action, Cancel, Complete, Event, Fail, Reject
from gpuplan.record import summary
from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.schedule import ScheduledRequest

NEVER = float("inf")
EXACT, MICROSECOND_S = 1 + 1e-9, 1e-6
"""A value is late only by more than rounding: client and core reckon from different origins."""


class Stopped(msgspec.Struct, frozen=True):
    """The SLO that cannot be met any more, and when that was certain. `missed` of the class's `asked` requests are
    beyond its limit or lost."""

    traffic_class: str
    metric: str
    statistic: str
    limit_ms: float
    at_s: float
    missed: int
    asked: int

    def __str__(self) -> str:
        slo = f"{self.metric.removesuffix('_ms').upper()} {self.statistic} <= {self.limit_ms:g} ms"
        return f"{self.traffic_class} cannot meet {slo}: {self.missed} of {self.asked} missed it by {self.at_s:.1f} s"


class BeyondDoubt(Exception):
    """The simulation's verdict is certain: `stopped` says why."""

    def __init__(self, stopped: Stopped) -> None:
        self.stopped = stopped
        super().__init__(str(stopped))


class EarlyStop:
    """An observer of one simulation of these requests. `first_token_s` says when a request had its first token (not a
    number: not yet), `downlink_s` is the least that passes between a step and the client."""

    def __init__(
        self,
        scenario: Scenario,
        requests: Sequence[ScheduledRequest],
        first_token_s: Callable[[int], float],
        *,
        downlink_s: float = 0.0,
    ) -> None:
        asked: dict[str, list[ScheduledRequest]] = {c.name: [] for c in scenario.traffic if c.slo}
        for request in requests:
            if request.scheduled_s >= scenario.warmup and request.traffic_class in asked:
                asked[request.traffic_class].append(request)
        self._first_token_s, self._downlink_s = first_token_s, downlink_s
        self._requests = {r.index: r for mine in asked.values() for r in mine}
        self._over: set[int] = set()
        self._watches: dict[str, list[_Watch]] = {
            c.name: [
                _Watch(c.name, metric, statistic, limit_ms, asked[c.name])
                for metric, limits in c.slo.items()
                for statistic, limit_ms in limits.items()
            ]
            for c in scenario.traffic
            if asked.get(c.name)
        }
        self._patient = [w for watches in self._watches.values() for w in watches if w.waits]
        self._overdue_s = min((w.overdue_s for w in self._patient), default=NEVER)

    def decided(self, event: Event, actions: Sequence[Action], *, now_s: float) -> None:
        """An event was handled. Raises BeyondDoubt when it settled the verdict."""
        for request_id, completed in _ended(event, actions):
            request = self._requests.get(request_id)
            if request is not None:
                self._over.add(request_id)
                first_s = self._first_token_s(request_id) + self._downlink_s
                for watch in self._watches[request.traffic_class]:
                    if completed:
                        watch.completed(request, first_s, now_s + self._downlink_s)
                    else:
                        watch.lost(request)
                    watch.judge(now_s)
        if now_s > self._overdue_s:
            for watch in self._patient:
                watch.wait(self._still_waits, now_s)
                watch.judge(now_s)
            self._overdue_s = min(w.overdue_s for w in self._patient)

    def _still_waits(self, request_id: int, metric: str) -> bool:
        """Whether the first token, or the last, is still to come."""
        first_s = self._first_token_s(request_id)
        return request_id not in self._over and (metric != "ttft_ms" or first_s != first_s)


def _ended(event: Event, actions: Sequence[Action]) -> Iterator[tuple[int, bool]]:
    """The requests that are over, and whether they were completed."""
    if type(event) is Cancel:
        yield event.request_id, False
    for action in actions:
        if type(action) in (Complete, Reject, Fail):
            yield action.request_id, type(action) is Complete  # type: ignore[union-attr]


class _Watch:
    """One SLO of one class: who has missed it for good, and whether that is too many."""

    def __init__(
        self, name: str, metric: str, statistic: str, limit_ms: float, requests: Sequence[ScheduledRequest]
    ) -> None:
        self._name, self._metric, self._statistic, self._limit_ms = name, metric, statistic, limit_ms
        self.waits = metric in ("ttft_ms", "e2el_ms") and statistic != "mean"
        self._requests = requests
        self._next = 0
        # A request of one token has no time per output token, and counts where it is lost.
        self._asked = sum(r.output_tokens > 1 for r in requests) if metric == "tpot_ms" else len(requests)
        self._lost, self._total_ms = 0, 0.0
        self._missed: set[int] = set()
        self._doubt = _Doubt(statistic, limit_ms)

    @property
    def overdue_s(self) -> float:
        """When the next request that was not looked at has waited as long as the limit allows."""
        if self._next >= len(self._requests):
            return NEVER
        return self._requests[self._next].scheduled_s + self._limit_ms / 1e3 + MICROSECOND_S

    def lost(self, request: ScheduledRequest) -> None:
        self._lost += 1
        self._asked += self._metric == "tpot_ms" and request.output_tokens < 2
        self._missed.add(request.index)

    def completed(self, request: ScheduledRequest, first_s: float, last_s: float) -> None:
        """The client has its first and its last token no earlier than that."""
        match self._metric:
            case "e2el_ms":
                value_ms = summary.latency_ms(request.scheduled_s, last_s)
            case "ttft_ms":
                value_ms = summary.latency_ms(request.scheduled_s, first_s)
            case "tpot_ms" if request.output_tokens > 1:
                value_ms = summary.tpot_ms(first_s, last_s, request.output_tokens)
            case _:
                return
        self._total_ms += value_ms / EXACT
        if value_ms > self._limit_ms * EXACT:
            self._missed.add(request.index)

    def wait(self, still_waits: Callable[[int, str], bool], now_s: float) -> None:
        """Counts those who wait beyond the limit."""
        while now_s > self.overdue_s:
            request_id = self._requests[self._next].index
            self._next += 1
            if still_waits(request_id, self._metric):
                self._missed.add(request_id)

    def judge(self, now_s: float) -> None:
        """Raises BeyondDoubt where too many have missed it."""
        if self._beyond_doubt():
            missed, asked = len(self._missed), self._asked
            raise BeyondDoubt(Stopped(self._name, self._metric, self._statistic, self._limit_ms, now_s, missed, asked))

    def _beyond_doubt(self) -> bool:
        if self._statistic == "mean" and self._total_ms > self._limit_ms * self._asked:
            values_ms = np.zeros(self._asked)
            values_ms[0] = self._total_ms
            return not summary.slo_met(values_ms, "mean", self._limit_ms, lost=0, answered=self._asked)
        if self._doubt.over(self._lost, self._asked):
            return True
        late_too = self._statistic != "mean" and self._metric != "itl_ms"
        return late_too and self._doubt.over(len(self._missed) - 1, self._asked)


@dataclass(slots=True)
class _Doubt:
    """Up to how many lost requests an SLO may hold, all others answered at once; asked of the rule, and remembered."""

    statistic: str
    limit_ms: float
    _asked: int = -1
    _bearable: int = 0

    def over(self, lost: int, asked: int) -> bool:
        if lost < 1:
            return False
        if asked != self._asked:
            self._asked, self._bearable = asked, self._most(asked)
        return lost > self._bearable

    def _most(self, asked: int) -> int:
        held, broken = 0, asked + 1
        while broken - held > 1:
            lost = (held + broken) // 2
            rest = np.zeros(asked - lost)
            if summary.slo_met(rest, self.statistic, self.limit_ms, lost=lost, answered=len(rest)):
                held = lost
            else:
                broken = lost
        return held
