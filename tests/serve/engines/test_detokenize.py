"""Text as it streams: the pieces joined are the whole text, cut before the stop string that was completed first."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from gpuplan.serve.builtin import tiny_chat
from gpuplan.serve.engines.detokenize import BYTE_CHARACTERS, TextStream, Vocabulary

END = tiny_chat.END_ID
EMOJI = "a🙂é한z"


def byte_level() -> Any:
    """Bytes, some merged words that hold halves of characters, an added token that is no special one."""
    vocabulary = {c: i for i, c in enumerate(BYTE_CHARACTERS)}
    smile = [BYTE_CHARACTERS[byte] for byte in "🙂".encode()]
    merges = [("a", "b"), ("ab", "c"), (smile[0], smile[1]), (smile[2], smile[3])]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|end|>"])
    made.add_tokens([AddedToken("two words", normalized=False)])
    return made


def byte_fallback() -> Any:
    """As Llama 2 has it: words with the space in front as U+2581, bytes for all that is no word."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581the", "\u2581ab", "c"]
    made = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["</s>"])
    return made


def streamed(vocabulary: Vocabulary, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream = TextStream(vocabulary, stop=stop, end_ids=frozenset(), tokens_max=len(ids))
    pieces = []
    for token_id in ids:
        text, end = stream.push(token_id)
        pieces.append(text)
        if end:
            return pieces, True
    return pieces, False


def naive(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """Character by character: the first stop string to be complete ends the text before it; the longest of several."""
    for end in range(len(text) + 1):
        done = [s for s in stop if s and text[:end].endswith(s)]
        if done:
            return text[: end - max(map(len, done))], True
    return text, False


VOCABULARIES = {"byte_level": byte_level(), "byte_fallback": byte_fallback(), "tiny_chat": tiny_chat.vocabulary()}


@pytest.mark.parametrize("name", VOCABULARIES)
@given(text=st.text(alphabet="abc the🙂é한\n", max_size=12))
def test_pieces_joined_are_the_whole_text(name: str, text: str) -> None:
    tokenizer = VOCABULARIES[name]
    ids = tokenizer.encode(text).ids
    pieces, _ = streamed(Vocabulary(tokenizer), ids)
    assert "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["byte_level", "tiny_chat"])
@given(data=st.data())
def test_any_tokens_at_all_are_the_whole_text(name: str, data: st.DataObject) -> None:
    """Bytes that are no characters as well: a broken sequence is one U+FFFD, as when all is decoded at once."""
    tokenizer = VOCABULARIES[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() + 2), max_size=20))
    pieces, _ = streamed(Vocabulary(tokenizer), ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", VOCABULARIES)
@given(
    text=st.text(alphabet="abc🙂", max_size=14),
    stop=st.lists(st.text(alphabet="abc🙂", max_size=4), max_size=4).map(tuple),
)
def test_nothing_of_a_stop_string_leaks(name: str, text: str, stop: tuple[str, ...]) -> None:
    tokenizer = VOCABULARIES[name]
    ids = tokenizer.encode(text).ids
    expected, ended = naive(tokenizer.decode(ids), stop)
    pieces, end = streamed(Vocabulary(tokenizer), ids, stop)
    assert ("".join(pieces), end) == (expected, ended)
    said = ""
    for piece in pieces:
        said += piece
        assert expected.startswith(said), "what was said cannot be taken back"


def test_a_character_comes_whole() -> None:
    vocabulary = Vocabulary(tiny_chat.vocabulary())
    ids = tiny_chat.vocabulary().encode(EMOJI).ids
    assert ids == list(EMOJI.encode())
    assert [piece for piece in streamed(vocabulary, ids)[0] if piece] == list(EMOJI)


def test_the_last_token_lets_go_of_what_is_held_back() -> None:
    vocabulary = Vocabulary(tiny_chat.vocabulary())
    assert streamed(vocabulary, list(b"say st"), ("stop",)) == (["", "sa", "y", " ", "", "st"], False)
    pieces, _ = streamed(vocabulary, list("🙂".encode())[:3])
    assert pieces == ["", "", "�"], "half a character is what decoding all at once makes of it"


def test_an_end_token_that_is_ignored_is_a_token_without_text() -> None:
    stream = TextStream(Vocabulary(tiny_chat.vocabulary()), end_ids=frozenset(), tokens_max=9)
    assert [stream.push(token_id) for token_id in (*b"h", END, *b"i")] == [("h", False), ("", False), ("i", False)]


def test_an_end_token_frees_what_was_held_back() -> None:
    stream = TextStream(Vocabulary(tiny_chat.vocabulary()), stop=(" stop",), end_ids=frozenset({END}))
    assert [stream.push(token_id) for token_id in (*b"hi ", END)] == [
        ("h", False),
        ("i", False),
        ("", False),
        (" ", True),
    ]


def test_tokens_by_themselves() -> None:
    bytewise, fallback = Vocabulary(byte_level()), Vocabulary(byte_fallback())
    assert bytewise.token_bytes(byte_level().token_to_id("abc")) == b"abc"
    assert bytewise.token_bytes(0xF0) == b"\xf0"
    assert bytewise.token_bytes(byte_level().token_to_id("two words")) == b"two words"
    assert bytewise.token_bytes(byte_level().token_to_id("<|end|>")) == b"<|end|>"
    assert bytewise.token_bytes(10**6) == b""
    assert fallback.token_bytes(byte_fallback().token_to_id("<0xF0>")) == b"\xf0"
    assert fallback.token_bytes(byte_fallback().token_to_id("\u2581the")) == b" the"
