"""The GPUs gpuplan knows by data sheet.

Takes a name, gives a `Gpu`. Figures are dense (no sparsity), from NVIDIA's data sheets. `price_per_hour` is a list
price per card on demand, in US dollars, to rank plans by; a scenario's `price_per_hour` always wins.
`idle_power_w` is not on data sheets: an assumption from idle readings people publish.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpuplan.errors import unknown_name

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card. `flops_per_s` is fp16/bf16 on tensor cores; `architecture` selects the roofline's constants."""

    name: str
    architecture: str
    memory_bytes: int
    bandwidth_bytes_per_s: float
    flops_per_s: float
    sm_count: int
    power_limit_w: float
    idle_power_w: float
    price_per_hour: float
    price_source: str


# Azure's and Google's per-hour list prices divided by the cards in the machine, read 2025-01; cards those two do not
# rent singly are priced by analogy and say so.
_AZURE = "Azure NC A100 v4 / ND H100 v5 list price per card, 2025-01"
_GCP = "Google Cloud accelerator list price, us-central1, 2025-01"
_ANALOGY = "by analogy with its neighbours, 2025-01"

GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("a30", "ampere", 24 * GIB, 0.933e12, 165e12, 56, 165, 30, 1.10, _ANALOGY),
        Gpu("a100-40gb", "ampere", 40 * GIB, 1.555e12, 312e12, 108, 400, 55, 2.93, _GCP),
        Gpu("a100-80gb", "ampere", 80 * GIB, 2.039e12, 312e12, 108, 400, 60, 3.67, _AZURE),
        Gpu("h100-80gb", "hopper", 80 * GIB, 3.35e12, 989e12, 132, 700, 70, 6.98, _AZURE),
        Gpu("h200-141gb", "hopper", 141 * GIB, 4.8e12, 989e12, 132, 700, 75, 8.00, _ANALOGY),
        Gpu("l4", "ada", 24 * GIB, 0.30e12, 121e12, 58, 72, 16, 0.71, _GCP),
        Gpu("l40s", "ada", 48 * GIB, 0.864e12, 362e12, 142, 350, 35, 1.80, _ANALOGY),
        Gpu("t4", "turing", 16 * GIB, 0.32e12, 65e12, 40, 70, 10, 0.35, _GCP),
    )
}

# What users write for the same card. NVML's product names are matched by `from_nvml_name`.
ALIASES = {
    "a100": "a100-80gb",
    "a100-sxm4-80gb": "a100-80gb",
    "a100-80gb-sxm": "a100-80gb",
    "a100-sxm4-40gb": "a100-40gb",
    "h100": "h100-80gb",
    "h100-sxm": "h100-80gb",
    "h100-80gb-sxm": "h100-80gb",
    "h200": "h200-141gb",
}


def gpu(name: str, *, key: str = "deployment.gpu") -> Gpu:
    """The card of that name or alias. Raises InputError with the nearest known names."""
    wanted = name.lower()
    found = GPUS.get(ALIASES.get(wanted, wanted))
    if found is None:
        raise unknown_name("GPU", name, [*GPUS, "cpu", "auto"], key=key)
    return found


def from_nvml_name(product: str, memory_bytes: int) -> Gpu | None:
    """The catalogue's card for an NVML product name such as 'NVIDIA A100-SXM4-80GB', or None.

    Cards of one chip differ in memory, so among those whose chip is named the nearest memory size wins.
    """
    words = product.lower().replace("-", " ").split()
    matches = [card for card in GPUS.values() if card.name.split("-")[0] in words]
    return min(matches, key=lambda card: abs(card.memory_bytes - memory_bytes), default=None)
