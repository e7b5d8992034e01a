"""Faults injected into a live server: an engine around an engine, which fails when the scenario says so.

`Injection` watches a server's decisions for the first request, from which all times count, and puts a `Faulty` around
the engine of every replica that is to suffer something. To the server a `Faulty` is an engine like any other: what
follows from its failures (who is tried again, when it is loaded again) is decided where it always is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterable, Mapping, Sequence

from gpuplan.errors import RunError
from gpuplan.policy.vocabulary import Action, Arrive, Event, RunStep
from gpuplan.scenario.deployment import Deployment, Replica
from gpuplan.scenario.faults import NEVER
from gpuplan.scenario.script import CRASHED, NAN_OUTPUT, Script, never_back
from gpuplan.serve.engines import Engine, EngineLost, OutOfMemory, Output, Prompt

BEFORE_S = -1.0
"""The time while no request has come: before every fault."""


class Injection:
    """The faults of one deployment. An observer of its server: make it the first, so that its clock runs before a step
    does."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._began_s: float | None = None
        self.begun = asyncio.Event()

    def decided(self, event: Event, actions: list[Action], *, now_s: float) -> None:
        if self._began_s is None and type(event) is Arrive:
            self._began_s = now_s
            self.begun.set()

    def into(self, replica: Replica, engine: Engine) -> Engine:
        """The engine with the replica's faults; as it is where there are none."""
        script = Script(replica.id, self._deployment.faults)
        if not script.faults:
            return engine
        return Faulty(engine, replica.id, script, self, self._deployment.batching[replica.model].step_timeout)

    def since_begun_s(self, monotonic_s: float | None = None) -> float:
        """Seconds from the first request until then, or until now."""
        if self._began_s is None:
            return BEFORE_S
        return (time.monotonic() if monotonic_s is None else monotonic_s) - self._began_s


class Faulty:
    """An engine to which a `Script` happens."""

    def __init__(self, engine: Engine, replica_id: str, script: Script, injection: Injection, step_timeout_s: float):
        self._engine, self._replica_id, self._script, self._clock = engine, replica_id, script, injection
        self._step_timeout_s = step_timeout_s
        self._lost: asyncio.Future[str] | None = None  # done when a fault has taken the engine
        self._crash: asyncio.Task[None] | None = None
        self.late_s: float | None = None
        self._look_like_it()

    def tokenize(self, text: str) -> Sequence[int]:
        return self._engine.tokenize(text)

    async def load(self) -> None:
        """As the engine's, once the faults let it. Raises RunError while a crash keeps it away for good."""
        self._forget_crash()
        if self._lost is not None:
            await self._engine.close()
        now_s = self._clock.since_begun_s()
        while (back_s := self._script.back_s(now_s)) > now_s:
            if back_s == NEVER:
                raise RunError(never_back(self._replica_id))
            await asyncio.sleep(back_s - now_s)
            now_s = self._clock.since_begun_s()
        await self._engine.load()
        self._look_like_it()
        self._lost = asyncio.get_running_loop().create_future()
        self._crash = asyncio.get_running_loop().create_task(self._crash_after(now_s))

    def run(self, step: RunStep, prompts: Mapping[int, Prompt], *, asked_s: float) -> Awaitable[Mapping[int, Output]]:
        now_s = self._clock.since_begun_s(asked_s)
        if self._is_lost():
            return self._never()
        if (back_after_s := self._script.hang(now_s)) is not None:
            return self._hang(back_after_s)
        carried = len(step.prefills) + len(step.decodes)
        if self._script.out_of_memory(carried, now_s):
            return self._out_of_memory(carried)
        return self._run(step, self._engine.run(step, prompts, asked_s=asked_s), asked_s, now_s)

    def release(self, request_ids: Iterable[int]) -> None:
        self._engine.release(request_ids)

    async def gone(self) -> str:
        assert self._lost is not None, "load comes first"
        by_itself = asyncio.ensure_future(self._engine.gone())
        try:
            await asyncio.wait((by_itself, self._lost), return_when=asyncio.FIRST_COMPLETED)
            return self._lost.result() if self._lost.done() else by_itself.result()
        finally:
            by_itself.cancel()

    def notes(self) -> list[str]:
        return [*self._engine.notes(), *self._script.notes(self._clock.since_begun_s())]

    async def close(self) -> None:
        self._forget_crash()
        await self._engine.close()

    # --- what happens to it ---------------------------------------------------------------------------------------

    async def _run(
        self, step: RunStep, running: Awaitable[Mapping[int, Output]], asked_s: float, now_s: float
    ) -> Mapping[int, Output]:
        assert self._lost is not None, "load comes first"
        task = asyncio.ensure_future(running)
        try:
            await asyncio.wait((task, self._lost), return_when=asyncio.FIRST_COMPLETED)
            if not self._is_lost():
                outputs = task.result()
                self.late_s = self._engine.late_s
                rest_s = (time.monotonic() - asked_s) * (self._script.slow_factor(now_s) - 1.0)
                if rest_s > 0.0:
                    await asyncio.wait((self._lost,), timeout=rest_s)
            if self._is_lost():
                raise EngineLost(self._lost.result())
        finally:
            task.cancel()
        firsts = [p.request_id for p in step.prefills if p.last]
        bad = self._script.not_numbers(firsts, now_s)
        return {**outputs, **{i: Output("", error=NAN_OUTPUT) for i in bad}} if bad else outputs

    async def _hang(self, back_after_s: float) -> Mapping[int, Output]:
        assert self._lost is not None, "load comes first"
        await asyncio.wait((self._lost,), timeout=self._step_timeout_s)
        if not self._is_lost():
            self._script.lost_to_hang(self._clock.since_begun_s(), back_after_s)
            self._lose(f"a step did not end within {self._step_timeout_s:g} s")
        return await self._never()

    async def _out_of_memory(self, carried: int) -> Mapping[int, Output]:
        raise OutOfMemory(f"injected: no memory for a step of {carried}")

    async def _never(self) -> Mapping[int, Output]:
        raise EngineLost(self._lost.result() if self._lost is not None else "")

    async def _crash_after(self, seen_s: float) -> None:
        """Loses the engine at the first crash after `seen_s`."""
        for at_s in self._script.crashes_s:
            if at_s > seen_s:
                await self._clock.begun.wait()
                await asyncio.sleep(max(at_s - self._clock.since_begun_s(), 0.0))
                self._lose(CRASHED)
                return

    def _lose(self, why: str) -> None:
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(why)

    def _is_lost(self) -> bool:
        return self._lost is None or self._lost.done()

    def _forget_crash(self) -> None:
        if self._crash is not None:
            self._crash.cancel()
            self._crash = None

    def _look_like_it(self) -> None:
        self.description, self.provenance = self._engine.description, self._engine.provenance
        self.vocabulary_size = self._engine.vocabulary_size
