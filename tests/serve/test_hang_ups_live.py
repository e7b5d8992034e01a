"""Clients that hang up in mid-stream, over loopback: their places are free again, and nobody else is hurt.

Those that leave want an answer of a minute and hold every place there is; those that stay can only be answered if the
others' places come free.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from gpuplan.load.bench import BenchOptions, bench
from gpuplan.record.run import Run
from gpuplan.scenario import deployment, files
from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.schedule import build_schedule
from gpuplan.serve.service import ServiceOptions, serving

from .test_http import until

TOKENS = 20
GAUGES = ("gpuplan_requests_waiting", "gpuplan_requests_running", "gpuplan_kv_cache_usage_ratio")


def scenario() -> Scenario:
    both: dict[str, Any] = {"model": "chat", "prompt_tokens": 20}
    leave = {**both, "name": "leave", "arrivals": {"process": "constant", "rate": 8}, "output_tokens": 1500}
    stay = {**both, "name": "stay", "arrivals": {"process": "constant", "rate": 5}, "output_tokens": TOKENS}
    told = {
        "name": "hang-ups",
        "duration": 2.5,
        "models": {"chat": {"emulate": "phi-2"}},
        "traffic": [{**leave, "abandon": {"share": 1.0, "after": 0.4}}, stay],
        "deployment": {
            "gpu": "a100-80gb",
            "mig": ["2g.20gb", "2g.20gb"],
            "replicas": [{"model": "chat", "slice": "2g.20gb", "count": 2}],
            "batching": {"chat": {"max_batch_size": 2}},
        },
    }
    built = files.build(told, Scenario)
    files.check(built)
    return built


def test_hung_up_requests_free_their_places_and_the_others_get_their_answers() -> None:
    asked = scenario()

    async def main() -> tuple[Run, dict[str, list[float]]]:
        supply = deployment.resolve(asked)
        async with serving(supply, ServiceOptions(record=True, telemetry="none", drain_s=1.0)) as service:
            server, options = service.server, BenchOptions(target=service.url, telemetry="none")
            run = await bench(asked, supply, build_schedule(asked), options)
            await until(lambda: server.core.in_flight == 0)
            server.core.check_invariants()
            assert not server._tickets and not server._homes and server.core.at_the_door == 0
            assert service.recorder is not None
            outcomes = [served.outcome for served in service.recorder.served.values()]
            assert {"completed": outcomes.count("completed"), "cancelled": outcomes.count("cancelled")} == {
                "completed": len(run.requests[run.requests["traffic_class"] == "stay"]),
                "cancelled": len(run.requests[run.requests["traffic_class"] == "leave"]),
            }
            async with httpx.AsyncClient(base_url=service.url) as client:
                text = (await client.get("/metrics")).text
        families = {f.name: [s.value for s in f.samples] for f in text_string_to_metric_families(text)}
        return run, {name: families[name] for name in GAUGES}

    run, gauges = asyncio.run(asyncio.wait_for(main(), 40))
    assert gauges == {name: [0.0] for name in GAUGES}
    left, stayed = (run.requests[run.requests["traffic_class"] == name] for name in ("leave", "stay"))
    assert set(left["error"]) == {"abandoned"}
    assert (left["tokens"] > 0).any(), "some were in the middle of their streams"
    assert set(stayed["status"]) == {"completed"} and set(stayed["tokens"]) == {TOKENS}
