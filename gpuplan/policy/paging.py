"""Blocks for the next step, and who gives way when there are none.

Before a step every decoding sequence needs room for one token more. Where no block is left, the sequence that was
admitted last gives way, as in vLLM's V1 engine: its blocks are free, it waits again, and what it had, prompt and
tokens, is read again as its prompt (so far as its blocks were not taken meanwhile). Clients keep the tokens they have.
"""

from __future__ import annotations

from gpuplan.policy.kv_blocks import KvBlocks
from gpuplan.policy.state import ReplicaState, Sequence
from gpuplan.scenario.deployment import Deployment, Replica


def blocks_of(deployment: Deployment, replica: Replica) -> KvBlocks | None:
    """The empty blocks of a replica; None where KV cache is reserved whole."""
    engine = deployment.engine
    if engine.block_size is None or replica.kv_tokens_max is None:
        return None
    return KvBlocks(replica.kv_tokens_max // engine.block_size, engine.block_size, prefix_caching=engine.prefix_caching)


def make_room(replica: ReplicaState) -> list[Sequence]:
    """Takes the blocks that the decoding sequences need for one token more; gives those that had to give way, which
    are on no replica now."""
    blocks = replica.blocks
    assert blocks is not None, "only where there are blocks"
    gone: list[Sequence] = []
    size, grown = blocks.block_size, False
    for s in list(replica.decoding):
        context = s.prompt_tokens + s.emitted
        if context % size != 1 and size > 1:
            continue
        grown = True
        while s.replica is replica and not blocks.grow(s.request_id, context):
            last = replica.prefilling[-1] if replica.prefilling else replica.decoding[-1]
            _give_way(replica, last)
            gone.append(last)
    if grown:
        replica.kv_reserved = blocks.held * size
    return gone


def _give_way(replica: ReplicaState, s: Sequence) -> None:
    """What it has generated is part of its prompt from here on."""
    replica.let_go(s)
    s.replica, s.prefilled = None, 0
    s.prompt_tokens, s.output_tokens, s.emitted = s.prompt_tokens + s.emitted, s.output_tokens - s.emitted, 0
