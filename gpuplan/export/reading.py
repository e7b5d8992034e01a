"""What exports read in a plan, and one clear error for what it lacks.

Takes `plan.json` as plain data; older plans lack `models`, so a role may be unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gpuplan.errors import InputError
from gpuplan.hardware.mig import WHOLE

Plan = dict[str, Any]
CPU = "cpu"
_PROFILE = re.compile(r"[0-9]+g\.[0-9]+gb([+-][a-z.]+)?")


@dataclass(frozen=True, slots=True)
class Server:
    """One place that serves: a slice of a card, or the host's CPU (then `card` is None). `processes` share it."""

    model: str
    name: str  # the replica's, such as chat-0
    slice: str
    card: int | None
    start: int
    processes: int

    @property
    def place(self) -> str:
        """Where it runs, in words."""
        if self.card is None:
            return "the host's CPU"
        return f"card {self.card}, uncut" if self.slice == WHOLE else f"{self.slice} of card {self.card} @{self.start}"


def lacks(plan: Plan, what: str) -> InputError:
    """The error for a plan that has nothing for a format."""
    return InputError(f"the plan has no {what}", key="PLAN", value=str(plan["scenario"]))


def layouts(plan: Plan) -> list[dict[str, Any]]:
    """The layouts of its cards. Raises InputError for a plan without a GPU."""
    found: list[dict[str, Any]] = plan["mig"]["layouts"]
    if not sum(layout["count"] for layout in found):
        raise lacks(plan, "GPU to cut")
    for layout in found:
        _known([*layout["profiles"], *(part["profile"] for part in layout["placements"])])
    return found


def servers(plan: Plan) -> list[Server]:
    """Every place that serves a model, by card and start. Raises InputError for a plan without replicas."""
    rows = plan["replicas"]
    if not rows:
        raise lacks(plan, "replicas")
    _known(row["slice"] for row in rows)
    shared = {(row["model"], row["slice"]): int(row["processes"]) for row in rows}
    found = []
    first = 0
    for layout in plan["mig"]["layouts"]:
        for part in layout["placements"]:
            model, profile = part["model"], part["profile"]
            if model is not None:
                processes = shared.get((model, profile), 1)
                card = first + int(part["card"])
                found.append(Server(model, part["replica"], profile, card, int(part["start"]), processes))
        first += layout["count"]
    if not found:  # no cards, so no placements
        for row in rows:
            names = (f"{row['model']}-{i}" for i in range(int(row["count"])))
            found += [Server(row["model"], name, row["slice"], None, 0, int(row["processes"])) for name in names]
    return found


def _known(slices: Iterable[str]) -> None:
    """Raises InputError for what is no slice: it would go into commands."""
    for name in slices:
        if name not in (WHOLE, CPU) and not _PROFILE.fullmatch(name):
            raise InputError("no name of a MIG profile", key="PLAN", value=name, allowed="e.g. 3g.40gb")


def models(plan: Plan) -> list[str]:
    """The models that have a replica, in the plan's order."""
    return list(dict.fromkeys(server.model for server in servers(plan)))


def is_decoder(plan: Plan, model: str) -> bool | None:
    """Whether it gives tokens; None where the plan does not say (made before plans had `models`)."""
    told = plan.get("models", {}).get(model)
    return None if told is None else bool(told["role"] == "decoder")


def source(plan: Plan, model: str) -> str:
    """What stands for the model in the scenario, in words."""
    told = plan.get("models", {}).get(model)
    return str(told["source"]) if told else "not told"


def scaling(plan: Plan) -> dict[str, dict[str, Any]]:
    """Thresholds of every model that has a replica. Raises InputError for a plan without thresholds."""
    found = {model: plan["autoscale"][model] for model in models(plan) if model in plan["autoscale"]}
    if not found:
        raise lacks(plan, "autoscale thresholds")
    return found


def placed_on_gpu(plan: Plan) -> list[Server]:
    """The servers, all on slices or cards. Raises InputError for a plan on the CPU."""
    found = servers(plan)
    if any(server.card is None for server in found):
        raise lacks(plan, "GPU for its models")
    return found


def resource(profile: str) -> str:
    """What a pod requests of Kubernetes for one such slice, as NVIDIA's device plugin names it (strategy `mixed`)."""
    return "nvidia.com/gpu" if profile == WHOLE else f"nvidia.com/mig-{profile.replace('+', '.')}"
