"""What a failure costs whom: never more than the request that caused it.

A step that fails is split in halves, which take their turns on the same replica, and so on down to the one request
that fails alone: it gets the error, its batch-mates get their answers. A step without memory is split too, and its
replica runs smaller ones until enough have gone well.

What was lost with a replica before it sent a token is tried once more, on another replica or on the same when it is
back. Whoever was in the step that a replica died of is a suspect: it runs alone until it has a token, so that only the
culprit is in the next such step, and one that was in two of them is not given a third.
"""

from __future__ import annotations

from collections.abc import Mapping

from gpuplan.policy import admission
from gpuplan.policy.state import ModelState, ReplicaState, Sequence

LOSSES_MAX = 2
CALM_STEPS = 32
"""So many steps that went well raise a lowered limit by one: memory comes back slowly, and a step lost to trying is
dearer than one that is smaller than it could be (additive increase, multiplicative decrease, as in TCP)."""


def split(replica: ReplicaState, members: list[Sequence]) -> None:
    """Those of a failed step that are left run again, in halves, before anybody else does."""
    middle = (len(members) + 1) // 2
    replica.turns += [half for half in (members[middle:], members[:middle]) if half]


def lower_limit(replica: ReplicaState, carried: int) -> None:
    """A step of `carried` requests had no memory: half as many may run together."""
    replica.batch_limit = max(min(replica.batch_limit, carried // 2), 1)
    replica.calm_steps = 0


def gone_well(replica: ReplicaState) -> None:
    """A step of a replica with a lowered limit has run."""
    replica.calm_steps += 1
    if replica.calm_steps == CALM_STEPS:
        replica.batch_limit += 1
        replica.calm_steps = 0


def next_turn(replica: ReplicaState, alive: Mapping[int, Sequence]) -> list[Sequence] | None:
    """The group whose turn it is, or None when everybody on the replica may run together."""
    for s in replica.prefilling:
        if s.losses and not s.cancelled:
            return [s]
    while replica.turns:
        group = [s for s in replica.turns.pop() if alive.get(s.request_id) is s]
        if group:
            return group
    if replica.running <= replica.batch_limit:
        return None
    everybody, size = list(replica.sequences()), replica.batch_limit
    replica.turns = [everybody[i : i + size] for i in range(0, len(everybody), size)][::-1]
    return replica.turns.pop()


def may_try_elsewhere(model: ModelState, s: Sequence) -> bool:
    """Its replica is gone: it may run again if nothing was sent, it has not been lost too often, and there is room."""
    free = len(model.queue) < model.batching.max_queue_size
    return not s.emitted and s.losses < LOSSES_MAX and free and admission.fits_somewhere(model, s)
