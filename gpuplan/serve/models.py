"""Which engine runs a replica.

`emulate` models run on the emulated engine, whatever the machine has. `builtin` and `onnx` models run on ONNX
Runtime, in a worker process each unless the deployment says otherwise: on the CPU where it names the CPU, on CUDA where
it names a card and this machine has it, each on its own slice. Where the card or the slice is not here, it is emulated:
a built-in then answers for real at the emulated card's speed; an ONNX file has no shape to emulate it by, and is
refused unless the CPU is allowed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from gpuplan.errors import InputError
from gpuplan.hardware import mig
from gpuplan.policy.cost import costs_of
from gpuplan.scenario.demand import ModelSource
from gpuplan.scenario.deployment import Deployment, Replica, shape_of, window_of
from gpuplan.serve import model_files
from gpuplan.serve.engines import Engine, Runner
from gpuplan.serve.engines.emulated import EmulatedEngine
from gpuplan.serve.engines.session import CPU_PROVIDER, CUDA_PROVIDER, EngineSpec
from gpuplan.serve.worker import WorkerProcess, WorkerThread
from gpuplan.telemetry.nvml import Card


def engine_for(
    replica: Replica,
    deployment: Deployment,
    *,
    cards: Sequence[Card] = (),
    allow_cpu: bool = False,
    source: ModelSource | None = None,
) -> Engine:
    """The engine of a replica, not yet loaded; with `source`, of another version of its model. `cards` are those in
    this machine. Raises InputError when the deployment's card is not here and the model can neither be emulated nor is
    allowed on the CPU, and for a model's files that are missing."""
    source = source or deployment.models[replica.model]
    card, part = deployment.gpu, replica.slice.profile
    shape = shape_of(source)
    if source.profiled is not None:
        raise InputError(
            "only its times are known", key=f"models.{replica.model}.profiled", allowed="gpuplan simulate, gpuplan plan"
        )
    if card is None or part is None:
        return _worker(replica, deployment, _spec(source, replica, deployment))
    if source.emulated and shape:
        return EmulatedEngine(
            shape, card, part, processes=replica.processes, costs=costs_of(shape, deployment, replica)
        )
    device = _device(replica, deployment, cards)
    if device is not None:
        spec = _spec(source, replica, deployment, provider=CUDA_PROVIDER, device=device)
        return _worker(replica, deployment, spec)
    if allow_cpu:
        return _worker(replica, deployment, _spec(source, replica, deployment))
    if source.builtin and shape:
        answers = WorkerThread(_spec(source, replica, deployment))
        return EmulatedEngine(shape, card, part, answers, processes=replica.processes)
    here = (
        f"there is no {card.name} in this machine" if not _known(deployment, cards) else f"no {part.name} is cut here"
    )
    raise InputError(
        f"{here}, and an ONNX file cannot be emulated",
        key=f"models.{replica.model}.onnx",
        allowed="deployment.gpu: cpu, or --allow-cpu",
    )


def runner(spec: EngineSpec) -> Runner:
    """What runs a spec's steps, not yet loaded. Raises InputError for files that are not there."""
    if spec.role == "decoder":
        from gpuplan.serve.engines.generation import GenerationEngine

        return GenerationEngine(spec)
    from gpuplan.serve.engines.single_step import SingleStepEngine

    return SingleStepEngine(spec)


def _worker(replica: Replica, deployment: Deployment, spec: EngineSpec) -> Engine:
    if replica.worker == "thread":
        return WorkerThread(spec)
    return WorkerProcess(spec, step_timeout_s=deployment.batching[replica.model].step_timeout)


def _spec(
    source: ModelSource,
    replica: Replica,
    deployment: Deployment,
    *,
    provider: str = CPU_PROVIDER,
    device: str | None = None,
) -> EngineSpec:
    part = replica.slice.profile
    on_cpu = provider == CPU_PROVIDER
    return EngineSpec(
        source=source.onnx if source.onnx is not None else f"{model_files.BUILTIN}{source.builtin}",
        role=replica.role,
        provider=provider,
        threads=_threads(replica, deployment) if on_cpu else 1,
        memory_bytes_max=None if on_cpu or part is None else part.memory_bytes // replica.processes,
        max_batch_size=deployment.batching[replica.model].max_batch_size,
        tokens_max=window_of(source),
        device=device,
        cores=_cores(replica, deployment) if on_cpu else (),
    )


def _threads(replica: Replica, deployment: Deployment) -> int:
    """How many cores a replica computes with: an equal share of them, unless the deployment says."""
    return replica.threads or max(len(_usable_cores()) // len(deployment.replicas), 1)


def _cores(replica: Replica, deployment: Deployment) -> tuple[int, ...]:
    """The cores that a replica alone computes on, where there are several replicas and cores enough. One replica goes
    where the scheduler puts it: bound to a core, it would wait there for whoever else is given it."""
    usable = _usable_cores()
    counts = [_threads(other, deployment) for other in deployment.replicas]
    if len(counts) == 1 or sum(counts) > len(usable):
        return ()
    first = sum(counts[: deployment.replicas.index(replica)])
    return tuple(usable[first : first + _threads(replica, deployment)])


def _usable_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _known(deployment: Deployment, cards: Sequence[Card]) -> bool:
    return any(card.known_as == deployment.gpu_name for card in cards)


def _device(replica: Replica, deployment: Deployment, cards: Sequence[Card]) -> str | None:
    """What `CUDA_VISIBLE_DEVICES` must say for the replica's slice, or None where this machine does not have it."""
    part = replica.slice
    fitting = [card for card in cards if card.known_as == deployment.gpu_name]
    if part.profile is None or part.gpu_index >= len(fitting):
        return None
    card = fitting[part.gpu_index]
    if part.profile.name == mig.WHOLE:
        return None if card.mig_enabled else card.uuid
    alike = [i for i in card.instances if i.profile is not None and i.profile.name == part.profile.name]
    placed = next((i for i in alike if i.start == part.start), None)
    if placed is None:  # the driver tells places to administrators only: then the first of that kind is the first cut
        ours = [s for s in deployment.slices if s.gpu_index == part.gpu_index and s.profile == part.profile]
        unplaced = [i for i in alike if i.start is None]
        at = ours.index(part)
        placed = unplaced[at] if at < len(unplaced) else None
    return placed.uuid if placed else None
