"""Runs to plan from, made by simulation: milliseconds each."""

from __future__ import annotations

from typing import Any

import pytest

from gpuplan.record.run import Run
from gpuplan.scenario import deployment, files
from gpuplan.scenario.build import build
from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.schedule import build_schedule
from gpuplan.sim.service_times import ServiceTimes
from gpuplan.sim.simulator import simulate


def scenario(**changes: Any) -> Scenario:
    """One cheap and one expensive model on an A100."""
    data: dict[str, Any] = {
        "name": "two",
        "seed": 1,
        "duration": 30.0,
        "models": {"mood": {"emulate": "bert-base"}, "chat": {"emulate": "llama-3-8b"}},
        "traffic": [
            {
                "name": "mood",
                "model": "mood",
                "arrivals": {"process": "poisson", "rate": 20},
                "prompt_tokens": 64,
                "slo": {"e2el_ms": {"p95": 100}},
            },
            {
                "name": "chat",
                "model": "chat",
                "arrivals": {"process": "poisson", "rate": 1},
                "prompt_tokens": {"lognormal": {"p50": 300, "p95": 900}},
                "output_tokens": {"uniform": {"min": 20, "max": 80}},
                "slo": {"ttft_ms": {"p95": 1500}, "tpot_ms": {"p95": 70}},
            },
        ],
        "deployment": {
            "gpu": "a100-80gb",
            "mig": ["3g.40gb", "1g.10gb"],
            "replicas": [{"model": "chat", "slice": "3g.40gb"}, {"model": "mood", "slice": "1g.10gb"}],
            "autoscale": {"max_gpus": 2},
        },
    }
    built = build({**data, **changes}, Scenario)
    files.check(built)
    return built


def simulated(asked: Scenario, times: ServiceTimes | None = None) -> Run:
    return simulate(asked, deployment.resolve(asked), build_schedule(asked), times or ServiceTimes({}), seed=asked.seed)


@pytest.fixture(scope="session")
def run() -> Run:
    return simulated(scenario())
