"""Who may join a model's queue.

Takes a model's state and a sequence that has just arrived; gives None (it may join) or the reason it may not. Rules,
in order: a draining core takes nobody; a model without a replica takes nobody; a sequence that fits no replica's KV
cache never will; a full queue takes nobody, and says when to come back by how fast it has been draining.
"""

from __future__ import annotations

from gpuplan.policy.state import ModelState, Sequence
from gpuplan.policy.vocabulary import Reject

# Bounds on Retry-After: under a second a client would hammer; OpenAI's client gives up above 120 s.
RETRY_AFTER_S_MIN = 1.0
RETRY_AFTER_S_MAX = 60.0


def admit(model: ModelState, sequence: Sequence, *, draining: bool) -> Reject | None:
    """None, or the refusal."""
    if draining:
        return Reject(sequence.request_id, "draining", RETRY_AFTER_S_MIN)
    if not any(replica.available for replica in model.replicas):
        return Reject(sequence.request_id, "no_replica", RETRY_AFTER_S_MIN)
    if not fits_somewhere(model, sequence):
        # For good, or only while the replica that could hold it is down.
        if any(replica.could_hold(sequence) for replica in model.replicas):
            return Reject(sequence.request_id, "no_replica", RETRY_AFTER_S_MIN)
        return Reject(sequence.request_id, "too_long")
    if len(model.queue) >= model.batching.max_queue_size:
        wait_s = min(max(model.drain_s(), RETRY_AFTER_S_MIN), RETRY_AFTER_S_MAX)
        return Reject(sequence.request_id, "queue_full", wait_s)
    return None


def fits_somewhere(model: ModelState, sequence: Sequence) -> bool:
    """Some replica that is up, or soon will be, has KV cache for all of the sequence, once it is empty."""
    return any(replica.available and replica.could_hold(sequence) for replica in model.replicas)
