"""OpenAI's API with OpenAI's own client, over engines that say what a test tells them."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import httpx
import openai
import pytest

from gpuplan.policy.vocabulary import RunStep
from gpuplan.scenario import deployment
from gpuplan.scenario.build import build
from gpuplan.scenario.demand import Scenario
from gpuplan.serve import models
from gpuplan.serve.engines import GREEDY, Output, Prompt, Sampling, TokenLogprob
from gpuplan.serve.service import ServiceOptions, serving

from .conftest import FakeEngine

SMALL = {"layers": 2, "hidden": 64, "heads": 2, "ffn": 128, "vocabulary": 100, "context_tokens_max": 1024}
SCENARIO = {
    "name": "three-roles",
    "models": {
        "chat": {"shape": SMALL},
        "mood": {"shape": {**SMALL, "role": "classifier"}},
        "vectors": {"shape": {**SMALL, "role": "embedder"}},
    },
    "deployment": {
        "gpu": "a100-80gb",
        "mig": ["1g.10gb"] * 3,
        "replicas": [{"model": name, "slice": "1g.10gb"} for name in ("chat", "mood", "vectors")],
    },
}


class Scripted(FakeEngine):
    """Says `script[i]` as a request's i-th output, the last one again and again; keeps the prompts it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.script = [Output("word ")]
        self.prompts: list[Prompt] = []
        self._said: dict[int, int] = {}

    async def run(self, step: RunStep, prompts: Mapping[int, Prompt], *, asked_s: float) -> Mapping[int, Output]:
        await asyncio.sleep(0)
        self.prompts += prompts.values()
        outputs = {}
        for request_id in step.answered():
            said = self._said[request_id] = self._said.get(request_id, 0) + 1
            outputs[request_id] = self.script[min(said, len(self.script)) - 1]
        return outputs


class Numbered(Scripted):
    """Its vector is the number of tokens, then 0.5."""

    async def run(self, step: RunStep, prompts: Mapping[int, Prompt], *, asked_s: float) -> Mapping[int, Output]:
        self.prompts += prompts.values()
        return {i: Output("", embedding=struct.pack("<2f", len(p.token_ids), 0.5)) for i, p in prompts.items()}


Engines = dict[str, Scripted]
Scene = Callable[[openai.AsyncOpenAI, httpx.AsyncClient, Engines], Awaitable[None]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Scene], None]:
    engines: Engines = {"chat": Scripted(), "mood": Scripted(), "vectors": Numbered()}
    monkeypatch.setattr(models, "engine_for", lambda replica, *_, **__: engines[replica.model])

    async def main(scene: Scene) -> None:
        resolved = deployment.resolve(build(SCENARIO, Scenario))
        async with (
            serving(resolved, ServiceOptions(telemetry="none", drain_s=1.0)) as service,
            httpx.AsyncClient(base_url=service.url, timeout=5) as client,
            openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0) as ai,
        ):
            await scene(ai, client, engines)
            service.server.core.check_invariants()
            assert service.server.core.in_flight == 0

    return lambda scene: asyncio.run(main(scene))


Run = Callable[[Scene], None]


