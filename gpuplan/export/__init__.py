"""For other tools: a plan as files that they accept. One file a format, each a pure function from plan to text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from gpuplan.export import mig_parted, nvidia_smi


class Format(NamedTuple):
    """`write` gives the text of `file_name`; raises InputError for a plan that has nothing to say in this format."""

    file_name: str
    write: Callable[[dict[str, Any]], str]


EXPORTS: dict[str, Format] = {
    "mig-parted": Format("mig-parted.yaml", mig_parted.write),
    "nvidia-smi": Format("nvidia-smi.sh", nvidia_smi.write),
}
