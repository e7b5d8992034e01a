"""A runner that fails on command: a prompt's text says how. It needs no model, and runs in a worker of any kind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from gpuplan.errors import RunError
from gpuplan.policy.vocabulary import RunStep
from gpuplan.serve.engines import OutOfMemory, Output, Prompt
from gpuplan.serve.engines.session import EngineSpec

BATCH_MAX = 4
"""More prompts than this in one step that has a `hungry` one are out of memory."""


class FaultyRunner:
    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.description = f"faulty, process {os.getpid()}"
        self.held: set[int] = set()

    def load(self) -> None:
        told = Path(self.spec.source)
        if told.is_file() and told.read_text() == "broken":
            raise RunError("the file is broken")
        if told.is_file() and told.read_text() == "deadly":
            os.kill(os.getpid(), signal.SIGKILL)

    def run(self, step: RunStep, prompts: Mapping[int, Prompt]) -> dict[int, Output]:
        texts = {request_id: prompt.text for request_id, prompt in prompts.items()}
        if "kill" in texts.values():
            os.kill(os.getpid(), signal.SIGKILL)
        if "hang" in texts.values():
            time.sleep(600)
        if "poison" in texts.values():
            raise ValueError("what a prompt")
        if "hungry" in texts.values() and len(texts) > BATCH_MAX:
            raise OutOfMemory("CUDA failure 2: out of memory")
        self.held |= {p.request_id for p in step.prefills}
        if "slow" in texts.values():
            time.sleep(0.2)
        return {
            i: Output(
                f"{Path(self.spec.source).name}:{os.getpid()}", error="nan_output" if texts.get(i) == "nan" else None
            )
            for i in step.answered()
        }

    def release(self, request_ids: Iterable[int]) -> None:
        self.held -= set(request_ids)

    def notes(self) -> list[str]:
        return ["it fails on command"]

    def close(self) -> None:
        pass


def build(spec: EngineSpec) -> FaultyRunner:
    return FaultyRunner(spec)
