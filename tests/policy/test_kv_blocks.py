"""Blocks of KV cache: what a prompt needs, what of it is there, and what goes when room is needed."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from gpuplan.policy.kv_blocks import KvBlocks, Span

A: tuple[Span, ...] = (("a", 8),)


def blocks(number: int = 10, *, prefix_caching: bool = True) -> KvBlocks:
    return KvBlocks(number, 4, prefix_caching=prefix_caching)


def test_a_prompt_takes_whole_blocks_and_a_context_one_more_when_it_leaves_the_last() -> None:
    cache = blocks()
    assert cache.admit(1, (), 9) == 0
    assert (cache.held, cache.free) == (3, 7)
    rows = [
        (10, 3),  # the third block has room for twelve
        (12, 3),
        (13, 4),
        (13, 4),  # asked again, nothing more
    ]
    for tokens, held in rows:
        assert cache.grow(1, tokens)
        assert cache.held == held
    cache.let_go(1)
    assert (cache.held, cache.free) == (0, 10)
    cache.check()


def test_what_others_began_with_need_not_be_read_again() -> None:
    rows = [  # of a prompt, beside another one of `a` and three tokens: what is there, and blocks held in all
        (12, A, 8, 4),  # two full blocks
        (9, A, 8, 4),
        (8, A, 4, 3),  # its last token is always computed, into a block that is there
        (5, (("a", 5),), 4, 4),
        (12, (("b", 8),), 0, 6),
        (12, (("a", 6),), 4, 5),  # the second block ends with its own tokens
        (12, (("a", 4), ("c", 8)), 4, 5),
        (12, (), 0, 6),
    ]
    for tokens, spans, cached, held in rows:
        cache = blocks()
        cache.admit(1, A, 11)
        assert cache.cached_tokens(2, spans, tokens) == cached, (tokens, spans)
        assert cache.admit(2, spans, tokens) == cached
        assert cache.held == held, (tokens, spans)
        cache.check()


def test_without_a_prefix_cache_nothing_is_found() -> None:
    cache = blocks(prefix_caching=False)
    cache.admit(1, A, 8)
    assert cache.admit(2, A, 8) == 0
    assert cache.held == 4


def test_what_is_let_go_stays_until_its_room_is_needed_and_the_end_of_it_goes_first() -> None:
    cache = blocks(4)
    cache.admit(1, (("a", 12),), 12)
    cache.let_go(1)
    assert cache.cached_tokens(2, (("a", 12),), 16) == 12
    cache.admit(3, (), 8)  # one block was never used, and one has to go
    assert cache.cached_tokens(2, (("a", 12),), 16) == 8
    cache.let_go(3)
    cache.admit(4, (("a", 12),), 12)  # finds two blocks, which are the last to go from here on
    assert (cache.held, cache.free) == (3, 1)
    cache.let_go(4)
    cache.forget()
    assert cache.cached_tokens(2, (("a", 12),), 16) == 0, "a replica that was loaded anew"
    assert cache.free == 4
    cache.check()


def test_there_is_room_for_a_prompt_whose_beginning_somebody_holds() -> None:
    cache = blocks(3)
    cache.admit(1, A, 8)
    assert cache.fits(2, A, 9), "two blocks are there, one is free"
    assert not cache.fits(2, (("b", 8),), 9)
    cache.admit(2, A, 9)
    assert not cache.grow(1, 9)
    cache.let_go(2)
    assert cache.grow(1, 9)
    cache.check()


def test_whoever_comes_back_finds_what_it_had() -> None:
    cache = blocks()
    cache.admit(1, A, 10)
    for tokens in range(11, 18):
        assert cache.grow(1, tokens)
    cache.let_go(1)
    assert cache.admit(1, A, 18) == 16, "its prompt and what it had generated, in full blocks"


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_block_is_lost_or_given_twice(data: st.DataObject) -> None:
    cache = KvBlocks(
        data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5)), prefix_caching=data.draw(st.booleans())
    )
    contexts: dict[int, int] = {}
    spans = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9)), max_size=2).map(tuple)
    for request_id in range(data.draw(st.integers(1, 25))):
        kind = data.draw(st.sampled_from(("admit", "grow", "let_go")))
        if kind == "admit":
            parts, more = data.draw(spans), data.draw(st.integers(1, 8))
            tokens = sum(n for _, n in parts) + more
            if cache.fits(request_id, parts, tokens):
                found = cache.admit(request_id, parts, tokens)
                assert found < tokens and found % cache.block_size == 0
                contexts[request_id] = tokens
        elif contexts:
            one = data.draw(st.sampled_from(sorted(contexts)))
            if kind == "let_go":
                cache.let_go(one)
                del contexts[one]
            elif cache.grow(one, contexts[one] + 1):
                contexts[one] += 1
            else:
                assert not cache.free
        cache.check()
    for one in contexts:
        cache.let_go(one)
    assert cache.free == cache.blocks_max
