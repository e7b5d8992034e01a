"""Which engine runs a replica.

`emulate` models run on the emulated engine, whatever the machine has. `builtin` and `onnx` models run on ONNX
Runtime: on the CPU where the deployment names the CPU, on CUDA where it names a card and this machine has one. Where
the card named is not here, it is emulated: a built-in then answers for real at the emulated card's speed; an ONNX
file has no shape to emulate it by, and is refused unless the CPU is allowed.
"""

from __future__ import annotations

import os

from gpuplan.errors import InputError
from gpuplan.hardware import mig
from gpuplan.hardware.catalog import Gpu
from gpuplan.hardware.profiles import Profile
from gpuplan.scenario.demand import ModelSource
from gpuplan.scenario.deployment import Deployment, Replica, shape_of
from gpuplan.serve import model_files
from gpuplan.serve.engines import Engine
from gpuplan.serve.engines.emulated import EmulatedEngine
from gpuplan.serve.engines.session import CPU_PROVIDER, CUDA_PROVIDER, EngineSpec
from gpuplan.serve.engines.single_step import SingleStepEngine


def engine_for(replica: Replica, deployment: Deployment, *, card_present: bool, allow_cpu: bool = False) -> Engine:
    """The engine of a replica, not yet loaded. Raises InputError when the deployment's card is not here and the model
    can neither be emulated nor is allowed on the CPU."""
    source, shape = deployment.models[replica.model], shape_of(deployment.models[replica.model])
    card, part = deployment.gpu, replica.slice.profile
    if card is None or part is None:
        return _onnx(source, replica, provider=CPU_PROVIDER, threads=_threads_each(deployment))
    if source.emulated and shape:
        return EmulatedEngine(shape, card, part, processes=replica.processes)
    if card_present and part.name == mig.WHOLE:
        return _onnx(source, replica, provider=CUDA_PROVIDER, threads=1, memory_bytes_max=part.memory_bytes)
    if allow_cpu:
        return _onnx(source, replica, provider=CPU_PROVIDER, threads=_threads_each(deployment))
    if source.builtin and shape:
        return _answering(source, replica, card, part)
    missing = f"there is no {card.name} in this machine"
    reason = "engines do not run on single MIG slices yet" if card_present else missing
    raise InputError(
        f"{reason}, and an ONNX file cannot be emulated",
        key=f"models.{replica.model}.onnx",
        allowed="deployment.gpu: cpu, or --allow-cpu",
    )


def _answering(source: ModelSource, replica: Replica, card: Gpu, part: Profile) -> Engine:
    shape = shape_of(source)
    assert shape is not None, "every built-in has a shape"
    answers = _onnx(source, replica, provider=CPU_PROVIDER, threads=1)
    return EmulatedEngine(shape, card, part, answers, processes=replica.processes)


def _onnx(
    source: ModelSource, replica: Replica, *, provider: str, threads: int, memory_bytes_max: int | None = None
) -> Engine:
    named = source.onnx if source.onnx is not None else f"{model_files.BUILTIN}{source.builtin}"
    return SingleStepEngine(
        EngineSpec(
            source=named, role=replica.role, provider=provider, threads=threads, memory_bytes_max=memory_bytes_max
        )
    )


def _threads_each(deployment: Deployment) -> int:
    """The host's cores shared out among the replicas, at least one for each."""
    return max((os.cpu_count() or 1) // len(deployment.replicas), 1)
