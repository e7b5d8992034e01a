"""NVIDIA mig-parted's configuration (its spec v1): `nvidia-mig-parted apply -f FILE -c gpuplan`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from gpuplan.errors import InputError
from gpuplan.hardware.mig import WHOLE


def write(plan: dict[str, Any]) -> str:
    """The layouts of a plan; device numbers count through them. Raises InputError for a plan without a GPU."""
    import yaml

    devices: list[dict[str, Any]] = []
    first = 0
    for layout in plan["mig"]["layouts"]:
        indices = list(range(first, first + layout["count"]))
        first += layout["count"]
        cut = layout["profiles"] != [WHOLE]
        device: dict[str, Any] = {"devices": indices, "mig-enabled": cut}
        if cut:
            device["mig-devices"] = dict(Counter(layout["profiles"]))
        devices.append(device)
    if not devices:
        raise InputError("the plan has no GPU to cut", key="PLAN", value=plan["scenario"])
    text: str = yaml.safe_dump({"version": "v1", "mig-configs": {"gpuplan": devices}}, sort_keys=False)
    return text
