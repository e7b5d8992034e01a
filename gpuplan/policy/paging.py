"""Blocks for the next step, and who gives way when there are none.

Before a step every decoding sequence needs room for one token more. Where no block is left, the sequence that started
last gives way, as in vLLM's V1 engine: its blocks are free, and when there is room again it goes on before anybody
else starts. What it had, prompt and tokens, is then read as its prompt, so far as its blocks were taken meanwhile.
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


def make_room(replica: ReplicaState) -> None:
    """Takes the blocks that the decoding sequences need for one token more, and lets those go on for whom there are
    blocks again."""
    blocks = replica.blocks
    assert blocks is not None, "only where there are blocks"
    size, grown = blocks.block_size, False
    for s in list(replica.decoding):
        context = s.prompt_tokens + s.emitted
        if context % size == 1 or size == 1:
            grown = True
            while s not in replica.gave_way and not blocks.grow(s.request_id, context):
                last = replica.prefilling[-1] if replica.prefilling else replica.decoding[-1]
                replica.stop(last)
                replica.gave_way.insert(0, last)
    if grown:
        replica.count_blocks()
    while replica.gave_way and _fits(blocks, s := replica.gave_way[0]):
        del replica.gave_way[0]
        s.prompt_tokens, s.output_tokens = s.prompt_tokens + s.emitted, s.output_tokens - s.emitted
        s.sent, s.emitted = s.sent + s.emitted, 0
        replica.start(s)


def _fits(blocks: KvBlocks, s: Sequence) -> bool:
    """There are blocks for what it had and for its next token: without those it would give way at once."""
    return blocks.fits(s.request_id, s.spans, s.prompt_tokens + s.emitted + 1)
