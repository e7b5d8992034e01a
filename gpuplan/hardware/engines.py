"""What a serving engine adds to the card's own time.

The roofline times a layer's products, its attention by the bytes and multiplications, and small kernels. An engine
adds what lies between steps, kernels that the roofline has no launch for, and, for each request, the way from the
client through HTTP and the tokenizer into the engine and back. `vllm` stands for vLLM's V1 engine with CUDA graphs and
asynchronous scheduling (the default since 0.14, January 2026), which hides most of its own work behind the card's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gpuplan.hardware import roofline
from gpuplan.hardware.catalog import Gpu
from gpuplan.hardware.shapes import ModelShape

EngineName = Literal["gpuplan", "vllm"]


@dataclass(frozen=True, slots=True)
class EngineTimes:
    """`step_s` between two steps, `launches` more of a layer's kernels, and `request_s` on the way in and out."""

    step_s: float
    launches: int
    request_s: float


TIMES: dict[EngineName, EngineTimes] = {
    "gpuplan": EngineTimes(roofline.STEP_OVERHEAD_S, 0, 0.0),
    # Two launches: attention over paged blocks, and the kernel that writes keys and values into them. The roofline
    # costs both by their bytes alone, and a decode's are few. Counted, not fitted: on 60 points of Llama-3.1-70B in
    # fp8 on H200, TPOT is 6.1 % off with them and 10.5 % without (`benchmarks/emulator_fidelity.py`). `request_s` is
    # what is left of measured TTFTs when the steps are taken off: 6 to 9 ms in three runs of inference-perf on H100s,
    # whose clock starts before HTTP; here is the mean (`benchmarks/real_engines.py` predicts each run from the others).
    "vllm": EngineTimes(roofline.STEP_OVERHEAD_S, 2, 7.4e-3),
}


def step_overhead_s(engine: EngineName, model: ModelShape, card: Gpu) -> float:
    """Seconds of a step that are not in the roofline's products, attention and small kernels."""
    times = TIMES[engine]
    launch_s = roofline.CONSTANTS.get(card.architecture, roofline.UNMEASURED).linear.launch_s
    return times.step_s + model.layers * times.launches * launch_s
