"""What goes into a step.

Models that answer in one step (classifiers, embedders): the first of its line, up to `max_batch_size`. An idle
replica starts at once, unless company is to be expected: fewer wait than the last step answered, and that step has just
ended, so those it answered may be on their way back. Then it waits until as many are there, at most `max_queue_delay`
from the first one's arrival.

Decoders: iteration-level batching (Yu et al., Orca, OSDI 2022). Every running sequence gets one token a step; new
ones join between steps; at most `max_batch_tokens` tokens run in a step, so a long prompt is read in chunks and the
others' tokens keep coming (Agrawal et al., Sarathi-Serve, OSDI 2024). Where nothing is left to read, the same step can
be run until the first sequence has all its tokens: who drives may do so, and is told when somebody joins or leaves.
"""

from __future__ import annotations

from gpuplan.hardware.roofline import StepLoad
from gpuplan.policy.state import ModelState, ReplicaState, Sequence
from gpuplan.policy.vocabulary import Prefill, RunStep


def batch_due_s(model: ModelState, replica: ReplicaState, head: Sequence) -> float:
    """When the replica may start a batch of which `head`, the next of its line, is the first."""
    rule, arrived_s = model.batching, head.arrived_s
    expected = min(replica.answered, rule.max_batch_size, rule.max_queue_size)
    if len(replica.line) >= expected or arrived_s - replica.answered_s > rule.max_queue_delay:
        return arrived_s
    return arrived_s + rule.max_queue_delay


def single_step(model: ModelState, replica: ReplicaState, step_id: int, batch: list[Sequence]) -> RunStep:
    """One step for all of `batch`; every prompt is padded to the longest."""
    longest = max(s.prompt_tokens for s in batch)
    return RunStep(
        replica.replica_id,
        step_id,
        tuple(Prefill(s.request_id, s.prompt_tokens, True) for s in batch),
        (),
        StepLoad(longest * len(batch), longest * longest * len(batch), 0, 0, len(batch)),
        model.waiting,
    )


def iteration(
    model: ModelState, replica: ReplicaState, step_id: int, group: list[Sequence] | None = None, steps_max: int = 1
) -> RunStep:
    """One token for each decoding sequence (with `group`: of these), and as much of the waiting prompts as the token
    budget leaves; up to `steps_max` times in a row."""
    decoding, prefilling, context_tokens = replica.decoding, replica.prefilling, replica.context_tokens
    if group is not None:
        decoding = [s for s in group if s.emitted]
        prefilling = [s for s in group if not s.emitted]
        context_tokens = sum(s.prompt_tokens + s.emitted for s in decoding)
    budget = max(model.max_batch_tokens - len(decoding), 1)
    prefills: list[Prefill] = []
    tokens = pairs = first_tokens = 0
    for s in prefilling:
        if budget <= 0:
            break
        chunk = min(s.prompt_tokens - s.prefilled, budget)
        last = s.prefilled + chunk == s.prompt_tokens
        prefills.append(Prefill(s.request_id, chunk, last))
        pairs += chunk * s.prefilled + chunk * (chunk + 1) // 2
        budget -= chunk
        tokens += chunk
        first_tokens += last
    steps = 1
    if steps_max > 1 and not prefilling and group is None:
        steps = steps_max
        for s in decoding:
            if s.output_tokens - s.emitted < steps:
                steps = s.output_tokens - s.emitted
    return RunStep(
        replica.replica_id,
        step_id,
        tuple(prefills),
        replica.decoding_ids() if group is None else tuple([s.request_id for s in decoding]),
        StepLoad(tokens, pairs, len(decoding), context_tokens, len(decoding) + first_tokens),
        model.waiting,
        steps,
    )
