"""What answers mean: tables of pieces of a stream and the row they make."""

from __future__ import annotations

import asyncio
import json

import pytest

from gpuplan.errors import InputError
from gpuplan.load import protocols
from gpuplan.load.wire import Exchange, Target
from gpuplan.record.recorder import Answer
from gpuplan.scenario.schedule import ScheduledRequest

REQUEST = ScheduledRequest(3, 1.0, "chat", "llm", 6, 4)
COMPLETIONS = protocols.APIS["openai-completions"]
CHAT = protocols.APIS["openai-chat"]


def token(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "text": text, "finish_reason": None}]}).encode() + b"\n\n"


def usage(tokens: int) -> bytes:
    return b"data: " + json.dumps({"choices": [], "usage": {"completion_tokens": tokens}}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def row(pieces: list[tuple[float, bytes]], status: int | None = 200, error: str | None = None) -> Answer:
    async def make() -> Exchange:
        exchange = Exchange()
        exchange.sent_s, exchange.status, exchange.pieces = 101.001, status, pieces
        exchange.end(pieces[-1][0] if pieces else 102.0, error)
        return exchange

    return protocols.read_answer(COMPLETIONS, REQUEST, asyncio.run(make()), start_s=100.0, warmup_s=0.5)


def test_a_stream_gives_first_token_gaps_and_end() -> None:
    answer = row([(101.5, token("a")), (101.6, token("b")), (101.8, token("c")), (101.9, usage(3) + DONE)])
    assert (answer.status, answer.tokens, answer.merged_tokens) == ("completed", 3, 0)
    assert answer.first_token_s == pytest.approx(1.5)
    assert answer.done_s == pytest.approx(1.9)
    assert answer.sent_s == pytest.approx(1.001)
    assert list(answer.gaps_ms) == pytest.approx([100, 200])


def test_events_may_be_cut_anywhere() -> None:
    whole = token("a") + token("é") + DONE
    for cut in range(1, len(whole)):
        answer = row([(101.1, whole[:cut]), (101.2, whole[cut:])])
        assert (answer.status, answer.tokens) == ("completed", 2), cut


def test_tokens_that_came_in_one_chunk_share_its_gap() -> None:
    answer = row([(101.0, token("a")), (101.4, token("b c d e")), (101.5, usage(5) + DONE)])
    assert (answer.tokens, answer.merged_tokens) == (5, 3)
    assert list(answer.gaps_ms) == pytest.approx([100] * 4)


def test_a_role_without_text_is_no_token() -> None:
    async def make() -> Exchange:
        exchange = Exchange()
        exchange.sent_s, exchange.status = 101.0, 200
        role = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
        text = b'data: {"choices":[{"delta":{"content":"hi"}}]}\n\n'
        exchange.pieces = [(101.1, role), (101.3, text), (101.4, DONE)]
        exchange.end(101.4)
        return exchange

    answer = protocols.read_answer(CHAT, REQUEST, asyncio.run(make()), start_s=100.0, warmup_s=0.0)
    assert answer.first_token_s == pytest.approx(1.3)


FAULTS = [
    ([(101.5, b'{"error": {"message": "full"}}')], 429, None, "rejected", "http_429", "full"),
    ([(101.5, b'{"error": "Unauthorized"}')], 401, None, "error", "http_401", "Unauthorized"),
    ([(101.5, b"<html>oops</html>")], 502, None, "error", "http_502", "<html>oops</html>"),
    ([(101.5, DONE)], 200, None, "error", "no_tokens", "a 200 without a token"),
    ([(101.5, token("a"))], 200, None, "error", "in_stream", "the stream ended without [DONE]"),
    (
        [(101.5, token("a") + b'data: {"error": {"message": "died"}}\n\n' + DONE)],
        200,
        None,
        "error",
        "in_stream",
        "died",
    ),
    ([(101.5, b"data: {oops\n\n")], 200, None, "error", "in_stream", "unreadable answer: DecodeError"),
    ([(101.5, b"data: [1, 2]\n\n")], 200, None, "error", "in_stream", "unreadable answer: AttributeError"),
    ([(101.5, token("a"))], 200, "timeout", "error", "timeout", None),
    ([], None, "interrupted", "interrupted", "interrupted", None),
]


@pytest.mark.parametrize(("pieces", "http", "wire_error", "status", "kind", "message"), FAULTS)
def test_every_fault_has_its_kind(
    pieces: list[tuple[float, bytes]], http: int, wire_error: str, status: str, kind: str, message: str
) -> None:
    answer = row(pieces, http, wire_error)
    assert (answer.status, answer.error, answer.message) == (status, kind, message)


def test_a_servers_message_is_bounded() -> None:
    answer = row([(101.5, b"x" * 100_000)], 500)
    assert answer.message is not None
    assert len(answer.message) == protocols.MESSAGE_CHARACTERS_MAX


def test_requests_are_the_same_for_the_same_seed_and_ask_for_the_exact_length() -> None:
    target = Target.parse("http://127.0.0.1:1")
    one, two = (protocols.request_bytes(COMPLETIONS, target, REQUEST, 7, {"A": "b"}) for _ in range(2))
    assert one == two
    head, body = one.split(b"\r\n\r\n", 1)
    assert b"\r\nX-Request-Id: 3\r\nX-Traffic-Class: chat\r\nA: b\r\n" in head
    sent = json.loads(body)
    assert len(sent["prompt"].split()) == 6
    assert (sent["max_tokens"], sent["stream"], sent["ignore_eos"]) == (4, True, True)
    assert protocols.request_bytes(COMPLETIONS, target, REQUEST, 8, {}) != one


def test_an_unknown_api_names_the_known() -> None:
    with pytest.raises(InputError, match="openai-chat"):
        protocols.api_for("openai-chta", "decoder")


def test_every_role_has_its_natural_api() -> None:
    assert protocols.api_for(None, "decoder") is COMPLETIONS
    assert protocols.api_for(None, "classifier") is protocols.APIS["classify"]
    assert protocols.api_for(None, "embedder") is protocols.APIS["embeddings"]


EMBEDDED = [
    (b'{"data": [{"embedding": "AACAPw=="}]}', "completed", None),
    (b'{"data": [{"embedding": []}]}', "completed", None),
    (b'{"data": [{"embedding": null}]}', "error", "an answer without an embedding"),
    (b'{"data": []}', "error", "unreadable answer: IndexError"),
    (b'["data"]', "error", "unreadable answer: ValidationError"),
]


@pytest.mark.parametrize(("body", "status", "message"), EMBEDDED)
def test_an_embedding_is_one_object_with_a_vector(body: bytes, status: str, message: str | None) -> None:
    async def make() -> Exchange:
        exchange = Exchange()
        exchange.sent_s, exchange.status, exchange.pieces = 101.0, 200, [(101.2, body)]
        exchange.end(101.2)
        return exchange

    asked = ScheduledRequest(3, 1.0, "vectors", "embedder", 6, 0)
    api = protocols.APIS["embeddings"]
    answer = protocols.read_answer(api, asked, asyncio.run(make()), start_s=100.0, warmup_s=0.0)
    assert (answer.status, answer.message) == (status, message)
    assert answer.done_s == pytest.approx(1.2)


@pytest.mark.parametrize("tokens", [1, 2, 7, 100, 500])
def test_a_prompt_has_as_many_tokens_as_the_models_own_tokenizer_counts(tokens: int) -> None:
    from gpuplan.serve import model_files

    bytewise = model_files.vocabulary("builtin:tiny-chat")
    assert len(bytewise.encode(protocols.prompt_text(tokens, "1/1", bytewise)).ids) == tokens
    assert model_files.vocabulary("builtin:sentiment") is None, "it counts words"
    assert len(protocols.prompt_text(tokens, "1/1").split()) == tokens


@pytest.mark.parametrize("tokens", [3, 9, 40])
def test_special_tokens_are_part_of_the_prompt(tokens: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    framed = Tokenizer(models.WordLevel({"[CLS]": 0, "[SEP]": 1, "[UNK]": 2}, "[UNK]"))
    framed.pre_tokenizer = pre_tokenizers.Whitespace()
    framed.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    assert len(framed.encode(protocols.prompt_text(tokens, "1/1", framed)).ids) == tokens


def test_prompts_begin_alike_where_their_spans_are_the_same() -> None:
    spans = (("chat/0", 4), ("chat/0/1", 2))
    one, other = (ScheduledRequest(i, 1.0, "chat", "llm", 8, 4, spans=spans) for i in (1, 2))
    first, second = (protocols.prompt_of(request, 7).split() for request in (one, other))
    assert len(first) == len(second) == 8
    assert first[:6] == second[:6] and first != second
    whole = ScheduledRequest(3, 1.0, "chat", "llm", 6, 4, spans=spans)
    assert protocols.prompt_of(whole, 7).split() == first[:6], "nothing of its own"
    assert protocols.prompt_of(REQUEST, 7) == protocols.prompt_text(6, "7/3"), "nothing in common"