def test_token_ids_reach_the_engine_as_they_are(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(ai: openai.AsyncOpenAI, client: httpx.AsyncClient, engines: Engines) -> None:
        for engine in engines.values():
            monkeypatch.setattr(engine, "tokenize", None)
        whole = await ai.completions.create(model="chat", prompt=[5, 0, 2**31 - 1], max_tokens=2)
        assert whole.usage is not None and whole.usage.prompt_tokens == 3
        one_in_a_list: Any = [[7, 8]]
        await ai.completions.create(model="chat", prompt=one_in_a_list, max_tokens=1)
        assert [list(p.token_ids) for p in engines["chat"].prompts] == [[5, 0, 2**31 - 1], [7, 8]]
        engines["mood"].script = [Output("yes", scores={"no": 0.25, "yes": 0.75})]
        one = (await client.post("/v1/classify", json={"model": "mood", "input": [1, 2]})).json()
        assert (one["label"], one["confidence"], one["model"]) == ("yes", 0.75, "mood")
        both = (await client.post("/v1/classify", json={"model": "mood", "input": [[1], [2, 3]]})).json()
        assert [r["label"] for r in both["results"]] == ["yes", "yes"]
        assert [list(p.token_ids) for p in engines["mood"].prompts] == [[1, 2], [1], [2, 3]]

    run(scene)


def test_embeddings_come_as_openais_client_wants_them(run: Run) -> None:
    async def scene(ai: openai.AsyncOpenAI, client: httpx.AsyncClient, engines: Engines) -> None:
        one = await ai.embeddings.create(model="vectors", input="a b c")  # asks for base64
        assert one.data[0].embedding == [3.0, 0.5]
        assert (one.usage.prompt_tokens, one.usage.total_tokens) == (3, 3)
        several = await ai.embeddings.create(model="vectors", input=[[1, 2], [3]], encoding_format="float")
        assert [(e.index, e.embedding) for e in several.data] == [(0, [2.0, 0.5]), (1, [1.0, 0.5])]
        texts = await ai.embeddings.create(model="vectors", input=["a", "b c"])
        assert [e.embedding for e in texts.data] == [[1.0, 0.5], [2.0, 0.5]]
        ids = await client.post("/v1/embeddings", json={"model": "vectors", "input": [1] * 4})
        assert ids.json()["data"] == [{"object": "embedding", "index": 0, "embedding": [4.0, 0.5]}]
        packed = {"model": "vectors", "input": "x", "encoding_format": "base64"}
        raw = (await client.post("/v1/embeddings", json=packed)).json()["data"][0]["embedding"]
        assert base64.b64decode(raw) == struct.pack("<2f", 1, 0.5)
        with pytest.raises(openai.BadRequestError) as refused:
            await ai.embeddings.create(model="vectors", input="x", dimensions=1)
        assert refused.value.param == "dimensions"
        with pytest.raises(openai.BadRequestError, match="not an embedder"):
            await ai.embeddings.create(model="mood", input="x")
        for model in ("chat", "vectors"):
            assert (await client.post("/v1/classify", json={"model": model, "input": "x"})).status_code == 400

    run(scene)


def test_sampling_parameters_reach_the_engine_and_have_openais_defaults(run: Run) -> None:
    async def scene(ai: openai.AsyncOpenAI, client: httpx.AsyncClient, engines: Engines) -> None:
        await ai.completions.create(model="chat", prompt="x", max_tokens=3)
        await ai.completions.create(
            model="chat", prompt="x", temperature=0, top_p=0.5, seed=-7, stop="END", logprobs=2,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        await ai.chat.completions.create(
            model="chat", messages=[{"role": "user", "content": "x"}], stop=["a", "b"], logprobs=True, top_logprobs=4,
            max_completion_tokens=5,
        )  # fmt: skip
        await ai.chat.completions.create(
            model="chat", messages=[{"role": "user", "content": "x"}], logprobs=True, max_tokens=1
        )
        nothing = dict.fromkeys(("temperature", "top_p", "seed", "stop", "logprobs", "n", "stream", "max_tokens"))
        null = await client.post("/v1/completions", json={"model": "chat", "prompt": "x", **nothing})
        assert null.status_code == 200
        plain, full, chat, bare, nulls = engines["chat"].prompts
        assert (plain.sampling, plain.output_tokens) == (Sampling(temperature=1.0), 3)
        assert full.sampling == Sampling(0.0, 0.5, -7, ("END",), True, 2)
        assert (chat.sampling, chat.output_tokens) == (Sampling(1.0, stop=("a", "b"), logprobs=4), 5)
        assert bare.sampling == Sampling(1.0, logprobs=0)
        assert nulls.sampling == plain.sampling
        await ai.completions.create(model="mood", prompt="x", temperature=0)
        assert engines["mood"].prompts[0].sampling == GREEDY

    run(scene)


HELLO = [
    Output("he", logprob=TokenLogprob("he", -0.5, b"he", (("he", -0.5, b"he"), ("ha", -1.5, b"ha")))),
    Output("", logprob=TokenLogprob("l\ufffd", float("-inf"), b"l\xc3")),
    Output("l\u00e9", end=True, logprob=TokenLogprob("\ufffd", -2.0, b"\xa9")),
]


def test_log_probabilities_have_the_shape_of_their_api(run: Run) -> None:
    async def scene(ai: openai.AsyncOpenAI, client: httpx.AsyncClient, engines: Engines) -> None:
        engines["chat"].script = HELLO
        whole = (await ai.completions.create(model="chat", prompt="x", logprobs=2)).choices[0]
        assert (whole.text, whole.finish_reason) == ("hel\u00e9", "stop")
        assert whole.logprobs is not None
        assert whole.logprobs.tokens == ["he", "l\ufffd", "\ufffd"]
        assert whole.logprobs.token_logprobs == [-0.5, -9999.0, -2.0]
        assert whole.logprobs.top_logprobs == [{"he": -0.5, "ha": -1.5}, {"l\ufffd": -9999.0}, {"\ufffd": -2.0}]
        assert whole.logprobs.text_offset == [0, 2, 4]
        pieces = [c.choices[0] async for c in await ai.completions.create(
            model="chat", prompt="x", logprobs=2, stream=True)]  # fmt: skip
        assert [(p.text, p.logprobs and p.logprobs.text_offset) for p in pieces] == [
            ("he", [0]), ("", [2]), ("l\u00e9", [4]), ("", None)
        ]  # fmt: skip
        messages: Any = [{"role": "user", "content": "x"}]
        chat = (await ai.chat.completions.create(
            model="chat", messages=messages, logprobs=True, top_logprobs=2)).choices[0]  # fmt: skip
        assert chat.logprobs is not None and chat.logprobs.content is not None
        first, second, _ = chat.logprobs.content
        assert (first.token, first.logprob, first.bytes) == ("he", -0.5, [104, 101])
        assert [(t.token, t.logprob, t.bytes) for t in first.top_logprobs] == [
            ("he", -0.5, [104, 101]), ("ha", -1.5, [104, 97])
        ]  # fmt: skip
        assert (second.bytes, second.top_logprobs) == ([108, 195], [])
        stream = await ai.chat.completions.create(model="chat", messages=messages, logprobs=True, stream=True)
        told = [c.choices[0].logprobs async for c in stream]
        assert [t.content[0].token for t in told if t and t.content] == ["he", "l\ufffd", "\ufffd"]

    run(scene)


def test_text_held_back_is_no_chunk_but_counts(run: Run) -> None:
    async def scene(ai: openai.AsyncOpenAI, client: httpx.AsyncClient, engines: Engines) -> None:
        engines["chat"].script = [Output(""), Output("\u00e9"), Output(""), Output("!", end=True)]
        asked: dict[str, Any] = {"model": "chat", "max_tokens": 9, "stream": True}
        asked |= {"stream_options": {"include_usage": True}}
        stream = await ai.completions.create(prompt="x", **asked)
        chunks = [chunk async for chunk in stream]
        assert [c.choices[0].text for c in chunks[:-1]] == ["\u00e9", "!", ""]
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 4
        chat = await ai.chat.completions.create(messages=[{"role": "user", "content": "x"}], **asked)
        deltas = [c.choices[0].delta async for c in chat if c.choices]
        assert [(d.role, d.content) for d in deltas] == [
            ("assistant", ""), (None, "\u00e9"), (None, "!"), (None, None)
        ]  # fmt: skip
        whole = await ai.completions.create(model="chat", prompt="x", max_tokens=9)
        assert whole.choices[0].text == "\u00e9!"
        assert whole.usage is not None and whole.usage.completion_tokens == 4

    run(scene)


def test_a_failure_in_mid_stream_is_an_event(run: Run) -> None:
    async def scene(ai: openai.AsyncOpenAI, client: httpx.AsyncClient, engines: Engines) -> None:
        engines["chat"].script = [Output("a "), Output("", error="nan_output")]
        stream = await ai.completions.create(model="chat", prompt="x", max_tokens=5, stream=True)
        assert (await anext(stream)).choices[0].text == "a "
        with pytest.raises(openai.APIError, match="not a number"):
            await anext(stream)

    run(scene)


WRONG: Sequence[tuple[str, Any]] = [
    ("temperature", -0.1), ("temperature", 2.1), ("temperature", "hot"), ("temperature", True),
    ("top_p", 0), ("top_p", 1.01), ("seed", 1.5), ("seed", 2**63), ("seed", "x"),
    ("stop", ""), ("stop", ["a"] * 17), ("stop", ["a" * 257]), ("stop", [""]), ("stop", [1]), ("stop", 1),
    ("ignore_eos", 1), ("max_tokens", 0), ("max_tokens", 1.5), ("max_tokens", True), ("n", 2), ("n", 0),
    ("stream", "yes"), ("stream_options", 1),
]  # fmt: skip
WRONG_HERE = {
    "/v1/completions": [("logprobs", 21), ("logprobs", -1), ("logprobs", True), ("prompt", {"a": 1}), ("prompt", [])],
    "/v1/chat/completions": [
        ("logprobs", 1), ("top_logprobs", 21), ("top_logprobs", 1), ("max_completion_tokens", 10**9), ("messages", "x"),
    ],
}  # fmt: skip


def test_a_wrong_parameter_is_named(run: Run) -> None:
    async def scene(ai: openai.AsyncOpenAI, client: httpx.AsyncClient, engines: Engines) -> None:
        bodies: dict[str, dict[str, Any]] = {
            "/v1/completions": {"model": "chat", "prompt": "x"},
            "/v1/chat/completions": {"model": "chat", "messages": [{"role": "user", "content": "x"}]},
        }
        for path, body in bodies.items():
            for name, value in [*WRONG, *WRONG_HERE[path]]:
                answer = await client.post(path, json={**body, name: value})
                assert answer.status_code == 400, (path, name, value, answer.text)
                assert answer.json()["error"]["param"] == name, (value, answer.text)
        assert not engines["chat"].prompts

    run(scene)
