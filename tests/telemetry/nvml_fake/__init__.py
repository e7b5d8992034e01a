"""A driver of the project's own: `nvml_fake.c`, compiled by the system's compiler, and scripts for it to play."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("nvml_fake.c")
LIBRARY = "libnvidia-ml.so.1"
"""The name under which pynvml asks the dynamic loader for NVML."""

A100_PROFILES = """
profile 0x0 19 1 7 14 9728 1 0,1,2,3,4,5,6 1g.10gb
profile 0x7 20 1 1 14 9728 1 0,1,2,3,4,5,6 1g.10gb+me
profile 0x9 15 1 4 14 19968 2 0,2,4,6 1g.20gb
profile 0x1 14 2 3 28 19968 2 0,2,4 2g.20gb
profile 0x2 9 3 2 42 40192 4 0,4 3g.40gb
profile 0x3 5 4 1 56 40192 4 0 4g.40gb
profile 0x4 0 7 1 98 80896 8 0 7g.80gb
"""
"""What `nvidia-smi mig -lgip` and `-lgipp` print for an A100 of 80 GB."""

READINGS = """
used 1073741824
gpu_util 50
memory_util 25
power_mw 300000
energy_mj 5000000 5030000
sm_mhz 1410
memory_mhz 1593
celsius 61
throttle 0
pcie_tx_kb 2000
pcie_rx_kb 3000
processes 2
"""


def a100(uuid: str = "GPU-1") -> str:
    """A card that answers everything, without MIG."""
    return f"card NVIDIA_A100-SXM4-80GB {uuid} 85899345920\nmig 0\n{A100_PROFILES}{READINGS}"


def sliced(*, gpm: bool) -> str:
    """A card of three slices, the last without a compute instance; as on real cards, no utilisation of the whole."""
    card = "NVIDIA_H100_80GB_HBM3" if gpm else "NVIDIA_A100-SXM4-80GB"
    counters = "gpm_sm 80\ngpm_dram 40\n" if gpm else ""
    return f"""card {card} GPU-2 85899345920
mig 1
{"gpm" if gpm else ""}
used 21474836480
power_mw 250000
{A100_PROFILES}
instance 1 9 4 MIG-3g
used 20401094656
processes 1
{counters}
instance 7 19 0 MIG-1g
used 1073741824
processes 0
{counters.replace("80", "10")}
instance 8 19 1 -
"""


def compiled(folder: Path) -> Path | None:
    """The library, in `folder`; None where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    library = folder / LIBRARY
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", f"-Wl,-soname,{LIBRARY}", "-pthread"]
    subprocess.run([compiler, *flags, "-o", library, SOURCE], check=True)
    return library
