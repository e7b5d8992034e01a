"""Real tokens over loopback: OpenAI's own client, the built-in decoder in a worker process."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import httpx
import openai
import pytest

from gpuplan.serve.service import Service

from .test_http import run, until

TALK = {
    "name": "talk",
    "models": {"chat": {"builtin": "tiny-chat"}},
    "deployment": {"gpu": "cpu", "batching": {"chat": {"max_batch_size": 8, "max_batch_tokens": 32}}},
}
PROMPT = "A prompt of more bytes than one step reads, so that it comes in chunks beside the tokens of others."


async def text_of(ai: openai.AsyncOpenAI, **asked: Any) -> str:
    asked = {"model": "chat", "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "stream": True, **asked}
    return "".join([chunk.choices[0].text async for chunk in await ai.completions.create(**asked)])


@pytest.mark.slow
def test_text_is_the_same_alone_among_others_and_after_a_crash() -> None:
    async def scene(client: httpx.AsyncClient, service: Service) -> None:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0) as ai:
            alone = await text_of(ai)
            assert len(alone) >= 24
            others = [text_of(ai, prompt="x" * n, max_tokens=n) for n in (3, 40, 17, 5)]
            assert (await asyncio.gather(text_of(ai), *others, text_of(ai)))[::5] == [alone, alone]
            whole = await ai.completions.create(
                model="chat", prompt=PROMPT, max_tokens=24, temperature=0, logprobs=2, extra_body={"ignore_eos": True}
            )
            assert whole.choices[0].text == alone and whole.usage is not None
            assert (whole.usage.completion_tokens, whole.choices[0].finish_reason) == (24, "length")
            assert len(whole.choices[0].logprobs.token_logprobs) == 24  # type: ignore[union-attr,arg-type]
            stop = alone[10:13]
            assert await text_of(ai, stop=stop) == alone[: alone.index(stop)]
            drawn = [await text_of(ai, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
            assert drawn[0] == drawn[1] != drawn[2]

            streaming = asyncio.ensure_future(text_of(ai, max_tokens=1500, extra_body={"ignore_eos": True}))
            await until(lambda: service.server.core.running("chat") == 1)
            await asyncio.sleep(0.3)
            os.kill(service.server.fleet.engines["chat-0"].pid, signal.SIGKILL)  # type: ignore[attr-defined]
            with pytest.raises(openai.APIError, match="the replica that ran the request was lost"):
                await streaming
            assert await text_of(ai) == alone, "it waits until the worker is back"
            assert service.about()["provenance"] == {"chat": "cpu"}
            assert service.about()["engines"]["chat"].endswith("CPUExecutionProvider")

    run(TALK, scene)


def test_what_fits_no_cache_or_vocabulary_is_refused_with_the_limit() -> None:
    small = {**TALK["deployment"], "replicas": [{"model": "chat", "slice": "cpu", "kv_cache_tokens": 100}]}  # type: ignore[dict-item]

    async def scene(client: httpx.AsyncClient, service: Service) -> None:
        body = {"model": "chat", "prompt": "a" * 90, "max_tokens": 20}
        refused = await client.post("/v1/completions", json=body)
        assert refused.status_code == 400
        assert "90 prompt tokens and 20 to generate" in refused.text and "holds 100 in all" in refused.text
        assert (await client.post("/v1/completions", json={**body, "max_tokens": 5})).status_code == 200
        unknown = await client.post("/v1/completions", json={**body, "prompt": [72, 260]})
        assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "prompt")
        assert "token id 260 is not in the vocabulary of 260" in unknown.text

    run({**TALK, "deployment": small}, scene)
