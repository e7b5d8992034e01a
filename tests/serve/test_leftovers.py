"""What requests leave behind: nothing that only a garbage collection would find.

A server collects seldom, as each collection stops its event loop; in a flood whatever is left until then piles up.
"""

from __future__ import annotations

import asyncio
import gc
import json
from typing import Any

import pytest

from gpuplan.load.wire import Exchange, Pool, Target
from gpuplan.scenario import deployment
from gpuplan.scenario.build import build
from gpuplan.scenario.demand import Scenario
from gpuplan.serve.http.exchange import HANG_UP_S
from gpuplan.serve.service import ServiceOptions, serving

from .test_http import until

SHAPE = {"layers": 2, "hidden": 64, "heads": 2, "ffn": 128, "vocabulary": 1000, "context_tokens_max": 128}
SERVED: dict[str, Any] = {
    "name": "leftovers",
    "models": {
        "chat": {"emulate": "phi-2"},
        "mood": {"emulate": "bert-base"},
        "near": {"shape": {**SHAPE, "role": "embedder"}},
    },
    "deployment": {
        "gpu": "a100-80gb",
        "mig": ["2g.20gb", "1g.10gb", "1g.10gb"],
        "replicas": [
            {"model": "chat", "slice": "2g.20gb"},
            {"model": "mood", "slice": "1g.10gb"},
            {"model": "near", "slice": "1g.10gb"},
        ],
        "batching": {"chat": {"max_queue_size": 4, "max_batch_size": 4}},
    },
}
CHAT, LONG = "/v1/completions", {"model": "chat", "prompt": "a b", "max_tokens": 40}  # longer than HANG_UP_S
SENT: list[tuple[str, str, dict[str, Any], dict[str, str], float | None, set[int | None]]] = [
    ("a stream", CHAT, {**LONG, "stream": True}, {}, None, {200}),
    ("a whole answer", CHAT, LONG, {}, None, {200}),
    ("a label", "/v1/classify", {"model": "mood", "input": ["a", "b"]}, {}, None, {200}),
    ("an embedding", "/v1/embeddings", {"model": "near", "input": ["a", "b"]}, {}, None, {200}),
    ("too late from the first", CHAT, LONG, {"X-Request-Timeout-Ms": "1"}, None, {503}),
    ("no model of this name", CHAT, {**LONG, "model": "x"}, {}, None, {404}),
    ("not what was expected", CHAT, {**LONG, "max_tokens": "x"}, {}, None, {400}),
    ("hung up in mid-stream", CHAT, {**LONG, "max_tokens": 1000, "stream": True}, {}, 4 * HANG_UP_S, {200}),
    ("hung up before any answer", CHAT, {**LONG, "max_tokens": 1000}, {}, 4 * HANG_UP_S, {None}),
    ("more than the queue holds", CHAT, LONG, {}, None, {200, 503}),
]


@pytest.mark.parametrize(("what", "path", "body", "headers", "patience_s", "statuses"), SENT, ids=[s[0] for s in SENT])
def test_a_request_leaves_no_cycle_behind(
    what: str,
    path: str,
    body: dict[str, Any],
    headers: dict[str, str],
    patience_s: float | None,
    statuses: set[int | None],
) -> None:
    at_once = 30 if statuses == {200, 503} else 4

    async def main() -> list[str]:
        supply = deployment.resolve(build(SERVED, Scenario))
        async with serving(supply, ServiceOptions(telemetry="none", drain_s=1.0)) as service:
            target = Target.parse(service.url)
            pool, payload = Pool(target, timeout_s=20), target.request("POST", path, json.dumps(body).encode(), headers)

            async def ask() -> None:
                exchanges = [Exchange() for _ in range(at_once)]
                await asyncio.gather(*(pool.send(payload, exchange, patience_s) for exchange in exchanges))
                assert {exchange.status for exchange in exchanges} == statuses
                await until(lambda: service.server.core.in_flight == 0)
                await asyncio.sleep(0.02)  # the last callbacks

            await ask()
            gc.collect()
            gc.disable()
            try:
                await ask()
                gc.set_debug(gc.DEBUG_SAVEALL)
                gc.collect()
                return sorted({type(o).__name__ for o in gc.garbage if type(o).__module__.startswith("gpuplan.serve")})
            finally:
                gc.set_debug(0)
                gc.garbage.clear()
                gc.enable()
                pool.close()

    assert asyncio.run(asyncio.wait_for(main(), 30)) == []
