"""What a client would have seen, from what a core did: as a live server answers (`serve/http/errors.py`)."""

from __future__ import annotations

import itertools

from gpuplan.policy.vocabulary import OUT_OF_MEMORY
from gpuplan.record.recorder import Answer, Served
from gpuplan.scenario.schedule import ScheduledRequest
from gpuplan.scenario.script import NAN_OUTPUT

_REFUSALS = {
    "class_full": ("rejected", 429),
    "rate_limited": ("rejected", 429),
    "too_long": ("error", 400),
    "replica_lost": ("error", 503),
    "timeout": ("error", 504),
    OUT_OF_MEMORY: ("error", 503),
    NAN_OUTPUT: ("error", 500),
}
_ELSE = ("rejected", 503)
ABANDONED = "abandoned"


def status_of(outcome: str) -> tuple[str, str | None]:
    """A request's status and error, by how the core ended it."""
    if outcome == "completed":
        return outcome, None
    if outcome == "cancelled":
        return "error", ABANDONED
    return _REFUSALS.get(outcome, _ELSE)[0], outcome


def answer(request: ScheduledRequest, served: Served, warmup_s: float, downlink_s: float) -> Answer:
    """What a client would have seen, from what the core did."""
    answer = Answer.to(request, warmup_s=warmup_s)
    answer.status, answer.error = status_of(served.outcome)
    answer.sent_s = request.scheduled_s
    if served.finished_s is not None:
        answer.done_s = served.finished_s + downlink_s
    times = served.token_s
    if served.outcome == "cancelled":
        if not times:
            return answer
    elif served.outcome != "completed":
        answer.http_status = _REFUSALS.get(served.outcome, _ELSE)[1]
        # A stream that was lost is a 200 with an error at its end; the step that failed it gave it no token.
        times = [t for t in times if served.finished_s is None or t < served.finished_s]
        if not times:
            return answer
    answer.http_status = 200
    if request.output_tokens:
        answer.first_token_s = times[0] + downlink_s
        answer.tokens = len(times)
        answer.gaps_ms = [(b - a) * 1e3 for a, b in itertools.pairwise(times)]
    return answer
