"""What a failure costs whom: never more than the request that caused it.

A step that fails is split in halves, which take their turns on the same replica, and so on down to the one request
that fails alone: it gets the error, its batch-mates get their answers. A step without memory is split too, and its
replica runs smaller ones for a while (`concurrency`).

What was lost with a replica before it sent a token is tried once more, on another replica or on the same when it is
back. Whoever was in the step that a replica died of is a suspect: it runs alone until it has a token, so that only the
culprit is in the next such step, and one that was in two of them is not given a third.
"""

from __future__ import annotations

from collections.abc import Mapping

from gpuplan.policy import admission
from gpuplan.policy.state import ModelState, ReplicaState, Sequence
from gpuplan.policy.vocabulary import OUT_OF_MEMORY

LOSSES_MAX = 2
NOT_THE_MODEL = frozenset({"too_long", "bad_token", "no_replica", "replica_lost", "timeout", OUT_OF_MEMORY})
"""Reasons that say nothing of whether a replica works: what a client did, and what is counted elsewhere."""


def split(replica: ReplicaState, members: list[Sequence]) -> None:
    """Those of a failed step that are left run again, in halves, before anybody else does."""
    middle = (len(members) + 1) // 2
    replica.turns += [half for half in (members[middle:], members[:middle]) if half]


def next_turn(replica: ReplicaState, alive: Mapping[int, Sequence]) -> list[Sequence] | None:
    """The group whose turn it is, or None when everybody on the replica may run together."""
    for s in replica.prefilling:
        if s.losses and not s.cancelled:
            return [s]
    while replica.turns:
        group = [s for s in replica.turns.pop() if alive.get(s.request_id) is s and s not in replica.gave_way]
        if group:
            return group
    size = replica.limit.memory_limit
    if replica.running <= size:
        return None
    everybody = [*replica.prefilling, *replica.decoding]
    replica.turns = [everybody[i : i + size] for i in range(0, len(everybody), size)][::-1]
    return replica.turns.pop()


def may_try_elsewhere(model: ModelState, s: Sequence) -> bool:
    """Its replica is gone: it may run again if nothing was sent, it has not been lost too often, and there is room."""
    free = model.waiting < model.max_queue_size
    return not s.emitted and not s.sent and s.losses < LOSSES_MAX and free and admission.fits_somewhere(model, s)
