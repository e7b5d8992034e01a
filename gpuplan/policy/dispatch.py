"""Which replica a sequence waits for, and when another takes it over.

A sequence joins the line of the replica that should serve it best: what runs and waits there, the time its own prompt
and tokens take at that replica's pace, and KV cache that has to come free first, all count. So a slow slice gets what
it can answer sooner than a fast one that is busy, and a replica that has become slow gets less. What is compared is the
time to the last token, in which the wait for the first one counts FIRST_TOKEN times: nobody reads faster than tokens
come, and everybody waits for the first. Ties go to the one with fewer sequences, then to the first in the deployment.
Of more than MANY replicas two are looked at, chosen by the request's number (Mitzenmacher, The Power of Two Choices,
2001).

Work stealing: a replica with room and nobody in its line takes the next of another's, from the one that would finish
last, as long as the sequence fares better here than there, and unless it starts there with the next step anyway. What
has started is never moved.
"""

from __future__ import annotations

from typing import Protocol

from gpuplan.policy.line import NOBODY, Ahead
from gpuplan.policy.state import ModelState, ReplicaState, Sequence

MANY = 16
SPREAD = 0.1
"""A full replica's estimate counts for so much more than an empty one's: estimates are off by some percent, and what is
spread loses less when one replica is lost."""
PER_S = 1e6
"""Estimates are in whole microseconds, so that a log replayed on a clock that began elsewhere gives the same ties."""
FIRST_TOKEN = 8.0
"""`benchmarks/dispatch.py`, Azure's conversations at 80 % load: with 1, p95 TTFT is 2.4 times as long as with 8, and
the p95 of the last token 4 % shorter."""
CERTAIN = 0.75
"""What could start at once counts for so much of the time it takes. A wait is an estimate: only where it is clearly
worth it is a replica left without work."""


class Dispatcher(Protocol):
    """Other rules than these, for comparisons. `chosen` gives None where no replica may take it; `steals`: whether an
    idle replica takes over what waits for another."""

    steals: bool

    def chosen(self, model: ModelState, s: Sequence, *, now_s: float) -> ReplicaState | None: ...


def chosen(model: ModelState, s: Sequence, now_s: float) -> ReplicaState | None:
    """The replica that a sequence is to wait for; None where none may take it."""
    fit = [r for r in model.replicas if r.welcomes and r.could_hold(s)]
    if len(fit) < 2:
        return fit[0] if fit else None
    if len(fit) > MANY:
        fit = _two_of(fit, s.request_id)
    best = fit[0]
    least, taken = _score(best, s, now_s), best.running + len(best.line)
    for replica in fit[1:]:
        score = _score(replica, s, now_s)
        if score < least or (score == least and replica.running + len(replica.line) < taken):
            best, least, taken = replica, score, replica.running + len(replica.line)
    return best


class Expected:
    """Seconds until a replica would give a sequence its first token, or its one answer, and that the rest takes."""

    __slots__ = ("first_s", "rest_s")

    def __init__(self, first_s: float, rest_s: float) -> None:
        self.first_s = _whole(first_s)
        self.rest_s = _whole(rest_s)

    @property
    def finish_s(self) -> float:
        return self.first_s + self.rest_s

    @property
    def score(self) -> float:
        """What replicas are compared by: less is better."""
        return FIRST_TOKEN * self.first_s + self.rest_s


