"""Which replicas and models are sound, by what came of their requests and how long their steps took.

Every request that ends tells its replica's breaker and its model's how it went; what a client did wrong says nothing,
and a replica that is lost counts once, however many ran on it. A replica whose breaker is open gets nothing: what
waits for it waits for another. A model whose breaker is open takes nobody.

Slow is a replica whose steps take `slow_factor` times as long, by its model, as those of its fastest sound neighbour do
by theirs; it must have been so for some steps in a row. Without a neighbour nothing is slow: somebody has to do it.
"""

from __future__ import annotations

from gpuplan.policy.admission import refusal
from gpuplan.policy.state import ModelState, ReplicaState, Sequence
from gpuplan.policy.vocabulary import Action, Reject, RunStep
from gpuplan.scenario.faults import NEVER

SLOW_STEPS = 8
"""So many slow ones in a row: more than a hiccup of the host, less than a second of most models."""


def record(
    model: ModelState, replica: ReplicaState, ok: bool, now_s: float, actions: list[Action], *, probe: bool = False
) -> None:
    """A request ended well or not, or the replica was lost. `probe`: it is the one that tries the model."""
    breakers = [replica.breaker]
    if probe or not model.breaker.probing:  # what others make of it is not the probe's word
        breakers.append(model.breaker)
    for breaker in breakers:
        trip = breaker.record(ok, now_s=now_s)
        if trip is not None:
            actions.append(trip)


def step_done(
    model: ModelState, replica: ReplicaState, step: RunStep, steps: int, now_s: float, actions: list[Action]
) -> None:
    """A step has run, so many times in a row. Tells the replica's pace and limit, and its breaker when it was too slow.
    To be called before what came of its requests is recorded: of one that has opened meanwhile they say nothing, of the
    model they do."""
    seconds = (now_s - replica.step_began_s) / steps
    expected_s = replica.pace.ran(step.load, seconds, steps)
    carried = len(step.prefills) + len(step.decodes)
    replica.limit.steps_done(carried, seconds, expected_s if replica.pace.by_roofline else None, steps)
    if len(model.replicas) == 1 or seconds <= 0.0:
        return
    least = NEVER
    for other in model.replicas:
        if other is not replica and other.pace.drift < least and _compares(replica, other):
            least = other.pace.drift
    if least == NEVER:
        return
    ratio = seconds / (expected_s * least)
    if ratio < replica.breaker.slow_factor:
        replica.slow_steps = 0
        return
    replica.slow_steps += steps
    if replica.slow_steps < SLOW_STEPS and replica.breaker.state == "closed":
        return
    trip = replica.breaker.slow(ratio, now_s=now_s)
    if trip is not None:
        replica.slow_steps = 0
        actions.append(trip)


def wake(model: ModelState, now_s: float, actions: list[Action]) -> None:
    """Breakers that are due let a probe through."""
    if (trip := model.breaker.wake(now_s=now_s)) is not None:
        actions.append(trip)
    for replica in model.replicas:
        if (trip := replica.breaker.wake(now_s=now_s)) is not None:
            replica.pace.forget()  # it may be as fast as ever
            actions.append(trip)


def probe_lost(s: Sequence) -> None:
    """A request has gone before it was known how it ends: if it was a probe, there is to be another."""
    if s.probe:
        s.model.breaker.probe_lost()
    if s.replica is not None and not s.replica.running:
        s.replica.breaker.probe_lost()


def circuit_open(model: ModelState, s: Sequence, now_s: float) -> Reject:
    """The refusal while the model, or every replica that could hold the request, is left alone."""
    due_s = model.breaker.due_s()
    if due_s is None:
        able = (r for r in model.replicas if r.available and r.could_hold(s))
        due_s = min((due_s for r in able if (due_s := r.breaker.due_s()) is not None), default=now_s)
    return refusal(s.request_id, "circuit_open", due_s - now_s)


def _compares(replica: ReplicaState, other: ReplicaState) -> bool:
    """Sound, and their drifts are of the same measure."""
    if not other.up or other.breaker.state != "closed" or not other.pace.known or not other.pace.drift:
        return False
    return replica.pace.by_roofline or replica.spec.slice.name == other.spec.slice.name
