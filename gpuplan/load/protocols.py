"""What goes over the wire for each API, and what an answer means. Pure: bytes in, bytes out, no clock.

`request_bytes` serialises before the clock starts; `read_answer` parses after it has stopped. An `Api` is an entry of
`APIS`: a path, a body and a reader.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from gpuplan.errors import unknown_name
from gpuplan.load.wire import Exchange, Target
from gpuplan.record.recorder import Answer
from gpuplan.scenario.deployment import Role
from gpuplan.scenario.schedule import ScheduledRequest

MESSAGE_CHARACTERS_MAX = 300
"""Of an error's text: enough to recognise it, and a server cannot fill the report."""

# Plain words of one token each for word-counting servers; no word says what the others mean.
_WORDS = (
    "report happy network lamp river great market slow garden sad paper window bright engine bad table "
    "winter letter useful orange broken signal station love cloud music terrible bridge calm silver"
).split()


class Heard(NamedTuple):
    """What a well-formed answer said: the times of its tokens' chunks, and how many tokens it counted itself."""

    token_s: Sequence[float]
    tokens: int | None
    error: str | None = None


class Api(NamedTuple):
    """One protocol. `body` takes (model, prompt, output tokens)."""

    path: str
    body: Callable[[str, str, int], dict[str, Any]]
    read: Callable[[Exchange], Heard]


def api_for(name: str | None, role: Role) -> Api:
    """The API of that name, or the model's natural one. Raises InputError for an unknown name."""
    if name is None:
        name = _NATURAL[role]
    if name not in APIS:
        raise unknown_name("API", name, APIS, key="--api")
    return APIS[name]


def prompt_text(tokens: int, seed: str, vocabulary: Any = None) -> str:
    """A text of `tokens` words, the same for the same seed; with a `tokenizers.Tokenizer`, one that it counts as that
    many tokens, special ones included (where it joins letters over the cut, a token less or more)."""
    rng = random.Random(seed)  # noqa: S311 - not for secrets
    text = " ".join(rng.choices(_WORDS, k=tokens))
    if vocabulary is None:
        return text
    encoded = vocabulary.encode(text)
    own = [end for (_, end), special in zip(encoded.offsets, encoded.special_tokens_mask, strict=True) if not special]
    kept = max(tokens - (len(encoded.offsets) - len(own)), 1)
    return text[: own[kept - 1]] if kept < len(own) else text


def prompt_of(request: ScheduledRequest, seed: int, vocabulary: Any = None) -> str:
    """The request's prompt: what it begins with as others do, and then its own words. (A tokenizer may join letters
    where two parts meet: then it counts a token less or more.)"""
    own = request.prompt_tokens - sum(tokens for _, tokens in request.spans)
    parts = [prompt_text(tokens, f"{seed}/{name}", vocabulary) for name, tokens in request.spans]
    if own or not parts:
        parts.append(prompt_text(own, f"{seed}/{request.index}", vocabulary))
    return " ".join(parts)


def request_bytes(
    api: Api, target: Target, request: ScheduledRequest, seed: int, headers: dict[str, str], vocabulary: Any = None
) -> bytes:
    """All of one request, ready to send; `vocabulary` counts the prompt's tokens, without it they are words."""
    text = prompt_of(request, seed, vocabulary)
    body = msgspec.json.encode(api.body(request.model, text, request.output_tokens))
    own = {"X-Request-Id": str(request.index), "X-Traffic-Class": request.traffic_class}
    return target.request("POST", api.path, body, {**own, **headers})


def read_answer(api: Api, request: ScheduledRequest, exchange: Exchange, *, start_s: float, warmup_s: float) -> Answer:
    """The row of one request, its times counted from `start_s`."""
    answer = Answer.to(request, warmup_s=warmup_s)
    answer.sent_s = exchange.sent_s - start_s if exchange.sent_s is not None else None
    answer.done_s = exchange.done_s - start_s if exchange.done_s is not None else None
    answer.http_status = exchange.status
    heard = Heard((), None)
    if exchange.status == 200:
        try:
            heard = api.read(exchange)
        except (msgspec.DecodeError, KeyError, TypeError, IndexError, AttributeError) as error:
            heard = Heard((), None, f"unreadable answer: {type(error).__name__}")
    _take_tokens(answer, heard, start_s)
    _judge(answer, heard, exchange, streams=request.output_tokens > 0)
    return answer


def _take_tokens(answer: Answer, heard: Heard, start_s: float) -> None:
    """Token counts and gaps. When the server counted more tokens than chunks came, the gaps are shared out evenly."""
    chunks = len(heard.token_s)
    if not chunks:
        return
    answer.first_token_s = heard.token_s[0] - start_s
    answer.tokens = heard.tokens if heard.tokens is not None else chunks
    gaps = [(b - a) * 1e3 for a, b in itertools.pairwise(heard.token_s)]
    if answer.tokens > chunks > 1:
        answer.merged_tokens = answer.tokens - chunks
        share = (chunks - 1) / (answer.tokens - 1)
        gaps = [gap * share for gap in gaps for _ in range(round(1 / share))]
    answer.gaps_ms = gaps


