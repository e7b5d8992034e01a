"""Faults injected into a simulation: what `serve.faults` does to a live server, on virtual time.

`Injection` is asked about every step that begins, and holds the events that no step brings: replicas that go down and
come back. Whoever drives the core feeds them to it at their time, before anything else of that instant, and drops the
step that runs on a replica which goes down.
"""

from __future__ import annotations

import heapq
import itertools
from typing import Literal

import msgspec

from gpuplan.policy.vocabulary import OUT_OF_MEMORY, ReplicaDown, ReplicaUp, RunStep, StepDone, StepFailed
from gpuplan.scenario.deployment import Deployment
from gpuplan.scenario.faults import NEVER
from gpuplan.scenario.script import CRASHED, NAN_OUTPUT, Script, never_back

_What = Literal["crash", "hang", "up", "given up"]
RESTART_S = 0.1
"""A lost replica is not loaded before this: the first pause of a live server's fleet."""


class Injection:
    """The faults of one simulation."""

    def __init__(self, deployment: Deployment) -> None:
        self._models = {r.id: r.model for r in deployment.replicas}
        self._timeouts_s = {name: rule.step_timeout for name, rule in deployment.batching.items()}
        hit = dict.fromkeys(fault.replica_id for fault in deployment.faults)
        self._scripts = {replica_id: Script(replica_id, deployment.faults) for replica_id in hit}
        self._began_s = 0.0
        self._down: set[str] = set()
        self._hung: dict[str, float] = {}  # after how long those whose step never ends may be back
        self._due: list[tuple[float, int, str, _What]] = []
        self._numbers = itertools.count()

    @property
    def next_s(self) -> float:
        """When the next event is due; infinity where there is none."""
        return self._due[0][0] if self._due else NEVER

    def begin(self, now_s: float) -> None:
        """The first request arrives: all times count from here."""
        self._began_s = now_s
        for replica_id, script in self._scripts.items():
            for at_s in script.crashes_s:
                self._at(now_s + at_s, replica_id, "crash")

    def befall(
        self, step: RunStep, event: StepDone | StepFailed, seconds: float, now_s: float
    ) -> tuple[StepDone | StepFailed | None, float]:
        """How a step ends that begins now, and after how long, when it would end so; None for one that never does."""
        script = self._scripts.get(step.replica_id)
        if script is None:
            return event, seconds
        since_s = now_s - self._began_s
        if (back_after_s := script.hang(since_s)) is not None:
            self._hung[step.replica_id] = back_after_s
            self._at(now_s + self._timeout_s(step.replica_id), step.replica_id, "hang")
            return None, 0.0
        if type(event) is not StepDone:
            return event, seconds
        if script.out_of_memory(len(step.prefills) + len(step.decodes), since_s):
            return StepFailed(step.replica_id, step.step_id, OUT_OF_MEMORY), 0.0
        bad = script.not_numbers([p.request_id for p in step.prefills if p.last], since_s)
        if bad:
            event = msgspec.structs.replace(event, failed=tuple((i, NAN_OUTPUT) for i in bad))
        return event, seconds * script.slow_factor(since_s)

    def befalls(self, replica_id: str) -> bool:
        """Whether anything ever happens to this replica."""
        return replica_id in self._scripts

    def pop(self) -> ReplicaDown | ReplicaUp | None:
        """The event that is due at `next_s`; None when nothing comes of it any more."""
        now_s, _, replica_id, what = heapq.heappop(self._due)
        script, why = self._scripts[replica_id], CRASHED
        if what == "up":
            self._down.discard(replica_id)
            return ReplicaUp(replica_id)
        if what == "given up":
            return ReplicaDown(replica_id, never_back(replica_id))
        if replica_id in self._down:
            return None  # when it will be back was reckoned with this crash
        back_after_s = self._hung.pop(replica_id, None)
        if what == "hang" and back_after_s is not None:
            script.lost_to_hang(now_s - self._began_s, back_after_s)
            why = f"a step did not end within {self._timeout_s(replica_id):g} s"
        elif back_after_s is not None:  # it crashes while it hangs: nobody is left to notice that
            self._due = [due for due in self._due if due[2:] != (replica_id, "hang")]
            heapq.heapify(self._due)
        self._down.add(replica_id)
        # As live: whoever waits learns that it never comes back when the first try to load it has failed.
        tried_s = now_s + RESTART_S
        back_s = self._began_s + script.back_s(tried_s - self._began_s)
        if back_s < NEVER:
            self._at(back_s, replica_id, "up")
        else:
            self._at(tried_s, replica_id, "given up")
        return ReplicaDown(replica_id, why, returns=True)

    def notes(self, now_s: float) -> list[str]:
        """What has been injected until now."""
        since_s = now_s - self._began_s
        return [f"{name}: {note}" for name, script in self._scripts.items() for note in script.notes(since_s)]

    def _at(self, time_s: float, replica_id: str, what: _What) -> None:
        heapq.heappush(self._due, (time_s, next(self._numbers), replica_id, what))

    def _timeout_s(self, replica_id: str) -> float:
        return self._timeouts_s[self._models[replica_id]]
