"""Who is let in and who is not, as a client sees it: statuses, headers, and when they come.

Over loopback, with engines that answer when a test opens their gate: nothing here depends on how fast a machine is but
for a deadline, and that may come late.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest

from gpuplan.policy.vocabulary import RunStep
from gpuplan.scenario import deployment
from gpuplan.scenario.build import build
from gpuplan.scenario.demand import Scenario
from gpuplan.serve import models
from gpuplan.serve.engines import Output, Prompt
from gpuplan.serve.service import Service, ServiceOptions, serving

from .conftest import SCENARIO, FakeEngine
from .test_http import raw, until

CHAT, MOOD = "/v1/completions", "/v1/classify"


class Gated(FakeEngine):
    """A fake that counts what it is asked to tokenise, and keeps in which order prompts were started. Emulated models
    generate to the end; this one ends with a text that says `brief` after its first token."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenized = 0
        self.started: list[str] = []
        self.shut_after: int | None = None  # so many steps, and the gate shuts

    def tokenize(self, text: str) -> Sequence[int]:
        self.tokenized += 1
        return super().tokenize(text)

    async def run(self, step: RunStep, prompts: Mapping[int, Prompt], *, asked_s: float) -> Mapping[int, Output]:
        self.started += [prompt.text for prompt in prompts.values()]
        if len(self.steps) == self.shut_after:
            self.gate.clear()
        outputs = await super().run(step, prompts, asked_s=asked_s)
        brief = {i for i, prompt in prompts.items() if "brief" in prompt.text}
        return {i: Output(o.text, end=i in brief, error=o.error) for i, o in outputs.items()}


Scene = Callable[["Seen"], Awaitable[None]]


class Seen:
    """A started server, a client, and its engines."""

    def __init__(self, client: httpx.AsyncClient, service: Service) -> None:
        self.client, self.service, self.core = client, service, service.server.core

    def engine(self, model: str) -> Gated:
        engine = self.service.server.fleet.engine_of(model)
        assert isinstance(engine, Gated)
        return engine

    async def chat(self, text: str = "a b", tokens: int = 3, stream: bool = False, **headers: Any) -> httpx.Response:
        body = {"model": "chat", "prompt": text, "max_tokens": tokens, "stream": stream}
        return await self.client.post(CHAT, json=body, headers=_headers(headers))

    async def mood(self, text: str = "a b", **headers: Any) -> httpx.Response:
        return await self.client.post(MOOD, json={"model": "mood", "input": text}, headers=_headers(headers))

    async def until_status(self, status: int, **headers: Any) -> httpx.Response:
        """Asks until it is answered so."""
        for _ in range(200):
            if (answer := await self.mood(**headers)).status_code == status:
                return answer
            await asyncio.sleep(0.01)
        raise AssertionError(f"never a {status}, at last {answer.status_code}")

    def asked(self, answer: Awaitable[httpx.Response]) -> asyncio.Task[httpx.Response]:
        return asyncio.ensure_future(answer)

    async def settled(self) -> None:
        """Nobody is in, and the core's state is consistent."""
        await until(lambda: self.core.in_flight == 0)
        assert (self.core.waiting("chat"), self.core.waiting("mood")) == (0, 0)
        self.core.check_invariants()


