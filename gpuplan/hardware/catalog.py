"""The GPUs gpuplan knows by data sheet.

Takes a name, gives a `Gpu`. FLOP/s are of the tensor cores, dense (without sparsity); memory is what the card is sold
with, of which a driver reports 0 to 6 % less (inline ECC of GDDR6). `price_per_hour` is a list price per card on
demand, in US dollars, to rank plans by; a scenario's `price_per_hour` always wins. A figure that no data sheet or
listing confirmed is named in `assumed`. `idle_power_w` is always among them: it is on no data sheet.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpuplan.errors import unknown_name
from gpuplan.hardware.profiles import GIB as GIB
from gpuplan.hardware.profiles import MIB, PROFILES, Profile

WORDS = {
    "bandwidth_bytes_per_s": "bandwidth",
    "flops": "FLOP/s",
    "idle_power_w": "idle power",
    "l2_bytes": "L2",
    "power_limit_w": "power limit",
    "price_per_hour": "price",
    "sm_clock_hz": "clock",
    "sm_count": "SMs",
    "engines": "engines",
    "memory_bytes": "memory",
    "starts": "places",
}
"""Fields of cards and profiles, as people call them."""


@dataclass(frozen=True, slots=True)
class Flops:
    """Dense operations per second on tensor cores, by the precision of the operands; None: no such units.

    `fp32` is TF32, `fp16` also bf16. All accumulate in 32 bits.
    """

    fp32: float | None
    fp16: float
    fp8: float | None
    int8: float
    fp4: float | None = None

    def at(self, element_bytes: float) -> float:
        """The rate for weights of this size; weights that no unit multiplies are widened to fp16 first."""
        if element_bytes > 2:
            return self.fp32 or self.fp16 / 8  # without TF32: what a T4's plain fp32 units do
        if element_bytes > 1:
            return self.fp16
        return (self.fp4 if element_bytes <= 0.5 else None) or self.fp8 or self.fp16


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card. `architecture` selects the roofline's constants; `sm_clock_hz` is the highest clock of its SMs."""

    name: str
    architecture: str
    memory_bytes: int
    bandwidth_bytes_per_s: float
    flops: Flops
    sm_count: int
    sm_clock_hz: float
    l2_bytes: int
    power_limit_w: float
    idle_power_w: float
    link_bytes_per_s: float
    """What it can exchange with its peers, both directions together: NVLink to all of an SXM board or to the other end
    of a PCIe card's bridge, else PCIe."""
    price_per_hour: float
    price_source: str
    profiles: tuple[Profile, ...] = ()
    """What MIG can cut it into; empty for a card without MIG."""
    assumed: frozenset[str] = frozenset()


PCIE_GB_PER_S = 64
"""Sixteen lanes of PCIe 4, both directions. Cards with PCIe 5 have twice that, at best: hosts often give less."""


# Prices were recalled from the providers' lists of about 2025-01 and not read again: per hour and machine, by the cards
# in it. A card that neither list rents alone takes a neighbour's.
_AZURE_A100 = "Azure NC24ads A100 v4 list price, about 2025-01, recalled and not re-checked"
_AZURE_H100 = "Azure NC40ads H100 v5 list price, about 2025-01, recalled and not re-checked"
_GCP = "Google Cloud accelerator list price, about 2025-01, recalled and not re-checked"
_GCP_L4 = "Google Cloud g2-standard-4 list price, about 2025-01, recalled and not re-checked"
_ANALOGY = "by analogy with its neighbours, about 2025-01, not re-checked"


