"""Exports say what the plan says, in words that the tools accept."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from gpuplan.errors import InputError
from gpuplan.export import EXPORTS
from gpuplan.hardware import mig
from gpuplan.hardware.catalog import gpu

A100 = gpu("a100-80gb")


def plan(*profiles: str, count: int = 1) -> dict[str, Any]:
    placed = mig.place(A100, profiles) if profiles != ("whole",) else [mig.Placement(mig.whole(A100), 0)]
    placements = [{"card": card, "profile": p.profile.name, "start": p.start} for card in range(count) for p in placed]
    layout = {"gpu": A100.name, "profiles": list(profiles), "count": count, "placements": placements}
    return {"scenario": "s", "mig": {"layouts": [layout]}}


def test_mig_parted_counts_profiles_on_its_devices() -> None:
    config = yaml.safe_load(EXPORTS["mig-parted"].write(plan("3g.40gb", "1g.10gb", "1g.10gb", count=2)))
    assert config == {
        "version": "v1",
        "mig-configs": {
            "gpuplan": [{"devices": [0, 1], "mig-enabled": True, "mig-devices": {"3g.40gb": 1, "1g.10gb": 2}}]
        },
    }


def test_an_uncut_card_has_mig_off() -> None:
    config = yaml.safe_load(EXPORTS["mig-parted"].write(plan("whole")))
    assert config["mig-configs"]["gpuplan"] == [{"devices": [0], "mig-enabled": False}]
    assert EXPORTS["nvidia-smi"].write(plan("whole")).splitlines()[-1] == "nvidia-smi -i 0 -mig 0"


def test_nvidia_smi_creates_each_slice_at_its_place() -> None:
    script = EXPORTS["nvidia-smi"].write(plan("4g.40gb", "2g.20gb", "1g.10gb", count=2))
    creations = [line for line in script.splitlines() if "-cgi" in line]
    assert creations == [f"nvidia-smi mig -i {i} -cgi 4g.40gb:0,2g.20gb:4,1g.10gb:6 -C" for i in (0, 1)]


@pytest.mark.parametrize("name", EXPORTS)
def test_a_plan_for_the_cpu_has_nothing_to_cut(name: str) -> None:
    with pytest.raises(InputError, match="no GPU to cut"):
        EXPORTS[name].write({"scenario": "s", "mig": {"layouts": []}})
