"""The HTTP faces over loopback, with real clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gpuplan.scenario import deployment
from gpuplan.scenario.build import build
from gpuplan.scenario.demand import Scenario
from gpuplan.serve.engines import OutOfMemory
from gpuplan.serve.http import exchange, protocol
from gpuplan.serve.http.exchange import BODY_BYTES_MAX
from gpuplan.serve.service import Service, ServiceOptions, serving

CPU = {
    "name": "cpu",
    "models": {"sentiment": {"builtin": "sentiment"}},
    "deployment": {"gpu": "cpu", "batching": {"sentiment": {"max_queue_size": 2, "max_batch_size": 2}}},
}
EMULATED = {
    "name": "emulated",
    "models": {"llm": {"emulate": "llama-3-8b"}, "sentiment": {"builtin": "sentiment"}},
    "deployment": {
        "gpu": "h100-80gb",
        "mig": ["4g.40gb", "1g.10gb"],
        "replicas": [{"model": "llm", "slice": "4g.40gb"}, {"model": "sentiment", "slice": "1g.10gb"}],
        "batching": {"llm": {"max_batch_size": 1, "max_queue_size": 1}},
    },
}

Scene = Callable[[httpx.AsyncClient, Service], Awaitable[None]]


@contextlib.asynccontextmanager
async def served(scenario: dict[str, Any], **options: Any) -> AsyncIterator[tuple[httpx.AsyncClient, Service]]:
    resolved = deployment.resolve(build(scenario, Scenario))
    async with (
        serving(resolved, ServiceOptions(record=True, drain_s=2.0, **options)) as service,
        httpx.AsyncClient(base_url=service.url, timeout=10) as client,
    ):
        yield client, service


def run(scenario: dict[str, Any], scene: Scene, **options: Any) -> None:
    async def main() -> None:
        async with served(scenario, **options) as (client, service):
            await scene(client, service)

    asyncio.run(main())


@pytest.mark.parametrize("scenario", [CPU, EMULATED], ids=["cpu", "emulated card"])
def test_the_built_in_classifier_really_answers(scenario: dict[str, Any]) -> None:
    async def scene(client: httpx.AsyncClient, service: Service) -> None:
        for text, label in (("I am happy, this is great", "positive"), ("this is sad and bad", "negative")):
            answer = (await client.post("/v1/classify", json={"model": "sentiment", "input": text})).json()
            assert answer["label"] == label
            assert 0.5 < answer["confidence"] <= 1
            assert answer["processing_time_ms"] > 0
            completion = await client.post("/v1/completions", json={"model": "sentiment", "prompt": text})
            assert completion.json()["choices"][0]["text"] == label
        both = await client.post("/v1/classify", json={"model": "sentiment", "input": ["great", "awful"]})
        assert [r["label"] for r in both.json()["results"]] == ["positive", "negative"]

    run(scenario, scene)


def test_openais_client_completes_chats_and_streams() -> None:
    async def scene(client: httpx.AsyncClient, service: Service) -> None:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0) as ai:
            whole = await ai.completions.create(model="llm", prompt="one two three", max_tokens=4)
            assert whole.usage is not None
            assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, 4)
            assert whole.choices[0].finish_reason == "length"
            stream = await ai.chat.completions.create(
                model="llm",
                messages=[{"role": "user", "content": "hello there"}],
                max_tokens=5,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = [chunk async for chunk in stream]
            assert chunks[0].choices[0].delta.role == "assistant"
            tokens = [c for c in chunks if c.choices and c.choices[0].delta.content]
            assert len(tokens) == 5
            assert len({c.id for c in chunks}) == 1
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.completion_tokens == 5
            assert [m.id async for m in ai.models.list()] == ["llm", "sentiment"]
            with pytest.raises(openai.NotFoundError):
                await ai.completions.create(model="gpt-9", prompt="x")
            with pytest.raises(openai.BadRequestError, match="too long"):
                await ai.completions.create(model="llm", prompt="x", max_tokens=9000)

    run(EMULATED, scene)


def test_a_full_queue_answers_503_with_retry_after() -> None:
    async def scene(client: httpx.AsyncClient, service: Service) -> None:
        body = {"model": "llm", "prompt": "x", "max_tokens": 30}
        answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(6)))
        codes = sorted(a.status_code for a in answers)
        assert codes == [200, 200, 503, 503, 503, 503], "one runs, one waits"
        refused = next(a for a in answers if a.status_code == 503)
        assert int(refused.headers["retry-after"]) >= 1
        assert "queue is full" in refused.json()["error"]["message"]

    run(EMULATED, scene)


BAD_BODIES = [
    ("/v1/completions", b"{", 400, "not valid JSON"),
    ("/v1/completions", b'{"model": NaN}', 400, "not valid JSON"),
    ("/v1/completions", b"[" * 100_000, 400, ""),
    ("/v1/completions", b'{"model": "sentiment"}', 400, "prompt"),
    ("/v1/completions", b'{"model": "sentiment", "prompt": ""}', 400, "empty"),
    ("/v1/completions", b'{"model": "sentiment", "prompt": ["a", "b"]}', 400, "one prompt"),
    ("/v1/completions", b'{"model": "sentiment", "prompt": "x", "max_tokens": -1}', 400, "max_tokens"),
    ("/v1/completions", b'{"model": "sentiment", "prompt": "x", "n": 1000000000}', 400, "n"),
    ("/v1/completions", b'{"model": "../../etc/passwd", "prompt": "x"}', 404, "no such model"),
    ("/v1/chat/completions", b'{"model": "sentiment", "messages": []}', 400, "messages"),
    ("/v1/classify", b'{"model": "sentiment", "input": "  "}', 400, "not empty"),
    ("/v1/classify", b'{"model": "sentiment", "input": []}', 400, "not empty"),
    ("/v1/classify", b'{"model": "sentiment", "input": "!!!"}', 400, "no words"),
    ("/v1/classify", json.dumps({"model": "sentiment", "input": "word " * 3000}).encode(), 400, "too long"),
    ("/v1/classify", b'{"model": "sentiment", "input": ["a", 1]}', 400, "one kind"),
    ("/v1/classify", b'{"model": "sentiment", "input": [1, true]}', 400, "input"),
    ("/v1/classify", b'{"model": "sentiment", "input": [1, -1]}', 400, "input"),
    ("/v1/classify", b'{"model": "sentiment", "input": [1, 2147483648]}', 400, "input"),
    ("/v1/classify", b'{"model": "sentiment", "input": [[1], []]}', 400, "no words"),
    ("/v1/classify", json.dumps({"model": "sentiment", "input": [1] * 3000}).encode(), 400, "too long"),
    ("/v1/classify", json.dumps({"model": "sentiment", "input": ["a"] * 257}).encode(), 400, "256"),
    ("/v1/classify", b'{"model": "sentiment", "input": [5000]}', 400, "vocabulary"),
    ("/v1/completions", b'{"model": "sentiment", "prompt": [[1], [2]]}', 400, "one prompt"),
    ("/v1/embeddings", b'{"model": "sentiment", "input": "x"}', 400, "not an embedder"),
    ("/v1/embeddings", b'{"model": "nobody", "input": "x"}', 404, "no such model"),
    ("/v1/classify", b" " * (BODY_BYTES_MAX + 1), 413, "larger"),
]


def test_bad_bodies_get_a_clear_error_and_the_server_lives() -> None:
    async def scene(client: httpx.AsyncClient, service: Service) -> None:
        for path, body, status, said in BAD_BODIES:
            answer = await client.post(path, content=body)
            assert answer.status_code == status, (body[:60], answer.text)
            error = answer.json()["error"]
            assert said in error["message"], (body[:60], error)
            assert set(error) == {"message", "type", "param", "code"}
        wrong = await client.get("/v1/classify")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
        assert (await client.head("/v1/models")).status_code == 200
        assert (await client.get("/nowhere")).status_code == 404
        assert (await client.get("/health/ready")).status_code == 200

    run(CPU, scene)


def test_a_server_out_of_gpu_memory_says_so_and_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(client: httpx.AsyncClient, service: Service) -> None:
        async def no_room(*_: Any, **__: Any) -> None:
            raise OutOfMemory

        with monkeypatch.context() as patched:
            for engine in service.server.fleet.engines.values():
                patched.setattr(engine, "run", no_room)
            once = await client.post("/v1/classify", json={"model": "sentiment", "input": "good"})
            assert once.status_code == 503
            assert once.json()["error"]["message"] == "model unavailable: out of GPU memory"
            asked = {"model": "llm", "prompt": "hello", "max_tokens": 2, "stream": True}
            streamed = await client.post("/v1/completions", json=asked)
            assert "out of GPU memory" in streamed.text
        assert (await client.post("/v1/classify", json={"model": "sentiment", "input": "good"})).status_code == 200

    run(EMULATED, scene)


def test_a_client_that_hangs_up_frees_its_place() -> None:
    async def scene(client: httpx.AsyncClient, service: Service) -> None:
        body = {"model": "llm", "prompt": "x", "max_tokens": 5000, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            await anext(answer.aiter_bytes())
            assert service.server.core.in_flight == 1
        await until(lambda: service.server.core.in_flight == 0)

    run(EMULATED, scene)


@pytest.mark.parametrize("queued", [False, True], ids=["while it runs", "while it waits"])
def test_a_client_that_hangs_up_before_any_answer_frees_its_place_too(queued: bool) -> None:
    async def scene(client: httpx.AsyncClient, service: Service) -> None:
        body = {"model": "llm", "prompt": "x", "max_tokens": 5000}
        core = service.server.core
        sent = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(2 if queued else 1)]
        await until(lambda: core.in_flight == len(sent))
        assert core.waiting("llm") == int(queued)
        sent[-1].cancel()
        await until(lambda: core.in_flight == len(sent) - 1)
        assert core.waiting("llm") == 0
        sent[0].cancel()
        await until(lambda: core.in_flight == 0)

    run(EMULATED, scene)


async def until(true: Callable[[], bool]) -> None:
    """Waits for at most two seconds."""
    for _ in range(200):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came true")


def test_metrics_parse_and_count() -> None:
    async def scene(client: httpx.AsyncClient, service: Service) -> None:
        await client.post("/v1/completions", json={"model": "llm", "prompt": "a b", "max_tokens": 3})
        text = (await client.get("/metrics")).text
        samples = {
            (s.name, *sorted(s.labels.items())): s.value
            for family in text_string_to_metric_families(text)
            for s in family.samples
        }
        assert samples[("gpuplan_requests_total", ("model", "llm"), ("outcome", "completed"))] == 1
        assert samples[("gpuplan_generation_tokens_total", ("model", "llm"))] == 3
        assert samples[("gpuplan_prompt_tokens_total", ("model", "llm"))] == 2
        assert samples[("gpuplan_requests_waiting", ("model", "llm"))] == 0
        assert samples[("gpuplan_step_seconds_count", ("model", "llm"))] == 3
        assert 0 <= samples[("gpuplan_event_loop_lag_seconds",)] < 1

    run(EMULATED, scene)


def test_a_key_guards_all_but_health() -> None:
    async def scene(client: httpx.AsyncClient, service: Service) -> None:
        for path in ("/v1/models", "/metrics"):
            assert (await client.get(path)).status_code == 401
            assert (await client.get(path, headers={"Authorization": "Bearer wrong"})).status_code == 401
            assert (await client.get(path, headers={"Authorization": "Bearer secret"})).status_code == 200
        assert (await client.get("/health/live")).status_code == 200

    run(CPU, scene, api_keys={"ours": "secret"})


def test_the_server_keeps_a_record_of_what_it_did() -> None:
    async def scene(client: httpx.AsyncClient, service: Service) -> None:
        await client.post(
            "/v1/completions", json={"model": "llm", "prompt": "a b", "max_tokens": 3}, headers={"X-Request-Id": "17"}
        )
        await asyncio.sleep(0.25)
        assert service.recorder is not None
        rows = service.recorder.server_rows()
        assert list(rows.served["client_id"]) == ["17"]
        assert list(rows.served["replica"]) == ["llm-0"]
        assert list(rows.batches["decodes"]) == [0, 1, 1]
        assert (rows.batches["done_s"] > rows.batches["started_s"]).all()
        assert set(rows.telemetry["source"]) == {"emulated"}
        assert rows.telemetry["gpu_utilization"].max() > 0

    run(EMULATED, scene)


async def raw(service: Service, *pieces: bytes) -> bytes:
    """What the server says to bytes sent one after the other, until it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(service.url.rpartition(":")[2]))
    for piece in pieces:
        writer.write(piece)
        await asyncio.sleep(0.05)
    try:
        return await asyncio.wait_for(reader.read(), 2)
    finally:
        writer.close()


