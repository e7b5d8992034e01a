"""NVIDIA mig-parted's configuration (its spec v1): `nvidia-mig-parted apply -f FILE -c gpuplan`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from gpuplan.export import reading, yaml_text
from gpuplan.export.reading import Plan
from gpuplan.hardware.mig import WHOLE


def write(plan: Plan) -> str:
    """The layouts of a plan; device numbers count through them. Raises InputError for a plan without a GPU."""
    devices: list[dict[str, Any]] = []
    first = 0
    for layout in reading.layouts(plan):
        indices = list(range(first, first + layout["count"]))
        first += layout["count"]
        cut = layout["profiles"] != [WHOLE]
        device: dict[str, Any] = {"devices": indices, "mig-enabled": cut}
        if cut:
            device["mig-devices"] = dict(Counter(layout["profiles"]))
        devices.append(device)
    comments = yaml_text.head(
        plan,
        "MIG layouts for NVIDIA mig-parted: nvidia-mig-parted apply -f FILE -c gpuplan.",
        from_plan=["every profile and how many; mig-parted chooses the places."],
        fill_in=["devices, where the cards to cut are not the machine's first ones."],
    )
    return yaml_text.written(comments, ([], {"version": "v1", "mig-configs": {"gpuplan": devices}}))
