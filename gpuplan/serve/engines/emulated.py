"""An emulated GPU: spends a roofline's estimate of each step on the real clock.

It keeps to its own timeline: a step that was waiting for the last one begins where that one should have ended, so
late wake-ups of the host do not add up. When the host is late all the same, `notes` says so. Its tokens are words
without meaning, one for a token; a model that the package really has (`answers`) runs on the CPU meanwhile and gives
real answers at the emulated card's speed.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence

from gpuplan.hardware import roofline
from gpuplan.hardware.catalog import Gpu
from gpuplan.hardware.profiles import Profile
from gpuplan.hardware.roofline import StepCosts
from gpuplan.hardware.shapes import ModelShape
from gpuplan.policy.vocabulary import RunStep
from gpuplan.record.run import Provenance
from gpuplan.serve.engines import Engine, OutOfMemory, Output, Prompt

# A step decided on so soon after the last one's end was waiting for it: one turn of the event loop.
FOLLOWS_AT_ONCE_S = 0.0005
LATE_S = 0.005
LATE_SHARE_MAX = 0.01
"""More than this share of steps later than LATE_S: then the host was the limit, not the emulated card."""

_WORDS = ("the", "card", "is", "busy", "and", "nobody", "has", "to", "wait", "for", "long", "here")


class EmulatedEngine:
    """One replica of a model shape on one slice of a card."""

    provenance: Provenance = "emulated"

    def __init__(
        self,
        shape: ModelShape,
        card: Gpu,
        part: Profile,
        answers: Engine | None = None,
        *,
        processes: int = 1,
        costs: StepCosts | None = None,
    ) -> None:
        self._shape, self._answers = shape, answers
        self._direction = array("f", [1.0, *[0.0] * (shape.hidden - 1)]).tobytes()
        self._costs = costs or StepCosts(shape, card, part, processes=processes)
        self._band = roofline.band(card, part, shape)
        self._planned_end_s = 0.0
        self._ended_s = 0.0
        self._steps = 0
        self._late_steps = 0
        self.late_s: float | None = None
        self.vocabulary_size = answers.vocabulary_size if answers else None
        self.description = f"emulated {shape.name} on {card.name} {part.name}"

    def tokenize(self, text: str) -> Sequence[int]:
        return self._answers.tokenize(text) if self._answers else bytes(len(text.split()))

    async def load(self) -> None:
        if self._answers:
            await self._answers.load()

    async def run(self, step: RunStep, prompts: Mapping[int, Prompt], *, asked_s: float) -> Mapping[int, Output]:
        if not self._costs.fits(step.load):
            raise OutOfMemory(f"{self._costs.memory_bytes(step.load)} bytes do not fit")
        seconds = self._costs.step_s(step.load)
        waited = asked_s - self._ended_s <= FOLLOWS_AT_ONCE_S
        # Never more than one step's time is made good: a host that cannot keep up is late, and has to show it.
        begun_s = max(self._planned_end_s, asked_s - seconds) if waited else asked_s
        self._planned_end_s = begun_s + seconds
        outputs = await self._answers.run(step, prompts, asked_s=asked_s) if self._answers else self._say(step)
        while (left_s := self._planned_end_s - time.monotonic()) > 0:
            await asyncio.sleep(left_s)
        self._ended_s = time.monotonic()
        self.late_s = self._ended_s - self._planned_end_s
        self._steps += 1
        self._late_steps += self.late_s > LATE_S
        return outputs

    def release(self, request_ids: Iterable[int]) -> None:
        if self._answers:
            self._answers.release(request_ids)

    async def gone(self) -> str:
        if self._answers:
            return await self._answers.gone()
        await asyncio.Event().wait()  # nothing here can be lost
        raise AssertionError("unreachable")

    def notes(self) -> list[str]:
        notes = [f"emulated steps: {self._band.of_steps}"]
        if self._late_steps > self._steps * LATE_SHARE_MAX:
            share = self._late_steps / self._steps
            notes.append(f"{share:.1%} of the emulated steps ended over {LATE_S * 1e3:g} ms late: the host was a limit")
        return notes

    async def close(self) -> None:
        if self._answers:
            await self._answers.close()

    def _say(self, step: RunStep) -> dict[int, Output]:
        if self._shape.role == "embedder":
            return {request_id: Output("", embedding=self._direction) for request_id in step.answered()}
        if self._shape.role != "decoder":
            return {request_id: Output("emulated", scores={"emulated": 1.0}) for request_id in step.answered()}
        word = _WORDS[step.step_id % len(_WORDS)] + " "
        return dict.fromkeys(step.answered(), Output(word))
