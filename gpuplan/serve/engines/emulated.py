"""An emulated GPU: spends a roofline's estimate of each step on the real clock.

It keeps to its own timeline: a step that follows at once starts where the last one should have ended, so late
wake-ups of the host do not add up. Its tokens are words without meaning, one for a token; a model that the package
really has (`answers`) runs on the CPU meanwhile and gives real answers at the emulated card's speed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

from gpuplan.hardware import roofline
from gpuplan.hardware.catalog import Gpu
from gpuplan.hardware.mig import Profile
from gpuplan.hardware.shapes import ModelShape
from gpuplan.policy.vocabulary import RunStep
from gpuplan.record.run import Provenance
from gpuplan.serve.engines import Engine, Output, Prompt

# A step asked for within this time of the last one's end counts as following at once: several event loop turns, and
# well under the shortest step.
BACK_TO_BACK_S = 0.003

_WORDS = ("the", "card", "is", "busy", "and", "nobody", "has", "to", "wait", "for", "long", "here")


class EmulatedEngine:
    """One replica of a model shape on one slice of a card."""

    provenance: Provenance = "emulated"

    def __init__(self, shape: ModelShape, card: Gpu, part: Profile, answers: Engine | None = None) -> None:
        self._shape, self._card, self._part, self._answers = shape, card, part, answers
        self._planned_end_s = 0.0
        self.description = f"emulated {shape.name} on {card.name} {part.name}"

    def tokenize(self, text: str) -> Sequence[int]:
        return self._answers.tokenize(text) if self._answers else bytes(len(text.split()))

    async def load(self) -> None:
        if self._answers:
            await self._answers.load()

    async def run(self, step: RunStep, prompts: Mapping[int, Prompt]) -> Mapping[int, Output]:
        begun_s = time.monotonic()
        if begun_s - self._planned_end_s <= BACK_TO_BACK_S:
            begun_s = self._planned_end_s
        self._planned_end_s = begun_s + roofline.step_time_s(self._shape, self._card, self._part, step.load)
        outputs = await self._answers.run(step, prompts) if self._answers else self._say(step)
        while (left_s := self._planned_end_s - time.monotonic()) > 0:
            await asyncio.sleep(left_s)
        return outputs

    async def close(self) -> None:
        if self._answers:
            await self._answers.close()

    def _say(self, step: RunStep) -> dict[int, Output]:
        if self._shape.role == "classifier":
            return {request_id: Output("emulated", scores={"emulated": 1.0}) for request_id in step.answered()}
        word = _WORDS[step.step_id % len(_WORDS)] + " "
        return dict.fromkeys(step.answered(), Output(word))
