"""What NVML says is there: the only importer of `pynvml` (the package nvidia-ml-py).

`survey` lists the cards of this machine with their MIG profiles and their current layout, and what could not be found
out; nothing here raises. A machine without a driver has no cards and no problem. `Library` and `Device` are the way to
NVML for whoever samples it: a question that a card does not support has the answer None, never zero.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from gpuplan.hardware import catalog
from gpuplan.hardware.profiles import Engines, Profile, parsed

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Instance:
    """A GPU instance that is there now, covering `width` memory cells from `start`.

    NVML tells the places to administrators only: `start` is None otherwise. `uuid` is the MIG device's, as
    CUDA_VISIBLE_DEVICES takes it; None where no compute instance was made in it.
    """

    profile: Profile | None
    start: int | None
    width: int | None
    gpu_instance_id: int
    uuid: str | None


@dataclass(frozen=True, slots=True)
class Card:
    """A card that is really there. `known_as` is its name in the catalogue, or None.

    `profiles` are what the driver says it can be cut into, `instances` what it is cut into now.
    """

    index: int
    product: str
    uuid: str
    memory_bytes: int
    mig_enabled: bool | None
    known_as: str | None
    driver: str | None = None
    profiles: tuple[Profile, ...] = ()
    instances: tuple[Instance, ...] = ()


def survey() -> tuple[list[Card], list[str]]:
    """The cards of this machine, and in a sentence each what NVML refused to say."""
    with Library() as library:
        if library.module is None:
            return [], [library.problem] if library.problem and not library.absent else []
        cards = [_describe(device) for device in library.devices()]
        return cards, library.faults.sentences()


def discover() -> list[Card]:
    """The cards of this machine; empty when there is no NVIDIA driver, or none that answers."""
    return survey()[0]


def cards_here() -> dict[str, tuple[Profile, ...]]:
    """The catalogue's names of this machine's cards, the first one first, and what each says it can be cut into."""
    found: dict[str, tuple[Profile, ...]] = {}
    for card in discover():
        if card.known_as:
            found.setdefault(card.known_as, card.profiles)
    return found


def processes() -> dict[int, list[int] | None]:
    """The ids of the processes on each card and its slices, by the card's index; None where the driver does not say."""
    found: dict[int, list[int] | None] = {}
    with Library() as library:
        for device in library.devices() if library.module is not None else ():
            try:
                found[device.index] = _on_card(device)
            except Lost:
                found[device.index] = None
    return found


