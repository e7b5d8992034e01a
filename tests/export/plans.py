"""Plans to export, as small as they can be."""

from __future__ import annotations

from itertools import product
from typing import Any

HOSTILE = (
    "a\"b'c\n{{x}} ${HOME} $(id) `id` ; # <<.Series>> %",
    "x" * 300,
    "",
    "../../etc/passwd",
    "-rf",
    "null",
    "1e3",
    "模型 Ünï\u2028code",
    "Llama-3.1-8B",
    "A_b",
    "a-b",
    "a_b",
)
"""Names that a careless writer would let into a shell, a template, a path or another type; and names that are near."""


def planned(**models: dict[str, Any]) -> dict[str, Any]:
    """A plan of one A100 as 4g.40gb + 2g.20gb + 1g.10gb. Each model takes the next slice; its keys are `role`,
    `processes`, and those of batching and autoscale."""
    return planned_of(models)


def planned_of(models: dict[str, dict[str, Any]], *, gpu: bool = True) -> dict[str, Any]:
    """The same of any names, as many cards as they need; without a `gpu` on the host's CPU."""
    slices = [("4g.40gb", 0, 4), ("2g.20gb", 4, 2), ("1g.10gb", 6, 1)]
    placements, replicas = [], []
    for i, (model, told) in enumerate(models.items()):
        card, (profile, start, width) = i // len(slices), slices[i % len(slices)]
        replicas.append(
            {"model": model, "slice": profile if gpu else "cpu", "processes": told.get("processes", 1), "count": 1}
        )
        placements.append(
            {"card": card, "profile": profile, "start": start, "width": width, "model": model, "replica": f"{model}-0"}
        )
    cards = (len(models) - 1) // len(slices) + 1
    for card, (profile, start, width) in list(product(range(cards), slices))[len(models) :]:
        free = {"card": card, "profile": profile, "start": start, "width": width, "model": None, "replica": None}
        placements.append(free)
    names = [profile for profile, _, _ in slices]
    layout = {"gpu": "a100-80gb", "profiles": names, "count": cards, "placements": placements}
    return {
        "scenario": "s",
        "mig": {"layouts": [layout] if gpu else []},
        "models": {
            model: {"role": told.get("role", "decoder"), "source": "llama-3-8b"} for model, told in models.items()
        },
        "replicas": replicas,
        "batching": {
            model: {
                "max_batch_size": told.get("max_batch_size", 32),
                "max_queue_delay_ms": told.get("max_queue_delay_ms", 0.0),
                "max_queue_size": told.get("max_queue_size", 41),
                "max_batch_tokens": told.get("max_batch_tokens", 2048),
            }
            for model, told in models.items()
        },
        "autoscale": {
            model: {
                "metric": "queue_depth_per_replica",
                "scale_up_at": told.get("scale_up_at", 0.26),
                "scale_down_at": told.get("scale_down_at", 0.01),
                "cooldown_s": told.get("cooldown_s", 45.0),
                "stabilization_window_s": told.get("stabilization_window_s", 300.0),
                "min_replicas": 1,
                "max_replicas": 4,
            }
            for model, told in models.items()
        },
    }


QUICKSTART = planned(
    assistant={},
    moderator={"role": "classifier", "max_batch_size": 2, "max_queue_delay_ms": 2.0, "scale_up_at": 9.2},
)
MANY = planned_of({name: {"role": ("decoder", "classifier")[i % 2]} for i, name in enumerate(HOSTILE)})
