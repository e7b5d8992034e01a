"""A KV cache in blocks: who holds which, and what of a prompt is there already.

A sequence holds a block for every `block_size` tokens of its context and one for the rest (Kwon et al., PagedAttention,
SOSP 2023). A full block is known by what it holds, so a prompt that begins as another did shares that one's blocks, and
its first tokens need no computing; the last token of a prompt is always computed, since its answer is needed. A block
that nobody holds keeps its content until its room is needed: the one let go longest ago goes first, and of a sequence
the end before the beginning. These are the rules of vLLM's V1 engine (its docs/design/prefix_caching).

What a prompt holds is told by `spans`: names of its first parts and their tokens, in order. Equal names before the end
of a block are equal content. What is in no span is the request's own.

One simplification: a block counts as there from the moment somebody holds it, though its tokens may be computed only
by the next step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

Span = tuple[str, int]
Block = tuple[str | int, int]
"""The name of the span (or the number of the request) that its last token lies in, and its place in the sequence."""


class KvBlocks:
    """The blocks of one replica. `held` counts those that sequences hold, each once."""

    __slots__ = ("_holders", "_kept", "_sequences", "_unused", "block_size", "blocks_max", "prefix_caching")

    def __init__(self, blocks_max: int, block_size: int, *, prefix_caching: bool) -> None:
        self.blocks_max = blocks_max
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._unused = blocks_max
        self._holders: dict[Block, int] = {}
        self._kept: OrderedDict[Block, None] = OrderedDict()  # held by nobody, let go longest ago first
        self._sequences: dict[int, list[Block]] = {}

    @property
    def held(self) -> int:
        return len(self._holders)

    @property
    def free(self) -> int:
        """Blocks that may be taken, whatever they keep."""
        return self._unused + len(self._kept)

    def cached_tokens(self, request_id: int, spans: tuple[Span, ...], tokens: int) -> int:
        """How many of a prompt's first tokens are there."""
        return len(self._found(request_id, spans, tokens)) * self.block_size

    def fits(self, request_id: int, spans: tuple[Span, ...], tokens: int) -> bool:
        """Whether there is room for a prompt: those of its blocks that are there and held take none."""
        needed = self._blocks_of(tokens)
        if needed <= self.free:
            return True
        return needed - sum(block in self._holders for block in self._found(request_id, spans, tokens)) <= self.free

    def admit(self, request_id: int, spans: tuple[Span, ...], tokens: int) -> int:
        """The request takes the blocks of its prompt; gives how many of its tokens were there. It must fit."""
        found = self._found(request_id, spans, tokens)
        mine = self._sequences[request_id] = []
        for block in found:
            self._take(block, mine)
        named = self._names(request_id, spans)
        for _ in found:
            next(named)
        for _ in range(self._blocks_of(tokens) - len(found)):
            self._take(next(named), mine)
        return len(found) * self.block_size

    def grow(self, request_id: int, tokens: int) -> bool:
        """The request's context is to be `tokens` long: takes what that needs. False if there is none; then it still
        holds what it held."""
        mine = self._sequences[request_id]
        for place in range(len(mine), self._blocks_of(tokens)):
            if not self.free:
                return False
            self._take((request_id, place), mine)
        return True

    def let_go(self, request_id: int) -> None:
        """The request is over here. What its blocks hold is kept as long as there is room."""
        for block in reversed(self._sequences.pop(request_id)):
            holders = self._holders[block] - 1
            if holders:
                self._holders[block] = holders
            else:
                del self._holders[block]
                self._kept[block] = None

    def forget(self) -> None:
        """What nobody holds is lost: the replica was loaded anew."""
        self._unused += len(self._kept)
        self._kept.clear()

    def check(self) -> None:
        """Raises AssertionError when the books do not balance."""
        assert self._unused >= 0, "no block is given twice"
        assert self._unused + len(self._kept) + len(self._holders) == self.blocks_max, "no block is lost"
        assert not self._kept.keys() & self._holders.keys(), "what is held is not free"
        holders: dict[Block, int] = {}
        for mine in self._sequences.values():
            for block in mine:
                holders[block] = holders.get(block, 0) + 1
        assert holders == self._holders, "every block knows its holders"

    def _blocks_of(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _take(self, block: Block, mine: list[Block]) -> None:
        holders = self._holders.get(block)
        if holders is not None:  # two that computed the same are told apart by vLLM, and not here
            self._holders[block] = holders + 1
        else:
            if block in self._kept:
                del self._kept[block]
            elif self._unused:
                self._unused -= 1
            else:
                self._kept.popitem(last=False)
            self._holders[block] = 1
        mine.append(block)

    def _found(self, request_id: int, spans: tuple[Span, ...], tokens: int) -> list[Block]:
        """The prompt's first blocks that are there: full ones, and never all of it."""
        found: list[Block] = []
        if not self.prefix_caching:
            return found
        named = self._names(request_id, spans)
        for _ in range((tokens - 1) // self.block_size):
            block = next(named)
            if block not in self._holders and block not in self._kept:
                break
            found.append(block)
        return found

    def _names(self, request_id: int, spans: tuple[Span, ...]) -> Iterator[Block]:
        """A sequence's blocks, in order and without end."""
        place, end, reach = 0, self.block_size, 0
        if self.prefix_caching:
            for name, tokens in spans:
                reach += tokens
                while end <= reach:
                    yield name, place
                    place, end = place + 1, end + self.block_size
        while True:
            yield request_id, place
            place += 1