def expected(replica: ReplicaState, s: Sequence, *, now_s: float, ahead: Ahead | None = None) -> Expected:
    """What the sequence may expect of this replica, behind `ahead` (left out: behind all in its line that would go
    first)."""
    if ahead is None:
        ahead = replica.line.ahead_of(s.priority)
    pace, free_s = replica.pace, free_after_s(replica, now_s)
    if not s.output_tokens:
        limit = replica.limit.limit
        before = ahead.requests + replica.running * (replica.step is None)
        steps = 1 + before // limit
        prompts_s = pace.prompt_s(ahead.prompt_tokens + s.prompt_tokens)
        return Expected(free_s + steps * pace.alone_s(0) + prompts_s, 0.0)
    running = replica.running
    together = running + ahead.requests + 1
    sequences = min(together, replica.limit.limit)
    context = replica.context_tokens + s.prompt_tokens
    step_s = pace.decode_step_s(sequences, context)
    if ahead.requests:  # they will join meanwhile, as fast as others leave, and their prompts take time of every step
        answer = (replica.expected_tokens + s.expected_tokens) / (running + 1)
        step_s += sequences / max(answer, 1.0) * pace.prompt_s(ahead.prompt_tokens / ahead.requests)
    being_read = replica.step.load.prefill_tokens if replica.step is not None else 0
    start_s = pace.prompt_s(replica.prompts_left - being_read + ahead.prompt_tokens)
    if running:
        # Those that run are at all stages of their answers: after the time of a whole one, all have left their places
        # and their KV cache.
        share = max(together - replica.limit.limit, 0) / running
        limit_kv = replica.kv_tokens_max
        if limit_kv is not None and replica.kv_reserved:
            missing = replica.kv_reserved + ahead.kv_tokens + s.kv_tokens - limit_kv
            share = max(share, missing / replica.kv_reserved)
        if share > 0:
            start_s = max(start_s, share * step_s * replica.expected_tokens / running)
    start_s += free_s + pace.prompt_s(s.prompt_tokens)
    return Expected(start_s, s.expected_tokens * step_s)


def _whole(seconds: float) -> float:
    return (seconds * PER_S + 0.5) // 1.0 / PER_S


def free_after_s(replica: ReplicaState, now_s: float) -> float:
    """Seconds until a step can start. What is late, a step or a replica that returns, is taken to be late for as long
    again."""
    if not replica.up:
        return abs(replica.ready_s - now_s)
    step = replica.step
    if step is None:
        return 0.0
    since_s, step_s = now_s - replica.step_began_s, replica.step_s
    if step.steps > 1 and since_s < step.steps * step_s:  # it can be cut after any of them
        return step_s - since_s % step_s
    return abs(step.steps * step_s - since_s)


def to_steal(model: ModelState, thief: ReplicaState, *, now_s: float) -> Sequence | None:
    """Whom an idle replica with an empty line takes over next, if anybody."""
    best: tuple[float, Sequence] | None = None
    for victim in model.replicas:
        s = victim.line.head()
        if s is None or victim is thief or not thief.has_room_for(s) or _starts_soon(victim, s, now_s):
            continue
        last_s = expected(victim, s, now_s=now_s).finish_s
        if best is not None and last_s <= best[0]:
            continue
        here, there = (expected(r, s, now_s=now_s, ahead=NOBODY).score for r in (thief, victim))
        if CERTAIN * here <= there:
            best = (last_s, s)
    return best[1] if best else None


def _starts_soon(replica: ReplicaState, s: Sequence, now_s: float) -> bool:
    """The sequence starts with the replica's next step, which is not far: a decoder's steps are short, unless one is
    late by more than its own length."""
    if not replica.has_room_for(s):
        return False
    step = replica.step
    if step is None:
        return True
    return s.output_tokens > 0 and now_s - replica.step_began_s <= (step.steps + 1) * replica.step_s


def _score(replica: ReplicaState, s: Sequence, now_s: float) -> float:
    score = expected(replica, s, now_s=now_s).score
    taken = replica.running + len(replica.line)
    if not taken:
        return CERTAIN * score if replica.idle else score
    return score * (1 + SPREAD * min(taken / replica.limit.limit, 1.0))


def _two_of(replicas: list[ReplicaState], request_id: int) -> list[ReplicaState]:
    """Two different ones, by a hash that spreads consecutive numbers (Knuth's multiplicative one)."""
    mixed = request_id * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    first = (mixed >> 32) % len(replicas)
    second = (first + 1 + (mixed & 0xFFFFFFFF) % (len(replicas) - 1)) % len(replicas)
    return [replicas[first], replicas[second]]
