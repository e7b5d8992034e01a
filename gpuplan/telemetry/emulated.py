"""The state of emulated cards, readable like a real one's: busy time, memory, power.

Follows a core's decisions (as the recorder does) and gives `Sample`s marked `emulated`. Utilisation is the share of
SM-seconds in which a step ran; memory is weights, runtime and KV cache in use; power rises in a straight line with
utilisation from idle to the card's limit, which is an assumption: real cards draw less on memory-bound work. What
nothing computes (memory utilisation, clocks, temperature, PCIe) is missing.
"""

from __future__ import annotations

from gpuplan.hardware import mig, roofline
from gpuplan.policy.vocabulary import Action, Event, ReplicaDown, RunStep, StepDone, StepFailed
from gpuplan.record.recorder import Sample
from gpuplan.scenario.deployment import Deployment, Replica, shape_of
from gpuplan.telemetry.source import Source


class EmulatedCards(Source):
    """All cards of a deployment. Give it every decision, then `read(now_s)` at any rate."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._meters = {r.id: _Meter(r, deployment) for r in deployment.replicas if r.slice.profile is not None}
        self._last_s: float | None = None
        self._energy_j = [0.0] * len(deployment.layouts)

    def decided(self, event: Event, actions: list[Action], *, now_s: float) -> None:
        """An event was handled at `now_s` and these actions came of it."""
        if isinstance(event, StepDone | StepFailed | ReplicaDown) and (meter := self._meters.get(event.replica_id)):
            meter.stop(now_s, None if isinstance(event, ReplicaDown) else event.step_id)
        for action in actions:
            if isinstance(action, RunStep) and (meter := self._meters.get(action.replica_id)):
                meter.start(action, now_s)

    def read(self, now_s: float) -> list[Sample]:
        """Readings since the last call: one row for each card and one for each slice in use."""
        card = self._deployment.gpu
        if card is None:
            return []
        since_s, self._last_s = self._last_s, now_s
        span_s = now_s - since_s if since_s is not None else 0.0
        samples: list[Sample] = []
        for index in range(len(self._deployment.layouts)):
            meters = [m for m in self._meters.values() if m.replica.slice.gpu_index == index]
            # Taken at every reading, the first included: what came before it belongs to no window.
            taken_s = {m.replica.id: m.take_busy_s(now_s) for m in meters}
            busy = {name: seconds / span_s if span_s > 0 else 0.0 for name, seconds in taken_s.items()}
            utilization = min(sum(busy[m.replica.id] * m.profile.sm_count for m in meters) / card.sm_count, 1.0)
            power_w = card.idle_power_w + (card.power_limit_w - card.idle_power_w) * utilization
            self._energy_j[index] += power_w * span_s
            name = f"gpu{index}"
            memory = float(sum(m.memory_bytes for m in meters))
            samples.append(
                Sample(
                    now_s,
                    "emulated",
                    name,
                    None,
                    utilization,
                    memory,
                    float(card.memory_bytes),
                    power_w,
                    self._energy_j[index],
                )
            )
            samples += [
                Sample(
                    now_s,
                    "emulated",
                    name,
                    m.replica.slice.id,
                    min(busy[m.replica.id], 1.0),
                    float(m.memory_bytes),
                    float(m.profile.memory_bytes),
                    None,
                    None,
                )
                for m in meters
            ]
        return samples


class _Meter:
    """How long one replica has been busy, and the memory it holds."""

    def __init__(self, replica: Replica, deployment: Deployment) -> None:
        assert replica.slice.profile is not None, "only slices of a card are metered"
        self.replica = replica
        self.profile: mig.Profile = replica.slice.profile
        self._shape = shape_of(deployment.models[replica.model])
        self._step_id = 0
        self._started_s: float | None = None
        self._busy_s = 0.0
        self.memory_bytes = roofline.memory_used_bytes(self._shape, 0) if self._shape else 0

    def start(self, step: RunStep, now_s: float) -> None:
        self._step_id, self._started_s = step.step_id, now_s
        if self._shape:
            load = step.load
            self.memory_bytes = roofline.memory_used_bytes(
                self._shape, load.context_tokens + load.decodes + load.prefill_tokens
            )

    def stop(self, now_s: float, step_id: int | None) -> None:
        """The step of that id is over, or (None) whatever runs; a late word of a lost step changes nothing."""
        if self._started_s is not None and step_id in (None, self._step_id):
            self._busy_s += now_s - self._started_s
            self._started_s = None

    def take_busy_s(self, now_s: float) -> float:
        """Busy seconds since the last call, the step that is running included."""
        busy_s = self._busy_s
        if self._started_s is not None and now_s > self._started_s:
            busy_s += now_s - self._started_s
            self._started_s = now_s
        self._busy_s = 0.0
        return busy_s
