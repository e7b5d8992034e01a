"""A server on a real event loop with engines that do what a test tells them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence

import pytest

from gpuplan.policy.vocabulary import RunStep
from gpuplan.record.run import Provenance
from gpuplan.scenario import deployment
from gpuplan.scenario.build import build
from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.deployment import Deployment
from gpuplan.serve.engines import EngineLost, Output, Prompt

SCENARIO = {
    "name": "fake",
    "models": {"chat": {"emulate": "llama-3-8b"}, "mood": {"emulate": "bert-base"}},
    "deployment": {
        "gpu": "a100-80gb",
        "mig": ["3g.40gb", "1g.10gb"],
        "replicas": [{"model": "chat", "slice": "3g.40gb"}, {"model": "mood", "slice": "1g.10gb"}],
        "batching": {
            "chat": {"max_batch_size": 4, "max_queue_size": 4},
            "mood": {"max_batch_size": 2, "max_queue_size": 4},
        },
    },
}


class FakeEngine:
    """Answers a step when `gate` is open; fails it when `failure` is set, or when a prompt in it is `poison`; `bad`
    requests get an output with an error."""

    description = "fake"
    provenance: Provenance = "emulated"
    late_s: float | None = None
    vocabulary_size: int | None = None

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self.bad: set[int] = set()
        self.steps: list[RunStep] = []
        self.released: list[int] = []
        self.closed = False
        self.loads = 0
        self.load_failure: Exception | None = None
        self.lost: asyncio.Future[str] | None = None

    def tokenize(self, text: str) -> Sequence[int]:
        return bytes(len(text.split()))

    async def load(self) -> None:
        await asyncio.sleep(0)
        if self.load_failure is not None:
            raise self.load_failure
        self.loads += 1
        self.lost = asyncio.get_running_loop().create_future()

    def lose(self, why: str = "killed") -> None:
        """The engine is gone, and so is the step that it runs."""
        assert self.lost is not None
        self.lost.set_result(why)

    async def gone(self) -> str:
        assert self.lost is not None
        return await asyncio.shield(self.lost)

    async def run(self, step: RunStep, prompts: Mapping[int, Prompt], *, asked_s: float) -> Mapping[int, Output]:
        self.steps.append(step)
        assert self.lost is not None
        opened = asyncio.ensure_future(self.gate.wait())
        await asyncio.wait((opened, self.lost), return_when=asyncio.FIRST_COMPLETED)
        opened.cancel()
        if any(prompt.text == "deadly" for prompt in prompts.values()) and not self.lost.done():
            self.lose()
        if self.lost.done():
            raise EngineLost("killed")
        await asyncio.sleep(0)
        if any(prompt.text == "poison" for prompt in prompts.values()):
            raise RuntimeError("a kernel has crashed")
        if self.failure is not None:
            raise self.failure
        return {i: Output(f"t{i} ", error="nan_output" if i in self.bad else None) for i in step.answered()}

    def release(self, request_ids: Iterable[int]) -> None:
        self.released.extend(request_ids)

    def notes(self) -> list[str]:
        return []

    async def close(self) -> None:
        self.closed = True


@pytest.fixture
def fake_deployment() -> Deployment:
    return deployment.resolve(build(SCENARIO, Scenario))
