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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from gpuplan.policy.vocabulary import Action, Cancel, Complete, Event, Fail, Reject
from gpuplan.record import summary
from gpuplan.record.recorder import Served
from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.schedule import Schedule, ScheduledRequest

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
    """Looks on at one simulation. `downlink_s` is the least that passes between the last step and the client."""

    def __init__(self, scenario: Scenario, schedule: Schedule, *, downlink_s: float = 0.0) -> None:
        self._downlink_s = downlink_s
        asked: dict[str, list[ScheduledRequest]] = {c.name: [] for c in scenario.traffic}
        for request in schedule.requests:
            if request.scheduled_s >= scenario.warmup and request.traffic_class in asked:
                asked[request.traffic_class].append(request)
        self._requests = {r.index: r for requests in asked.values() for r in requests}
        self._watches: dict[str, list[_Watch]] = {
            c.name: [
                _Watch(metric, statistic, limit_ms, asked[c.name])
                for metric, limits in c.slo.items()
                for statistic, limit_ms in limits.items()
                if asked[c.name]
            ]
            for c in scenario.traffic
        }
        self._patient = [(name, w) for name, watches in self._watches.items() for w in watches if w.waits]
        self._overdue_s = min((w.overdue_s for _, w in self._patient), default=NEVER)

    def seen(self, served: Mapping[int, Served], event: Event, actions: Sequence[Action], now_s: float) -> None:
        """An event was handled. Raises BeyondDoubt when it settled the verdict."""
        if now_s > self._overdue_s:
            self._look_at_the_waiting(served, now_s)
        for request_id in _ended(event, actions):
            request = self._requests.get(request_id)
            if request is not None and request_id in served:
                for watch in self._watches[request.traffic_class]:
                    watch.ended(request, served[request_id], self._downlink_s)
                    self._judge(request.traffic_class, watch, now_s)

    def _look_at_the_waiting(self, served: Mapping[int, Served], now_s: float) -> None:
        for name, watch in self._patient:
            if now_s > watch.overdue_s:
                watch.wait(served, now_s)
                self._judge(name, watch, now_s)
        self._overdue_s = min(w.overdue_s for _, w in self._patient)

    def _judge(self, name: str, watch: _Watch, now_s: float) -> None:
        if watch.beyond_doubt():
            raise BeyondDoubt(
                Stopped(name, watch.metric, watch.statistic, watch.limit_ms, now_s, watch.missed, watch.asked)
            )


def _ended(event: Event, actions: Sequence[Action]) -> Iterator[int]:
    if type(event) is Cancel:
        yield event.request_id
    for action in actions:
        if type(action) in (Complete, Reject, Fail):
            yield action.request_id  # type: ignore[union-attr]


class _Watch:
    """One SLO of one class: who has missed it for good, and whether that is too many."""

    def __init__(self, metric: str, statistic: str, limit_ms: float, requests: Sequence[ScheduledRequest]) -> None:
        self.metric, self.statistic, self.limit_ms = metric, statistic, limit_ms
        self.waits = metric in ("ttft_ms", "e2el_ms") and statistic != "mean"
        self._requests = requests
        self._next = 0
        # A request of one token has no time per output token, and counts where it is lost.
        self.asked = sum(r.output_tokens > 1 for r in requests) if metric == "tpot_ms" else len(requests)
        self._lost, self._total_ms = 0, 0.0
        self._missed: set[int] = set()
        self._doubt = _Doubt(statistic, limit_ms)

    @property
    def missed(self) -> int:
        return len(self._missed)

    @property
    def overdue_s(self) -> float:
        """When the next request that was not looked at has waited as long as the limit allows."""
        if self._next >= len(self._requests):
            return NEVER
        return self._requests[self._next].scheduled_s + self.limit_ms / 1e3 + MICROSECOND_S

    def ended(self, request: ScheduledRequest, served: Served, downlink_s: float) -> None:
        """A request has all that it will get."""
        if served.outcome != "completed":
            self._lost += 1
            self.asked += self.metric == "tpot_ms" and request.output_tokens < 2
            self._missed.add(request.index)
            return
        value_ms = self._value_ms(request, served, downlink_s)
        if value_ms is None:
            return
        self._total_ms += value_ms / EXACT
        if value_ms > self.limit_ms * EXACT:
            self._missed.add(request.index)

    def wait(self, served: Mapping[int, Served], now_s: float) -> None:
        """Counts those who wait beyond the limit."""
        while now_s > self.overdue_s:
            request = self._requests[self._next]
            self._next += 1
            here = served.get(request.index)
            if here is None or (here.finished_s is None and not (self.metric == "ttft_ms" and here.token_s)):
                self._missed.add(request.index)

    def beyond_doubt(self) -> bool:
        if self.statistic == "mean" and self._total_ms > self.limit_ms * self.asked:
            values_ms = np.zeros(self.asked)
            values_ms[0] = self._total_ms
            return not summary.slo_met(values_ms, "mean", self.limit_ms, lost=0, answered=self.asked)
        if self._doubt.over(self._lost, self.asked):
            return True
        late_too = self.statistic != "mean" and self.metric != "itl_ms"
        return late_too and self._doubt.over(len(self._missed) - 1, self.asked)

    def _value_ms(self, request: ScheduledRequest, served: Served, downlink_s: float) -> float | None:
        """At least what the client will see; None where the metric does not apply."""
        last_s, times = served.finished_s, served.token_s
        if last_s is None or (self.metric != "e2el_ms" and not times):
            return None
        match self.metric:
            case "e2el_ms":
                return summary.latency_ms(request.scheduled_s, last_s + downlink_s)
            case "ttft_ms":
                return summary.latency_ms(request.scheduled_s, times[0] + downlink_s)
            case "tpot_ms" if len(times) > 1:
                return summary.tpot_ms(times[0], last_s, len(times))
        return None


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
