"""For other tools: a plan as files that they accept. One file a format, each a pure function from plan to text.

`lint` reads such files the other way round and says what will not work. Only `apply` touches a machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from gpuplan.export import (
    compose,
    gpu_operator,
    hpa,
    keda,
    kserve,
    mig_parted,
    nvidia_smi,
    ray_serve,
    triton,
    vllm,
)
from gpuplan.export.reading import Plan


class Format(NamedTuple):
    """`write` gives the text of `file_name`; raises InputError for a plan that has nothing to say in this format.

    Where `takes_metrics`, it also takes whose metrics are used. `files` gives what becomes several files, by path.
    """

    file_name: str
    write: Callable[..., str]
    takes_metrics: bool = False
    files: Callable[[Plan], dict[str, str]] | None = None


EXPORTS: dict[str, Format] = {
    "mig-parted": Format("mig-parted.yaml", mig_parted.write),
    "nvidia-smi": Format("nvidia-smi.sh", nvidia_smi.write),
    "gpu-operator": Format("gpu-operator.yaml", gpu_operator.write),
    "hpa": Format("hpa.yaml", hpa.write, takes_metrics=True),
    "keda": Format("keda.yaml", keda.write, takes_metrics=True),
    "triton": Format("model-repository", triton.write, files=triton.files),
    "vllm": Format("vllm.sh", vllm.write),
    "ray-serve": Format("ray-serve.yaml", ray_serve.write),
    "kserve": Format("kserve.yaml", kserve.write),
    "compose": Format("compose.yaml", compose.write),
}