def _card(
    name: str,
    architecture: str,
    memory_gib: int,
    gb_per_s: float,
    tflops: tuple[float | None, float, float | None, float, float | None],
    sms: tuple[int, float],
    l2_mib: int,
    watts: tuple[float, float],
    price: tuple[float, str],
    *,
    link: float = PCIE_GB_PER_S,
    mig: str = "",
    assumed: str = "",
) -> Gpu:
    """Units as on data sheets: `tflops` of fp32, fp16, fp8, int8, fp4; `sms` and their MHz; `watts` at most and idle;
    `link` in GB/s.

    `mig` names the card whose profiles these are, where it is another.
    """
    fp32, fp16, fp8, int8, fp4 = (None if t is None else t * 1e12 for t in tflops)
    assert fp16 is not None and int8 is not None
    guessed = {"idle_power_w", *assumed.split(), *(["price_per_hour"] if price[1] is _ANALOGY else [])}
    return Gpu(
        name=name,
        architecture=architecture,
        memory_bytes=memory_gib * GIB,
        bandwidth_bytes_per_s=gb_per_s * 1e9,
        flops=Flops(fp32, fp16, fp8, int8, fp4),
        sm_count=sms[0],
        sm_clock_hz=sms[1] * 1e6,
        l2_bytes=l2_mib * MIB,
        power_limit_w=watts[0],
        idle_power_w=watts[1],
        link_bytes_per_s=link * 1e9,
        price_per_hour=price[0],
        price_source=price[1],
        profiles=PROFILES.get(mig or name, ()),
        assumed=frozenset(guessed),
    )


_A100 = (156, 312, None, 624, None)
_H100 = (494, 989, 1979, 1979, None)  # rated at 1830 MHz: tensor cores run below the 1980 of the other units

# fmt: off
_CARDS = (
    _card("a30", "ampere", 24, 933, (82, 165, None, 330, None), (56, 1440), 24, (165, 30), (1.10, _ANALOGY), link=200),
    _card("a100-40gb", "ampere", 40, 1555, _A100, (108, 1410), 40, (400, 55), (2.93, _GCP), link=600),
    _card("a100-40gb-pcie", "ampere", 40, 1555, _A100, (108, 1410), 40, (250, 45), (2.93, _ANALOGY), link=600,
          mig="a100-40gb"),
    _card("a100-80gb", "ampere", 80, 2039, _A100, (108, 1410), 40, (400, 60), (3.67, _ANALOGY), link=600),
    _card("a100-80gb-pcie", "ampere", 80, 1935, _A100, (108, 1410), 40, (300, 50), (3.67, _AZURE_A100), link=600,
          mig="a100-80gb"),
    _card("h100-80gb", "hopper", 80, 3350, _H100, (132, 1980), 50, (700, 70), (6.98, _ANALOGY), link=900),
    _card("h100-80gb-pcie", "hopper", 80, 2000, (378, 756, 1513, 1513, None), (114, 1755), 50, (350, 50),
          (6.98, _ANALOGY), link=600),
    _card("h100-nvl-94gb", "hopper", 94, 3938, (417.5, 835, 1671, 1671, None), (132, 1785), 60, (400, 60),
          (6.98, _AZURE_H100), link=600, assumed="flops sm_clock_hz l2_bytes"),
    # The data sheet's 450 to 1000 W are for the CPU beside it, too.
    _card("gh200-96gb", "hopper", 96, 4000, _H100, (132, 1980), 60, (900, 90), (6.98, _ANALOGY), link=900,
          assumed="power_limit_w l2_bytes"),
    _card("h200-141gb", "hopper", 141, 4800, _H100, (132, 1980), 60, (700, 75), (8.00, _ANALOGY), link=900,
          assumed="l2_bytes"),
    # 7.7 TB/s: a real card's bus is 7680 bits wide at 3996 MHz; older sheets say 8. Its 148 SMs and L2 were seen, too.
    _card("b200-180gb", "blackwell", 180, 7700, (1100, 2250, 4500, 4500, 9000), (148, 1965), 126, (1000, 140),
          (10.00, _ANALOGY), link=1800, assumed="sm_clock_hz"),
    _card("gb200-186gb", "blackwell", 186, 8000, (1250, 2500, 5000, 5000, 10000), (152, 2062), 126, (1200, 150),
          (12.00, _ANALOGY), link=1800, assumed="sm_count sm_clock_hz l2_bytes"),
    # The Server Edition. FLOP/s are the Workstation Edition's, which is rated 5 % above it.
    _card("rtx-pro-6000-blackwell", "blackwell-gb202", 96, 1597, (252, 504, 1008, 1008, 2015), (188, 2617), 128,
          (600, 35), (3.00, _ANALOGY), assumed="bandwidth_bytes_per_s flops sm_clock_hz"),
    _card("l4", "ada", 24, 300, (60, 121, 242, 242, None), (58, 2040), 48, (72, 16), (0.71, _GCP_L4)),
    _card("l40s", "ada", 48, 864, (183, 362, 733, 733, None), (142, 2520), 96, (350, 35), (1.80, _ANALOGY)),
    # Made for one provider: no data sheet of it could be read.
    _card("a10g", "ampere-ga102", 24, 600, (35, 70, None, 140, None), (80, 1710), 6, (300, 25), (1.00, _ANALOGY),
          assumed="flops sm_clock_hz power_limit_w"),
    _card("a40", "ampere-ga102", 48, 696, (74.8, 149.7, None, 299.3, None), (84, 1740), 6, (300, 30),
          (1.30, _ANALOGY), link=112.5),
    _card("t4", "turing", 16, 320, (None, 65, None, 130, None), (40, 1590), 4, (70, 10), (0.35, _GCP)),
)
# fmt: on

