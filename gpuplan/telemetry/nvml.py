"""What NVML says: the only importer of `pynvml` (the package nvidia-ml-py).

`discover` lists the cards of this machine, empty without a driver; `NvmlCards.read` samples them. A reading that the
card or its mode does not support is None, never zero: on MIG, for instance, NVML has no utilisation of the card.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from gpuplan.hardware import catalog
from gpuplan.record.recorder import Sample

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Card:
    """A card that is really there. `known_as` is its name in the catalogue, or None."""

    index: int
    product: str
    uuid: str
    memory_bytes: int
    mig_enabled: bool | None
    known_as: str | None


def discover() -> list[Card]:
    """The cards of this machine; empty when there is no NVIDIA driver."""
    with _Library() as nvml:
        return [_describe(nvml, i, handle) for i, handle in _handles(nvml)]


def auto_gpu() -> str | None:
    """The catalogue's name of this machine's first card: what `deployment.gpu: auto` stands for."""
    return next((card.known_as for card in discover() if card.known_as), None)


class NvmlCards:
    """Samples every card of this machine. Use as a context manager; `read` gives one row a card."""

    def __init__(self) -> None:
        self._library = _Library()
        self._handles: list[tuple[int, Any]] = []
        self._first_mj: dict[int, int] = {}

    def __enter__(self) -> NvmlCards:
        nvml = self._library.__enter__()
        self._handles = _handles(nvml)
        return self

    def __exit__(self, *_: object) -> None:
        self._library.__exit__()

    def read(self, now_s: float) -> list[Sample]:
        """One row for each card; a card that was lost gives rows without readings."""
        nvml = self._library.module
        samples = []
        for i, handle in self._handles:
            usage = _ask(nvml.nvmlDeviceGetUtilizationRates, handle)
            memory = _ask(nvml.nvmlDeviceGetMemoryInfo, handle)
            milliwatts = _ask(nvml.nvmlDeviceGetPowerUsage, handle)
            millijoules = _ask(nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
            if millijoules is not None:
                millijoules -= self._first_mj.setdefault(i, millijoules)
            samples.append(
                Sample(
                    now_s,
                    "nvml",
                    f"gpu{i}",
                    None,
                    usage.gpu / 100 if usage is not None else None,
                    float(memory.used) if memory is not None else None,
                    float(memory.total) if memory is not None else None,
                    milliwatts / 1e3 if milliwatts is not None else None,
                    millijoules / 1e3 if millijoules is not None else None,
                )
            )
        return samples


class _Library:
    """NVML, initialised and shut down. Entering gives the module, or None where it cannot be used."""

    def __init__(self) -> None:
        self.module: Any = None

    def __enter__(self) -> Any:
        import pynvml

        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:  # no driver, no permission, no library: all mean 'no cards to read'
            return None
        self.module = pynvml
        return pynvml

    def __exit__(self, *_: object) -> None:
        if self.module is not None:
            _ask(self.module.nvmlShutdown)


def _ask(query: Callable[..., T], *arguments: Any) -> T | None:
    """NVML's answer, or None when the card does not support the question or is gone."""
    import pynvml

    try:
        return query(*arguments)
    except pynvml.NVMLError:
        return None


def _handles(nvml: Any) -> list[tuple[int, Any]]:
    """The cards that answer, by index: one that is lost between counting and asking is passed over."""
    if nvml is None:
        return []
    found = ((i, _ask(nvml.nvmlDeviceGetHandleByIndex, i)) for i in range(_ask(nvml.nvmlDeviceGetCount) or 0))
    return [(i, handle) for i, handle in found if handle is not None]


def _describe(nvml: Any, index: int, handle: Any) -> Card:
    product = str(_ask(nvml.nvmlDeviceGetName, handle) or "unknown card")
    memory = _ask(nvml.nvmlDeviceGetMemoryInfo, handle)
    memory_bytes = int(memory.total) if memory is not None else 0
    mode = _ask(nvml.nvmlDeviceGetMigMode, handle)
    known = catalog.from_nvml_name(product, memory_bytes)
    uuid = str(_ask(nvml.nvmlDeviceGetUUID, handle) or "")
    return Card(index, product, uuid, memory_bytes, bool(mode[0]) if mode else None, known.name if known else None)
