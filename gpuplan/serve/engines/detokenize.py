"""From token ids to text, as they come: whole characters, and nothing of a stop string.

`TextStream.push` takes one token and gives the text that is now certain. Held back are the first bytes of a character
that is not complete, and an end of the text that may be the beginning of a stop string. The pieces of a stream joined
are what decoding all tokens at once gives, up to the stop string that was completed first (of those completed by the
same character, the longest), however the text is cut into tokens.

Byte-level vocabularies (GPT-2's and those after it) are decoded from the tokens' own bytes. All others, where a token's
text depends on its neighbours, are decoded anew from the last few tokens.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from typing import Any, Protocol

_BROKEN = "�"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_HELD_TOKENS_MAX = 8
"""A character has at most four bytes: tokens that have not become one by then are no character."""


def _byte_characters() -> tuple[str, ...]:
    """The character that stands for each byte in a byte-level vocabulary (Radford et al., GPT-2's encoder): printable
    Latin-1 for itself, all others in their order from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


BYTE_CHARACTERS = _byte_characters()
_BYTES_OF = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


class Vocabulary:
    """What a `tokenizers.Tokenizer` says of its tokens. Ids that it does not know are no text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)
        decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
        self._byte_level = decoder.get("type") == "ByteLevel"
        self._bytes: dict[int, bytes] = {}

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of these tokens, special ones left out."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def characters(self) -> _Characters:
        """A new decoder for one text."""
        return _ByteCharacters(self) if self._byte_level else _WindowCharacters(self)

    def text_bytes(self, token_id: int) -> bytes:
        """What a token of a byte-level vocabulary adds to a text; nothing for special tokens."""
        return b"" if token_id in self._special else self.token_bytes(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """A token by itself, for log-probabilities; special tokens as they are written."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._bytes_of(token_id)
        return known

    def _bytes_of(self, token_id: int) -> bytes:
        token: str | None = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._special:
            return token.encode()
        if self._byte_level:
            try:
                return bytes(_BYTES_OF[character] for character in token)
            except KeyError:  # an added token may hold any characters, and stands for itself
                return token.encode()
        byte = _BYTE.fullmatch(token)
        return bytes.fromhex(byte[1]) if byte else token.replace("\u2581", " ").encode()


class _Characters(Protocol):
    def push(self, token_id: int) -> str:
        """The characters that are complete with this token."""
        ...

    def flush(self) -> str:
        """What is left of an incomplete character."""
        ...


class _ByteCharacters:
    """Byte-level: UTF-8 over the tokens' bytes, U+FFFD for what is none."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._vocabulary.text_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowCharacters:
    """Others: what the last tokens say with the new one, less what they said without it (as vLLM and TGI do)."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._said: list[int] = []
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        self._held.append(token_id)
        new = self._new()
        if not new or (new.endswith(_BROKEN) and len(self._held) < _HELD_TOKENS_MAX):
            return ""
        self._said, self._held = self._held, []
        return new

    def flush(self) -> str:
        new = self._new() if self._held else ""
        self._said, self._held = self._held or self._said, []
        return new

    def _new(self) -> str:
        before = self._vocabulary.decode(self._said)
        return self._vocabulary.decode([*self._said, *self._held])[len(before) :]


class TextStream:
    """One request's text. `end_ids` end it (give none to ignore them); `tokens_max` is its last token, which lets go of
    what is held back (0: not known)."""

    def __init__(
        self, vocabulary: Vocabulary, *, stop: tuple[str, ...] = (), end_ids: frozenset[int], tokens_max: int = 0
    ) -> None:
        self._characters = vocabulary.characters()
        self._stop = tuple(text for text in stop if text)
        self._end_ids, self._tokens_max = end_ids, tokens_max
        self._tokens = 0
        self._held = ""

    def push(self, token_id: int) -> tuple[str, bool]:
        """The text that is certain with this token, and whether the model has ended it."""
        self._tokens += 1
        if token_id in self._end_ids:
            text, _ = self._checked(self._characters.flush(), last=True)
            return text, True
        text = self._characters.push(token_id)
        last = self._tokens == self._tokens_max
        return self._checked(text + self._characters.flush() if last else text, last=last)

    def _checked(self, text: str, *, last: bool) -> tuple[str, bool]:
        """`text` behind what was held back, up to a stop string or the possible beginning of one."""
        if not self._stop:
            return text, False
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            _, at = min(found)
            self._held = ""
            return text[:at], True
        held = 0 if last else max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