class Library:
    """NVML, initialised while entered. `module` is None where it cannot be used, and `problem` says why."""

    def __init__(self) -> None:
        self.module: Any = None
        self.problem: str | None = None
        self.absent = False
        """There is no driver at all: nothing to complain about, most machines have none."""
        self.faults = Faults()

    def __enter__(self) -> Library:
        import pynvml

        try:
            pynvml.nvmlInit()
            self.module = pynvml
        except pynvml.NVMLError as error:
            self.absent = error.value in (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
            self.problem = (
                "there is no NVIDIA driver on this machine"
                if self.absent
                else f"the NVIDIA driver does not answer ({_reason(error)})"
            )
        return self

    def __exit__(self, *_: object) -> None:
        module, self.module = self.module, None
        if module is not None:
            with contextlib.suppress(module.NVMLError):
                module.nvmlShutdown()

    def devices(self) -> Iterator[Device]:
        """The cards that answer, by index: one that is lost between counting and asking is passed over, and said."""
        nvml = self.module
        asking = Device(nvml, None, "NVML", self.faults)
        try:
            count = asking.ask("number of cards", nvml.nvmlDeviceGetCount) or 0
        except Lost:
            return
        for index in range(count):
            device = Device(nvml, None, f"gpu{index}", self.faults, index=index)
            try:
                device.handle = device.ask("card", nvml.nvmlDeviceGetHandleByIndex, index)
            except Lost as lost:
                self.faults.add(f"a card does not answer ({lost})", device.name)
            if device.handle is not None:
                yield device


class Lost(Exception):
    """A card that answered before is gone."""


class Faults:
    """What went wrong and where. A fault that comes again, or on another card, adds no sentence."""

    def __init__(self) -> None:
        self._where: dict[str, list[str]] = {}

    def add(self, what: str, where: str) -> None:
        places = self._where.setdefault(what, [])
        if where not in places:
            places.append(where)

    def sentences(self) -> list[str]:
        return [f"{', '.join(places)}: {what}" for what, places in list(self._where.items())]


class Device:
    """A card or a slice to ask: what it does not support, or refuses, is not asked again."""

    def __init__(self, nvml: Any, handle: Any, name: str, faults: Faults, *, index: int = 0) -> None:
        self.nvml, self.handle, self.name, self.index = nvml, handle, name, index
        self.faults = faults
        self._error: type[Exception] = nvml.NVMLError
        self._closed: set[str] = set()

    def ask(self, what: str, query: Callable[..., T], *arguments: Any) -> T | None:
        """NVML's answer, or None. Raises Lost when the card is gone."""
        return None if what in self._closed else self.inquire(what, query, *arguments)

    def inquire(self, what: str, query: Callable[..., T], *arguments: Any) -> T | None:
        """As `ask`, but asks whatever was said before: for a question whose answer depends on its arguments."""
        try:
            return query(*arguments)
        except self._error as error:
            self._failed(what, error)
            return None

    def _failed(self, what: str, error: Any) -> None:
        nvml, code = self.nvml, error.value
        if code in (nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_FUNCTION_NOT_FOUND):
            self._closed.add(what)
        elif code in (
            nvml.NVML_ERROR_GPU_IS_LOST,
            nvml.NVML_ERROR_RESET_REQUIRED,
            nvml.NVML_ERROR_DRIVER_NOT_LOADED,
            nvml.NVML_ERROR_UNINITIALIZED,
        ):
            raise Lost(_reason(error)) from None
        elif code == nvml.NVML_ERROR_NO_PERMISSION:
            self._closed.add(what)
            self.faults.add(f"{what} may not be read: permission refused", self.name)
        else:
            self.faults.add(f"{what} could not be read ({_reason(error)})", self.name)


def _reason(error: Exception) -> str:
    return f"NVML says: {str(error).rstrip('.')}"


def process_ids(device: Device) -> list[int] | None:
    """The processes that compute on a card or a slice. Raises Lost."""
    found = device.ask("processes", device.nvml.nvmlDeviceGetComputeRunningProcesses_v3, device.handle)
    if found is None:  # its name before driver 510
        found = device.ask("processes (old)", device.nvml.nvmlDeviceGetComputeRunningProcesses_v2, device.handle)
    return None if found is None else [int(process.pid) for process in found]


def _on_card(device: Device) -> list[int] | None:
    """All that use the card: what computes on it or on a slice, and what draws, where the driver tells of drawing.
    Under MIG the slices are enough: of the whole card the driver tells administrators only."""
    nvml = device.nvml
    mode = device.ask("MIG mode", nvml.nvmlDeviceGetMigMode, device.handle)
    cut = bool(mode and mode[0])
    whole = process_ids(device)
    if whole is None and not cut:
        return None
    drawing = device.ask("graphics processes", nvml.nvmlDeviceGetGraphicsRunningProcesses_v3, device.handle) or []
    ids = [*(whole or []), *(int(process.pid) for process in drawing)]
    for number, handle in (mig_devices(device) if cut else {}).items():
        inside = process_ids(Device(nvml, handle, f"{device.name}/{number}", device.faults))
        if inside is None:
            return None
        ids += inside
    return sorted(set(ids))


def _describe(device: Device) -> Card:
    nvml, ask, handle = device.nvml, device.ask, device.handle
    try:
        product = str(ask("name", nvml.nvmlDeviceGetName, handle) or "unknown card")
        memory = ask("memory", nvml.nvmlDeviceGetMemoryInfo, handle)
        memory_bytes = int(memory.total) if memory is not None else 0
        mode = ask("MIG mode", nvml.nvmlDeviceGetMigMode, handle)
        known = catalog.from_nvml_name(product, memory_bytes)
        kinds = mig_profiles(device) if mode else {}
        return Card(
            device.index,
            product,
            str(ask("UUID", nvml.nvmlDeviceGetUUID, handle) or ""),
            memory_bytes,
            bool(mode[0]) if mode else None,
            known.name if known else None,
            ask("driver version", nvml.nvmlSystemGetDriverVersion),
            tuple(kinds.values()),
            instances(device, kinds) if mode and mode[0] else (),
        )
    except Lost as lost:
        device.faults.add(f"the card does not answer ({lost})", device.name)
        return Card(device.index, "unknown card", "", 0, None, None)


# --- MIG ----------------------------------------------------------------------------------------------------------


def mig_profiles(device: Device) -> dict[int, Profile]:
    """What the card can be cut into, by NVML's profile id: every profile that NVML has a number for and this card
    supports. Raises Lost."""
    nvml = device.nvml
    memory = device.ask("memory", nvml.nvmlDeviceGetMemoryInfo, device.handle)
    kinds = []
    for number in range(nvml.NVML_GPU_INSTANCE_PROFILE_COUNT):
        told = _profile_info(device, number)
        if told is not None and (places := _placements(device, told.id)):
            kinds.append((number, told, places))
    cells = max((start + size for _, _, places in kinds for start, size in places), default=0)
    card_bytes = int(memory.total) if memory is not None else 0
    return {told.id: _profile(number, told, places, cells, card_bytes) for number, told, places in kinds}


def mig_devices(device: Device) -> dict[int, Any]:
    """The handle of the first MIG device in each GPU instance, by the instance's id. Raises Lost."""
    nvml = device.nvml
    found: dict[int, Any] = {}
    for index in range(device.ask("MIG devices", nvml.nvmlDeviceGetMaxMigDeviceCount, device.handle) or 0):
        try:
            handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(device.handle, index)
        except nvml.NVMLError:  # most places are empty
            continue
        number = device.ask("GPU instance", nvml.nvmlDeviceGetGpuInstanceId, handle)
        if number is not None:
            found.setdefault(number, handle)
    return found


def instances(device: Device, kinds: dict[int, Profile]) -> tuple[Instance, ...]:
    """The card's current layout, by start. Without an administrator's rights only what its MIG devices show: which
    slices there are, and not where. Raises Lost."""
    nvml, ask = device.nvml, device.ask
    handles = mig_devices(device)

    def uuid(number: int) -> str | None:
        return ask("UUID", nvml.nvmlDeviceGetUUID, handles[number]) if number in handles else None

    found = {}
    for profile_id, kind in kinds.items():
        room = (nvml.c_nvmlGpuInstance_t * kind.count_max)()
        count = ctypes.c_uint(kind.count_max)
        wanted = (device.handle, profile_id, room, ctypes.byref(count))
        device.inquire("MIG layout", nvml.nvmlDeviceGetGpuInstances, *wanted)
        for instance in room[: count.value]:
            told = ask("MIG instance", nvml.nvmlGpuInstanceGetInfo, instance) if instance else None
            if told is not None:
                place = told.placement
                found[told.id] = Instance(kind, place.start, place.size, told.id, uuid(told.id))
    for number, handle in handles.items():
        if number not in found:
            name = str(ask("name", nvml.nvmlDeviceGetName, handle) or "")  # NVIDIA A100-SXM4-80GB MIG 1g.10gb
            named = next((kind for kind in kinds.values() if name.endswith(f"MIG {kind.name}")), None)
            found[number] = Instance(named, None, named.width if named else None, number, uuid(number))
    return tuple(
        sorted(found.values(), key=lambda i: (i.start if i.start is not None else math.inf, i.gpu_instance_id))
    )


def _profile_info(device: Device, number: int) -> Any:
    """The driver's figures of a profile, with their name where the driver is not too old; None if there is no such."""
    for version in (2, 1):
        with contextlib.suppress(device.nvml.NVMLError):  # not on this card, or newer than this driver
            return device.nvml.nvmlDeviceGetGpuInstanceProfileInfo(device.handle, number, version=version)
    return None


def _placements(device: Device, profile_id: int) -> list[tuple[int, int]]:
    nvml = device.nvml
    count = ctypes.c_uint(0)
    places = nvml.nvmlDeviceGetGpuInstancePossiblePlacements
    device.inquire("MIG placements", places, device.handle, profile_id, None, ctypes.byref(count))
    room = (nvml.c_nvmlGpuInstancePlacement_t * count.value)()
    if device.inquire("MIG placements", places, device.handle, profile_id, room, ctypes.byref(count)) is None:
        return []
    return sorted((place.start, place.size) for place in room[: count.value])


# How profiles of the same slices differ, for drivers that do not name them (NVML_GPU_INSTANCE_PROFILE_*).
_SUFFIXES = {
    0x7: "+me", 0x8: "+me", 0xA: "+gfx", 0xB: "+gfx", 0xC: "+gfx", 0xD: "-me", 0xE: "-me",
    0xF: "+me.all", 0x10: "+me.all", 0x11: "+gfx",
}  # fmt: skip


def _profile(number: int, told: Any, places: list[tuple[int, int]], cells: int, card_bytes: int) -> Profile:
    """NVML's answers as a Profile: the one place where they meet."""
    memory_bytes = told.memorySizeMB << 20
    name = str(getattr(told, "name", "")).removeprefix("MIG ")
    name = name or f"{told.sliceCount}g.{_nominal_gb(memory_bytes, card_bytes)}gb{_SUFFIXES.get(number, '')}"
    understood = parsed(name)
    return Profile(
        name=name,
        slices=told.sliceCount,
        width=places[0][1],
        starts=tuple(start for start, _ in places),
        count_max=told.instanceCount,
        memory_bytes=memory_bytes,
        sm_count=told.multiprocessorCount,
        cells=cells,
        suffix=understood[2] if understood else _SUFFIXES.get(number, ""),
        profile_id=told.id,
        engines=Engines(told.copyEngineCount, told.decoderCount, told.encoderCount, told.jpegCount, told.ofaCount),
    )


def _nominal_gb(memory_bytes: int, card_bytes: int) -> int:
    """The memory in a profile's name: eighths of the card's whole gigabytes, as NVIDIA's go-nvlib has it."""
    eighths = math.ceil(memory_bytes / max(card_bytes, memory_bytes, 1) * 8) / 8
    return round(eighths * math.ceil(card_bytes / 2**30))
