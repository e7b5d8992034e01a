"""The state of emulated cards, readable like a real one's: busy time, memory, power.

Follows a core's decisions (as the recorder does) and gives `Sample`s marked `emulated`. Utilisation is the share of
SM-seconds in which a step ran; memory is weights, runtime and KV cache in use; power rises in a straight line with
utilisation from idle to the card's limit, which is an assumption: real cards draw less on memory-bound work. What
nothing computes (memory utilisation, clocks, temperature, PCIe) is missing.
"""

from __future__ import annotations

from gpuplan.hardware import roofline
from gpuplan.hardware.profiles import Profile
from gpuplan.policy.vocabulary import Action, Event, ReplicaDown, RunStep, StepDone, StepFailed
from gpuplan.record.recorder import Sample
from gpuplan.scenario.deployment import Deployment, Replica, place_of, shape_of
from gpuplan.telemetry.source import Source


class EmulatedCards(Source):
    """All cards of a deployment. Give it every decision, then `read(now_s)` at any rate."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._meters = {r.id: _Meter(r, deployment) for r in deployment.every_replica() if r.slice.profile is not None}
        self._last_s: float | None = None
        self._energy_j = [0.0] * len(deployment.layouts)

    def decided(self, event: Event, actions: list[Action], *, now_s: float) -> None:
        """An event was handled at `now_s` and these actions came of it."""
        if isinstance(event, StepDone | StepFailed | ReplicaDown) and (
            meter := self._meters.get(place_of(event.replica_id))
        ):
            meter.stop(now_s, None if isinstance(event, ReplicaDown) else event.step_id)
        for action in actions:
            if isinstance(action, RunStep) and (meter := self._meters.get(place_of(action.replica_id))):
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
            held = self._read_slices(index, span_s, now_s)
            utilization = min(sum(busy * part.sm_count for _, part, busy, _ in held) / card.sm_count, 1.0)
            power_w = card.idle_power_w + (card.power_limit_w - card.idle_power_w) * utilization
            self._energy_j[index] += power_w * span_s
            name, memory = f"gpu{index}", float(sum(used for *_, used in held))
            whole = (utilization, memory, float(card.memory_bytes), power_w, self._energy_j[index])
            samples.append(Sample(now_s, "emulated", name, None, *whole))
            samples += [
                Sample(now_s, "emulated", name, slice_id, busy, float(used), float(part.memory_bytes))
                for slice_id, part, busy, used in held
            ]
        return samples

    def _read_slices(self, index: int, span_s: float, now_s: float) -> list[tuple[str, Profile, float, int]]:
        """Of every slice in use: its id and profile, the share of the time it was busy, and the bytes it held. Busy
        time is taken at every reading, the first included: what came before it belongs to no window."""
        held: dict[str, tuple[Profile, float, int]] = {}
        for meter in self._meters.values():
            part = meter.replica.slice
            if part.gpu_index == index and part.profile is not None:
                _, busy, used = held.get(part.id, (part.profile, 0.0, 0))
                busy_s = meter.take_busy_s(now_s)
                busy = min(busy + busy_s / span_s, 1.0) if span_s > 0 else 0.0
                held[part.id] = (part.profile, busy, used + meter.memory_bytes)
        return [(slice_id, *reading) for slice_id, reading in held.items()]


class _Meter:
    """How long one replica has been busy, and the memory it holds."""

    def __init__(self, replica: Replica, deployment: Deployment) -> None:
        self.replica = replica
        self._shape = shape_of(deployment.models[replica.model])
        self._step_id = 0
        self._started_s: float | None = None
        self._busy_s = 0.0
        self._ways, self._kept_bytes = replica.tensor_parallel, 0
        part, engine = replica.slice.profile, deployment.engine
        if part is not None and engine.block_size is not None and replica.role == "decoder":
            self._kept_bytes = int(engine.memory_utilization * part.memory_bytes)  # taken when it starts
        self.memory_bytes = self._used_bytes(0)

    def _used_bytes(self, kv_tokens: int) -> int:
        if self._kept_bytes or self._shape is None:
            return self._kept_bytes
        return roofline.memory_used_bytes(self._shape, kv_tokens, tensor_parallel=self._ways)

    def start(self, step: RunStep, now_s: float) -> None:
        self._step_id, self._started_s = step.step_id, now_s
        self.memory_bytes = self._used_bytes(step.load.kv_tokens)

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