def _judge(answer: Answer, heard: Heard, exchange: Exchange, *, streams: bool) -> None:
    """Completed, rejected, an error, or interrupted: and the kind and text of what went wrong."""
    if exchange.error == "interrupted":
        answer.status, answer.error = "interrupted", "interrupted"
    elif exchange.error is not None:
        answer.status, answer.error, answer.message = "error", exchange.error, exchange.message
    elif exchange.status in (429, 503):
        answer.status, answer.error, answer.message = "rejected", f"http_{exchange.status}", _error_text(exchange)
    elif exchange.status != 200:
        answer.status, answer.error, answer.message = "error", f"http_{exchange.status}", _error_text(exchange)
    elif heard.error is not None:
        answer.status, answer.error, answer.message = "error", "in_stream", heard.error
    elif streams and not heard.token_s:
        answer.status, answer.error, answer.message = "error", "no_tokens", "a 200 without a token"
    if answer.message is not None:
        answer.message = answer.message[:MESSAGE_CHARACTERS_MAX]


# --- readers ------------------------------------------------------------------------------------------------------


def _read_stream(exchange: Exchange) -> Heard:
    """Server-sent events of a completion or chat: a chunk with text is a token, or several."""
    token_s: list[float] = []
    counted: int | None = None
    for time_s, data in _events(exchange.pieces):
        if data.startswith(b"[DONE]"):
            return Heard(token_s, counted)
        chunk = msgspec.json.decode(data)
        if chunk.get("error"):
            error = chunk["error"]
            return Heard(token_s, counted, str(error.get("message", error) if isinstance(error, dict) else error))
        for choice in chunk.get("choices") or ():
            if choice.get("text") or (choice.get("delta") or {}).get("content"):
                token_s.append(time_s)
        if usage := chunk.get("usage"):
            counted = usage.get("completion_tokens")
    return Heard(token_s, counted, "the stream ended without [DONE]")


def _read_json(exchange: Exchange) -> Heard:
    """One JSON object; it has to be one."""
    msgspec.json.decode(b"".join(piece for _, piece in exchange.pieces), type=dict)
    return Heard((), None)


def _read_embeddings(exchange: Exchange) -> Heard:
    """One JSON object with at least one embedding in it."""
    answer = msgspec.json.decode(b"".join(piece for _, piece in exchange.pieces), type=dict)
    return Heard((), None, None if answer["data"][0]["embedding"] is not None else "an answer without an embedding")


def _events(pieces: Iterable[tuple[float, bytes]]) -> Iterable[tuple[float, bytes]]:
    """The data of each server-sent event, with the time at which its last byte came."""
    rest = b""
    for time_s, piece in pieces:
        rest += piece.replace(b"\r\n", b"\n")
        *whole, rest = rest.split(b"\n\n")
        for block in whole:
            lines = [line[5:].strip() for line in block.split(b"\n") if line.startswith(b"data:")]
            if lines:
                yield time_s, b"\n".join(lines)


def _error_text(exchange: Exchange) -> str:
    raw = b"".join(piece for _, piece in exchange.pieces)
    try:
        body = msgspec.json.decode(raw)
        error = body["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (msgspec.DecodeError, KeyError, TypeError):
        return raw[:MESSAGE_CHARACTERS_MAX].decode("utf-8", "replace")


# --- bodies -------------------------------------------------------------------------------------------------------

# vLLM's extensions, which hold a server to the length asked for; servers that do not know them ignore them.
_EXACT_LENGTH = {"ignore_eos": True, "temperature": 0.0}
_STREAM = {"stream": True, "stream_options": {"include_usage": True}}


def _completion(model: str, prompt: str, tokens: int) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "max_tokens": max(tokens, 1), **_STREAM, **_EXACT_LENGTH}


def _chat(model: str, prompt: str, tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": model, "messages": messages, "max_tokens": max(tokens, 1), **_STREAM, **_EXACT_LENGTH}


def _classify(model: str, prompt: str, tokens: int) -> dict[str, Any]:
    return {"model": model, "input": prompt}


def _embeddings(model: str, prompt: str, tokens: int) -> dict[str, Any]:
    return {"model": model, "input": prompt, "encoding_format": "base64"}  # as OpenAI's own client asks


APIS: dict[str, Api] = {
    "openai-completions": Api("/v1/completions", _completion, _read_stream),
    "openai-chat": Api("/v1/chat/completions", _chat, _read_stream),
    "classify": Api("/v1/classify", _classify, _read_json),
    "embeddings": Api("/v1/embeddings", _embeddings, _read_embeddings),
}
_NATURAL: dict[Role, str] = {"decoder": "openai-completions", "classifier": "classify", "embedder": "embeddings"}