HEAD = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 42\r\n\r\n"
BODY = b'{"model": "sentiment", "input": "so good"}'


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(client: httpx.AsyncClient, service: Service) -> None:
        said = await raw(service, HEAD, BODY[:9])
        assert said.startswith(b"HTTP/1.1 408 ")
        assert b"\r\nconnection: close\r\n" in said

    monkeypatch.setattr(exchange, "HANG_UP_S", 0.01)
    monkeypatch.setattr(exchange, "BODY_S_MAX", 0.2)
    run(CPU, scene)


def test_a_body_in_pieces_is_read_and_one_that_breaks_off_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(client: httpx.AsyncClient, service: Service) -> None:
        closing = HEAD.replace(b"Host: x", b"Host: x\r\nConnection: close")
        said = await raw(service, closing, BODY[:9], BODY[9:20], BODY[20:])
        assert said.startswith(b"HTTP/1.1 200 ") and b"positive" in said
        reader, writer = await asyncio.open_connection("127.0.0.1", int(service.url.rpartition(":")[2]))
        writer.write(HEAD + BODY[:9])
        await asyncio.sleep(0.05)
        writer.close()
        assert await asyncio.wait_for(reader.read(), 2) == b""
        assert (await client.get("/health/ready")).status_code == 200

    monkeypatch.setattr(exchange, "HANG_UP_S", 0.02)
    run(CPU, scene)


def test_a_head_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(client: httpx.AsyncClient, service: Service) -> None:
        begun = b"GET /health/live HTTP/1.1\r\nHost: x\r\nX-Long: "
        assert (await raw(service, begun, b"a" * 40_000, b"a" * 40_000)).startswith(b"HTTP/1.1 431 ")
        assert await raw(service, begun) == b"", "closed without a word"
        assert await raw(service) == b"", "and so is one that says nothing"
        whole = await raw(service, begun, b"b\r\nConnection: close\r\n\r\n")
        assert whole.startswith(b"HTTP/1.1 200 "), "in pieces, but in time"

    monkeypatch.setattr(protocol, "HEAD_S_MAX", 0.3)
    run(CPU, scene)
