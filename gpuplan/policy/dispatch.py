"""Which replica a waiting sequence goes to: the least loaded that has room; ties go to the first in the deployment.

The choice is made as late as possible: sequences wait in their model's queue, and a replica takes one only between
two of its steps and only when it is the choice. So no replica hoards what another could start sooner.
"""

from __future__ import annotations

from gpuplan.policy.state import ModelState, ReplicaState, Sequence


def least_loaded(model: ModelState, sequence: Sequence) -> ReplicaState | None:
    """The replica that should run `sequence`, or None while all are full."""
    best: ReplicaState | None = None
    for replica in model.replicas:
        if replica.has_room_for(sequence) and (best is None or replica.running < best.running):
            best = replica
    return best