GPUS: dict[str, Gpu] = {card.name: card for card in _CARDS}

# What users write for the same card. NVML's product names are matched by `from_nvml_name`.
ALIASES = {
    "a100": "a100-80gb",
    "a100-sxm4-80gb": "a100-80gb",
    "a100-80gb-sxm": "a100-80gb",
    "a100-sxm4-40gb": "a100-40gb",
    "a100-40gb-sxm": "a100-40gb",
    "a100-pcie": "a100-80gb-pcie",
    "a100-pcie-80gb": "a100-80gb-pcie",
    "a100-pcie-40gb": "a100-40gb-pcie",
    "h100": "h100-80gb",
    "h100-sxm": "h100-80gb",
    "h100-sxm5": "h100-80gb",
    "h100-80gb-sxm": "h100-80gb",
    "h100-80gb-hbm3": "h100-80gb",
    "h100-pcie": "h100-80gb-pcie",
    "h100-nvl": "h100-nvl-94gb",
    "h100-94gb-nvl": "h100-nvl-94gb",
    "gh200": "gh200-96gb",
    "h200": "h200-141gb",
    "h200-sxm": "h200-141gb",
    "b200": "b200-180gb",
    "gb200": "gb200-186gb",
    "rtx-pro-6000": "rtx-pro-6000-blackwell",
    "rtx-pro-6000-blackwell-server-edition": "rtx-pro-6000-blackwell",
}


def gpu(name: str, *, key: str = "deployment.gpu") -> Gpu:
    """The card of that name or alias. Raises InputError with the nearest known names."""
    wanted = name.lower()
    found = GPUS.get(ALIASES.get(wanted, wanted))
    if found is None:
        others = ("cpu", "auto") if key == "deployment.gpu" else ()
        raise unknown_name("GPU", name, [*GPUS, *others], key=key)
    return found


MEMORY_TOLERANCE = 0.1
"""NVML's total is up to 6 % under what a card is sold with; the next size of any chip is further off than this."""


def from_nvml_name(product: str, memory_bytes: int) -> Gpu | None:
    """The catalogue's card for an NVML product name such as 'NVIDIA A100-SXM4-80GB', or None.

    A card matches when the product holds every word of its name but the memory's ('NVIDIA H100 PCIe': h100, pcie). The
    most words win, then the nearest memory, which must be near; 0 bytes is a total that could not be read.
    """
    words = set(product.lower().replace("-", " ").split())
    matches = [(card, named) for card in GPUS.values() if (named := _words(card.name)) <= words]
    most = max((len(named) for _, named in matches), default=0)
    candidates = [card for card, named in matches if len(named) == most]
    if not memory_bytes:
        return candidates[0] if len(candidates) == 1 else None
    near = [c for c in candidates if abs(c.memory_bytes - memory_bytes) <= MEMORY_TOLERANCE * c.memory_bytes]
    return min(near, key=lambda card: abs(card.memory_bytes - memory_bytes), default=None)


def _words(name: str) -> set[str]:
    return {word for word in name.split("-") if not word.endswith("gb")}