def _headers(named: dict[str, Any]) -> dict[str, str]:
    names = {"klass": "X-Traffic-Class", "timeout_ms": "X-Request-Timeout-Ms", "key": "Authorization"}
    return {names[name]: f"Bearer {value}" if name == "key" else str(value) for name, value in named.items()}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a scene against the deployment of SCENARIO with these rules of admission, and one request at a time."""
    monkeypatch.setattr(models, "engine_for", lambda *_, **__: Gated())

    @asynccontextmanager
    async def served(admission: dict[str, Any], **options: Any) -> AsyncIterator[Seen]:
        batching = {name: {"max_batch_size": 1, "max_queue_size": 4} for name in ("chat", "mood")}
        supply: dict[str, Any] = {**SCENARIO["deployment"], "batching": batching, "admission": admission}  # type: ignore[dict-item]
        resolved = deployment.resolve(build({**SCENARIO, "deployment": supply}, Scenario))
        async with (
            serving(resolved, ServiceOptions(drain_s=1.0, **options)) as service,
            httpx.AsyncClient(base_url=service.url, timeout=20) as client,
        ):
            yield Seen(client, service)

    def run(scene: Scene, admission: dict[str, Any] | None = None, **options: Any) -> None:
        async def main() -> None:
            async with served(admission or {}, **options) as seen:
                await asyncio.wait_for(scene(seen), 30)

        asyncio.run(main())

    return run


def refused(answer: httpx.Response, status: int, said: str, *, retry_s: bool = True) -> float:
    """Checks a refusal; gives the seconds of its Retry-After (0 for none)."""
    assert (answer.status_code, said in answer.json()["error"]["message"]) == (status, True), answer.text
    assert ("retry-after" in answer.headers) == retry_s
    return float(answer.headers.get("retry-after", 0))


# --- rate limits --------------------------------------------------------------------------------------------------


def test_a_class_that_asks_too_often_hears_when_to_come_back(run: Callable[..., None]) -> None:
    async def scene(seen: Seen) -> None:
        for _ in range(2):
            assert (await seen.mood(klass="bulk")).status_code == 200
        assert 1 <= refused(await seen.mood(klass="bulk"), 429, "asked for as much") <= 20, "0.1 a second, 2 at once"
        assert (await seen.mood()).status_code == 200, "the others may"
        assert (await seen.mood(klass="never heard of")).status_code == 200
        await seen.settled()

    run(scene, {"classes": {"bulk": {"rate_limit": {"requests_per_s": 0.1, "burst": "20s"}}}})


def test_tokens_are_limited_and_those_not_used_come_back(run: Callable[..., None]) -> None:
    """A bucket of 100 tokens that fills by one in ten seconds."""

    async def scene(seen: Seen) -> None:
        for _ in range(10):  # 2 + 48 are reserved each time, 3 used
            assert (await seen.chat("be brief", tokens=48, klass="bulk")).status_code == 200
        assert (await seen.chat("a b", tokens=48, klass="bulk")).status_code == 200, "70 are left"
        assert refused(await seen.chat("a b", tokens=48, klass="bulk"), 429, "asked for as much") == 60, "the most told"
        assert (await seen.chat("a b", tokens=3, klass="bulk")).status_code == 200, "20 were left"
        assert (await seen.chat("a b", tokens=48)).status_code == 200
        await seen.settled()

    run(scene, {"classes": {"bulk": {"rate_limit": {"tokens_per_s": 0.1, "burst": "1000s"}}}})


def test_a_classifiers_tokens_are_those_of_its_prompt(run: Callable[..., None]) -> None:
    async def scene(seen: Seen) -> None:
        for _ in range(5):
            assert (await seen.mood("a b", klass="bulk")).status_code == 200
        refused(await seen.mood("a b", klass="bulk"), 429, "asked for as much")

    run(scene, {"classes": {"bulk": {"rate_limit": {"tokens_per_s": 0.01, "burst": "1000s"}}}})


def test_every_key_has_a_limit_of_its_own(run: Callable[..., None]) -> None:
    async def scene(seen: Seen) -> None:
        for key in ("for-alice", "for-robert"):
            assert (await seen.mood(key=key)).status_code == 200, key
            refused(await seen.mood(key=key), 429, "asked for as much")
        assert (await seen.mood(key="for-nobody")).status_code == 401

    keys = {"alice": "for-alice", "bob": "for-robert"}
    run(scene, {"per_key": {"requests_per_s": 0.1}}, api_keys=keys)


def test_openais_client_tries_again_when_it_was_told_to(run: Callable[..., None]) -> None:
    async def scene(seen: Seen) -> None:
        async with openai.AsyncOpenAI(base_url=f"{seen.service.url}/v1", api_key="x", max_retries=1) as ai:
            began_s = time.monotonic()
            for _ in range(2):
                await ai.completions.create(
                    model="chat", prompt="a", max_tokens=1, extra_headers={"X-Traffic-Class": "bulk"}
                )
            assert time.monotonic() - began_s >= 0.9, "the second one was refused first, and came back a second later"

    run(scene, {"classes": {"bulk": {"rate_limit": {"requests_per_s": 1, "burst": "100ms"}}}})


# --- full ---------------------------------------------------------------------------------------------------------


def test_a_full_class_is_its_own_matter_and_a_full_queue_the_servers(run: Callable[..., None]) -> None:
    async def scene(seen: Seen) -> None:
        gate = seen.engine("mood").gate
        gate.clear()
        waiting = [seen.asked(seen.mood())]
        await until(lambda: seen.core.running("mood") == 1)
        waiting += [seen.asked(seen.mood(klass="bulk")) for _ in range(2)]
        await until(lambda: seen.core.waiting("mood") == 2)
        assert refused(await seen.mood(klass="bulk"), 429, "of this traffic class wait") >= 1
        waiting += [seen.asked(seen.mood()) for _ in range(2)]
        await until(lambda: seen.core.waiting("mood") == 4)
        assert refused(await seen.mood(), 503, "queue is full") >= 1
        assert (await seen.chat()).status_code == 200, "the other model's queue is empty"
        gate.set()
        assert {(await answer).status_code for answer in waiting} == {200}
        assert (await seen.mood(klass="bulk")).status_code == 200
        await seen.settled()

    run(scene, {"classes": {"bulk": {"max_queue_size": 2}}})


def test_a_burst_against_a_full_queue_costs_no_counting(run: Callable[..., None]) -> None:
    async def scene(seen: Seen) -> None:
        engine = seen.engine("mood")
        engine.gate.clear()
        waiting = [seen.asked(seen.mood()) for _ in range(5)]
        await until(lambda: seen.core.waiting("mood") == 4)
        counted = engine.tokenized
        body = b'{"model": "mood", "input": "' + b"word " * 2000 + b'"}'
        request = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)

        async def connection() -> int:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(seen.service.url.rpartition(":")[2]))
            writer.write(request * 20)
            said = b""
            while said.count(b"HTTP/1.1 ") < 20 or not said.endswith(b"}}"):
                said += await reader.read(1 << 16)
            writer.close()
            return said.count(b"HTTP/1.1 503 ")

        began_s = time.monotonic()
        assert sum(await asyncio.gather(*(connection() for _ in range(100)))) == 2000
        assert time.monotonic() - began_s < 10, "less than 5 ms each, on whatever machine"
        assert engine.tokenized == counted
        engine.gate.set()
        assert {(await answer).status_code for answer in waiting} == {200}
        await seen.settled()

    run(scene)


# --- at the door --------------------------------------------------------------------------------------------------

BAD = [
    b"{",
    b'{"model": "mood"}',
    b'{"model": "mood", "input": ""}',
    b'{"model": "nobody", "input": "a"}',
    b'{"model": "mood", "input": [99999999999]}',
]


def test_a_bad_body_gives_its_place_back(run: Callable[..., None]) -> None:
    async def scene(seen: Seen) -> None:
        for body in BAD:
            answer = await seen.client.post(MOOD, content=body, headers={"X-Traffic-Class": "one"})
            assert answer.status_code in (400, 404), answer.text
        assert (await seen.mood(klass="one")).status_code == 200
        await seen.settled()

    run(scene, {"classes": {"one": {"max_queue_size": 1}}})


def test_a_client_that_vanishes_with_half_its_body_sent_gives_its_place_back(run: Callable[..., None]) -> None:
    async def scene(seen: Seen) -> None:
        head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nX-Traffic-Class: one\r\nContent-Length: 42\r\n\r\n"
        _, writer = await asyncio.open_connection("127.0.0.1", int(seen.service.url.rpartition(":")[2]))
        writer.write(head + b'{"model')
        refused(await seen.until_status(429, klass="one"), 429, "of this traffic class wait")
        writer.close()
        await seen.until_status(200, klass="one")
        await seen.settled()

    run(scene, {"classes": {"one": {"max_queue_size": 1}}})


def test_there_are_as_many_places_at_the_door_as_in_all_queues(run: Callable[..., None]) -> None:
    """Heads alone: whoever comes then is refused before its body is there."""

    async def scene(seen: Seen) -> None:
        head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 42\r\n\r\n"
        open_ = [await asyncio.open_connection("127.0.0.1", int(seen.service.url.rpartition(":")[2])) for _ in range(8)]
        for _, writer in open_:
            writer.write(head)
        refused(await seen.until_status(503), 503, "queue is full")
        closing = head.replace(b"Host: x", b"Host: x\r\nConnection: close")
        assert (await raw(seen.service, closing)).startswith(b"HTTP/1.1 503 ")
        assert (await seen.client.get("/health/ready")).status_code == 200, "a probe needs no place"
        for _, writer in open_:
            writer.close()
        await seen.until_status(200)
        await seen.settled()

    run(scene)


# --- deadlines ----------------------------------------------------------------------------------------------------


def test_what_cannot_be_answered_in_time_is_refused_at_once(run: Callable[..., None]) -> None:
    async def scene(seen: Seen) -> None:
        answer = await seen.chat(tokens=4000, timeout_ms=50)
        refused(answer, 503, "after the request's deadline")
        assert answer.headers["x-should-retry"] == "false"
        assert seen.engine("chat").started == [], "it never ran"
        assert (await seen.chat(tokens=2, timeout_ms=5000)).status_code == 200
        await seen.settled()

    run(scene)


@pytest.mark.parametrize("by", ["the header", "the class"])
def test_a_deadline_passes_for_whoever_waits_and_whoever_runs(run: Callable[..., None], by: str) -> None:
    """By the estimate a classifier answers in milliseconds; its engine does not answer at all."""
    headers: dict[str, Any] = {"timeout_ms": 500} if by == "the header" else {"klass": "soon"}

    async def timed(answer: Awaitable[httpx.Response]) -> tuple[httpx.Response, float]:
        began_s = time.monotonic()
        return await answer, time.monotonic() - began_s

    async def scene(seen: Seen) -> None:
        engine = seen.engine("mood")
        engine.gate.clear()
        both = [asyncio.ensure_future(timed(seen.mood(f"m {i}", **headers))) for i in range(2)]
        await until(lambda: seen.core.running("mood") == seen.core.waiting("mood") == 1)
        patient = seen.asked(seen.mood("patient"))
        for late in both:
            answer, took_s = await late
            refused(answer, 504, "within its deadline", retry_s=False)
            assert answer.headers["x-should-retry"] == "false"
            assert 0.49 <= took_s < 2
        assert seen.core.waiting("mood") == 1, "the place of the one that waited is free; the step still runs"
        engine.gate.set()
        assert (await patient).status_code == 200
        assert len(engine.started) == 2 and engine.started[1] == "patient", "the other one never ran"
        await seen.settled()

    run(scene, {"classes": {"soon": {"deadline": "500ms"}}})


def test_a_stream_that_is_too_late_ends_with_an_error_in_it(run: Callable[..., None]) -> None:
    async def scene(seen: Seen) -> None:
        engine = seen.engine("chat")
        engine.shut_after = 2
        answer = await seen.chat(tokens=8, stream=True, timeout_ms=700)
        *tokens, error, done = [line for line in answer.text.splitlines() if line]
        assert answer.status_code == 200 and len([t for t in tokens if '"t' in t]) == 2
        assert "within its deadline" in error and done == "data: [DONE]"
        engine.gate.set()
        await seen.settled()

    run(scene)


@pytest.mark.parametrize("given", ["0", "-1", "soon", "1.5", "", "9999999999", "1e3"])
def test_a_timeout_that_is_none_is_said_to_be_wrong(run: Callable[..., None], given: str) -> None:
    async def scene(seen: Seen) -> None:
        answer = await seen.mood(timeout_ms=given)
        refused(answer, 400, "X-Request-Timeout-Ms", retry_s=False)
        assert (await seen.mood(timeout_ms=1000)).status_code == 200

    run(scene)


# --- priorities ---------------------------------------------------------------------------------------------------


def test_the_urgent_overtake(run: Callable[..., None]) -> None:
    async def scene(seen: Seen) -> None:
        engine = seen.engine("mood")
        engine.gate.clear()
        answers = []
        for text, klass in (("first", "bulk"), ("second", "bulk"), ("third", "bulk"), ("urgent", "people")):
            answers.append(seen.asked(seen.mood(text, klass=klass)))
            await until(lambda: seen.core.in_flight == len(answers))
        engine.gate.set()
        assert {(await answer).status_code for answer in answers} == {200}
        assert engine.started == ["first", "urgent", "second", "third"]
        await seen.settled()

    run(scene, {"classes": {"people": {"priority": 0}, "bulk": {"priority": 5}}})
