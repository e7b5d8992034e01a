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

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from gpuplan.policy.vocabulary import Action, Cancel, Complete, Event, Fail, Reject
from gpuplan.record import summary
from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.faults import NEVER
from gpuplan.scenario.schedule import Columns

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
        self, scenario: Scenario, requests: Columns, first_token_s: Callable[[int], float], *, downlink_s: float = 0.0
    ) -> None:
        self._requests, self._first_token_s, self._downlink_s = requests, first_token_s, downlink_s
        self._over = bytearray(len(requests))
        self._warmup_s = scenario.warmup
        counted = np.asarray(requests.scheduled_s) >= scenario.warmup
        kinds, several = np.asarray(requests.kind), np.asarray(requests.output_tokens) > 1
        self._watches: list[list[_Watch]] = []  # by kind of request
        for number, (name, _) in enumerate(requests.kinds):
            mine = counted & (kinds == number)
            slo = next((c.slo for c in scenario.traffic if c.name == name), {}) if mine.any() else {}
            self._watches.append(
                [
                    # A request of one token has no time per output token, and counts where it is lost.
                    _Watch(
                        name, metric, statistic, limit_ms, int((mine & several if metric == "tpot_ms" else mine).sum())
                    )
                    for metric, limits in slo.items()
                    for statistic, limit_ms in limits.items()
                ]
            )
        self._waiting = [
            _Waiting(watch, requests, np.flatnonzero(counted & (kinds == number)).tolist())
            for number, watches in enumerate(self._watches)
            for watch in watches
            if watch.metric in ("ttft_ms", "e2el_ms") and watch.statistic != "mean"
        ]
        self._overdue_s = min((w.overdue_s for w in self._waiting), default=NEVER)

    def decided(self, event: Event, actions: Sequence[Action], *, now_s: float) -> None:
        """An event was handled. Raises BeyondDoubt when it settled the verdict."""
        if type(event) is Cancel:
            self._ended(event.request_id, False, now_s)
        for action in actions:
            kind = type(action)
            if kind is Complete or kind is Reject or kind is Fail:
                self._ended(action.request_id, kind is Complete, now_s)  # type: ignore[union-attr]
        if now_s > self._overdue_s:
            for waiting in self._waiting:
                waiting.look(self._still_waits, now_s)
                waiting.watch.judge(now_s)
            self._overdue_s = min(w.overdue_s for w in self._waiting)

    def _ended(self, request_id: int, completed: bool, now_s: float) -> None:
        requests = self._requests
        scheduled_s, watches = requests.scheduled_s[request_id], self._watches[requests.kind[request_id]]
        self._over[request_id] = 1
        if not watches or scheduled_s < self._warmup_s:
            return
        tokens = requests.output_tokens[request_id]
        first_s, last_s = self._first_token_s(request_id) + self._downlink_s, now_s + self._downlink_s
        for watch in watches:
            if not completed:
                watch.lost(request_id, tokens)
                watch.judge(now_s)
            elif watch.late(request_id, scheduled_s, first_s, last_s, tokens):
                watch.judge(now_s)

    def _still_waits(self, request_id: int, metric: str) -> bool:
        """Whether the first token, or the last, is still to come."""
        first_s = self._first_token_s(request_id)
        return not self._over[request_id] and (metric != "ttft_ms" or first_s != first_s)


class _Watch:
    """One SLO of one class: who has missed it for good, and whether that is too many."""

    def __init__(self, name: str, metric: str, statistic: str, limit_ms: float, asked: int) -> None:
        self.metric, self.statistic, self.limit_ms = metric, statistic, limit_ms
        self.missed: set[int] = set()
        self._name, self._asked = name, asked
        self._lost, self._total_ms = 0, 0.0
        self._late_ms = limit_ms * EXACT
        self._doubt = _Doubt(statistic, limit_ms)

    def lost(self, request_id: int, tokens: int) -> None:
        self._lost += 1
        self._asked += self.metric == "tpot_ms" and tokens < 2
        self.missed.add(request_id)

    def late(self, request_id: int, scheduled_s: float, first_s: float, last_s: float, tokens: int) -> bool:
        """The client has its first and its last token no earlier than that: whether it brings the verdict nearer."""
        metric = self.metric
        if metric == "e2el_ms":
            value_ms = summary.latency_ms(scheduled_s, last_s)
        elif metric == "ttft_ms":
            value_ms = summary.latency_ms(scheduled_s, first_s)
        elif metric == "tpot_ms" and tokens > 1:
            value_ms = summary.tpot_ms(first_s, last_s, tokens)
        else:
            return False
        self._total_ms += value_ms / EXACT
        if value_ms > self._late_ms:
            self.missed.add(request_id)
            return True
        return self.statistic == "mean"

    def judge(self, now_s: float) -> None:
        """Raises BeyondDoubt where too many have missed it."""
        if self._beyond_doubt():
            missed, asked = len(self.missed), self._asked
            raise BeyondDoubt(Stopped(self._name, self.metric, self.statistic, self.limit_ms, now_s, missed, asked))

    def _beyond_doubt(self) -> bool:
        if self.statistic == "mean" and self._total_ms > self.limit_ms * self._asked:
            values_ms = np.zeros(self._asked)
            values_ms[0] = self._total_ms
            return not summary.slo_met(values_ms, "mean", self.limit_ms, lost=0, answered=self._asked)
        if self._doubt.over(self._lost, self._asked):
            return True
        late_too = self.statistic != "mean" and self.metric != "itl_ms"
        return late_too and self._doubt.over(len(self.missed) - 1, self._asked)


class _Waiting:
    """The requests of one class in order of time: who of them has waited longer than a limit allows."""

    def __init__(self, watch: _Watch, requests: Columns, mine: list[int]) -> None:
        self.watch = watch
        self._scheduled_s, self._mine, self._next = requests.scheduled_s, mine, 0
        self.overdue_s = self._due_s()

    def _due_s(self) -> float:
        if self._next >= len(self._mine):
            return NEVER
        return self._scheduled_s[self._mine[self._next]] + self.watch.limit_ms / 1e3 + MICROSECOND_S

    def look(self, still_waits: Callable[[int, str], bool], now_s: float) -> None:
        """Counts those who are overdue."""
        while now_s > self.overdue_s:
            request_id = self._mine[self._next]
            self._next += 1
            self.overdue_s = self._due_s()
            if still_waits(request_id, self.watch.metric):
                self.watch.missed.add(request_id)


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
