"""How far the time of a mixture's experts is from measured kernels, and a mixture's steps from measured ones.

The tables are what people published of vLLM's kernels that run all experts of a layer at once: choosing experts,
sorting tokens by them, two grouped products with the activation between them, adding up; microseconds by tokens, 16-bit
weights. vLLM's benchmark lets every token choose at random and evenly, as `hardware/experts.py` takes it to be. Nothing
was fitted on any of it. Left out are the points under 16 tokens of two tables: they hardly depend on the tokens (185 us
for 1 as for 4 on an H200, 183 us for 1 on an A100), so what they time is probably the host.

    python benchmarks/fused_experts.py
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from gpuplan.hardware import catalog, engines, matmul, mig, roofline, shapes
from gpuplan.hardware.roofline import StepCosts, StepLoad
from gpuplan.hardware.shapes import ModelShape


@dataclass(frozen=True)
class Kernels:
    """One table. `sizes`: experts, experts per token, hidden, and the part of an expert's FFN that is on the card."""

    name: str
    source: str
    gpu: str
    sizes: tuple[int, int, int, int]
    microseconds: dict[int, float]

    def costs(self) -> StepCosts:
        """Of a model of one layer with these experts."""
        experts, per_token, hidden, ffn = self.sizes
        layer = ModelShape(
            self.name,
            "decoder",
            1,
            hidden,
            16,
            16,
            ffn,
            True,
            32000,
            4096,
            experts=experts,
            experts_per_token=per_token,
        )
        card = catalog.gpu(self.gpu)
        return StepCosts(layer, card, mig.whole(card))

    def estimated_us(self, tokens: int) -> float:
        """The grouped products, and the kernels around them by their launches or their bytes."""
        card = catalog.gpu(self.gpu)
        _, per_token, hidden, ffn = self.sizes
        architecture = roofline.CONSTANTS.get(card.architecture, roofline.UNMEASURED)
        launches_s = (roofline.EXPERT_LAUNCHES + 1) * architecture.linear.launch_s
        moved_bytes = architecture.elementwise_passes * roofline.FP16_BYTES * tokens * per_token * (3 * ffn + hidden)
        p = matmul.STRUCTURE.sharpness
        around_s = (launches_s**p + (moved_bytes / card.bandwidth_bytes_per_s) ** p) ** (1 / p)
        return 1e6 * (self.costs().experts_layer_s(tokens) + around_s)

    def errors(self) -> Iterator[tuple[int, float, float]]:
        """Tokens, measured microseconds, and the estimate's relative error."""
        for tokens, measured in self.microseconds.items():
            yield tokens, measured, self.estimated_us(tokens) / measured - 1


# fmt: off
KERNELS = (
    Kernels("Mixtral-8x7B on 2 x H100, tuned", "vllm-project/vllm#24700", "h100-80gb", (8, 2, 4096, 7168),
            {1: 144.03, 2: 229.28, 4: 351.10, 8: 434.98, 16: 471.49, 24: 478.27, 32: 487.35, 48: 487.85, 64: 483.14,
             96: 494.42, 128: 491.39, 256: 536.77, 512: 662.33, 1024: 833.72, 1536: 1122.93}),
    Kernels("128 experts of 704 on H200, tuned", "vllm-project/vllm#44818", "h200-141gb", (128, 8, 2816, 704),
            {16: 264.1, 24: 314.4, 32: 324.9, 48: 365.5, 64: 384.1, 96: 390.3, 128: 396.4, 256: 419.6, 512: 442.3,
             1024: 528.4, 1536: 582.0, 2048: 728.2, 3072: 962.9, 4096: 1189.6}),
    Kernels("Qwen3-30B-A3B on A100-40GB PCIe, not tuned", "vllm-project/vllm#19049", "a100-40gb-pcie",
            (128, 8, 2048, 768),
            {1: 109.21, 2: 159.81, 4: 268.89, 8: 403.13, 16: 611.19, 24: 730.19, 32: 808.53, 48: 885.97, 64: 917.45,
             96: 943.14}),
    Kernels("64 experts of 1408 on A100-80GB, tuned", "vllm-project/vllm#40542", "a100-80gb", (64, 6, 2048, 1408),
            {16: 523.3, 64: 677.6, 256: 717.0, 1024: 929.9, 4096: 2636.6}),
    Kernels("Qwen3-30B-A3B on B200, not tuned", "vllm-project/vllm#31448", "b200-180gb", (128, 8, 2048, 768),
            {1: 39.61, 2: 51.87, 4: 73.18}),
)
# fmt: on


@dataclass(frozen=True)
class Served:
    """Milliseconds between tokens of so many sequences at once, by a whole engine."""

    name: str
    source: str
    model: str
    gpu: str
    sequences: int
    tpot_ms: dict[tuple[int, int], float]
    """By prompt and output tokens."""

    def errors(self) -> Iterator[float]:
        """Of a decode step at the mean context, with its share of the other sequences' prompts."""
        shape, card = shapes.shape(self.model), catalog.gpu(self.gpu)
        overhead_s = engines.step_overhead_s("vllm", shape, card)
        costs = StepCosts(shape, card, mig.whole(card), overhead_s=overhead_s)
        for (prompt, output), measured in self.tpot_ms.items():
            step_s = costs.step_s(StepLoad.of_decodes(self.sequences, prompt + output // 2))
            step_s += (self.sequences - 1) / output * costs.step_s(StepLoad.of_prompt(prompt))
            yield 1e3 * step_s / measured - 1


SERVED = (
    Served("Qwen3-30B-A3B on H100, vLLM of August 2025, not tuned", "vllm-project/vllm#23151", "qwen3-30b-a3b",
           "h100-80gb", 10, {(2048, 1024): 13.18}),
    Served("Qwen3-30B-A3B on A100, July 2025", "tenstorrent/tt-inference-server#340", "qwen3-30b-a3b", "a100-80gb", 1,
           {(128, 128): 9.6, (128, 1024): 9.7, (1024, 128): 9.8, (2048, 128): 9.9, (3072, 128): 10.1,
            (4096, 128): 10.3, (8192, 128): 10.6}),
)  # fmt: skip


def main() -> None:
    every = []
    for kernels in KERNELS:
        print(f"{kernels.name} ({kernels.source})")
        for tokens, measured, error in kernels.errors():
            every.append(abs(error))
            print(f"  {tokens:5} tokens {measured:8.1f} us, estimate {100 * error:+6.1f} %")
        print(f"  mean absolute error {100 * statistics.fmean(abs(e) for _, _, e in kernels.errors()):.1f} %")
    print(f"kernels, all {len(every)} points: {100 * statistics.fmean(every):.1f} %")
    runs = []
    for served in SERVED:
        runs.append(statistics.fmean(served.errors()))
        print(f"{served.name} ({served.source}): TPOT {100 * runs[-1]:+.1f} %")
    print(f"served, mean over {len(runs)} runs: {100 * statistics.fmean(map(abs, runs)):.1f} %")


if __name__ == "__main__":
    main()
