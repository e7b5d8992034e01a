"""What the pure tests share: measured data where it is, and a deployment in a line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = REPOSITORY.parent / "shared" / "data"


@pytest.fixture(scope="session")
def data_file() -> Callable[[str], Path]:
    """The path of a file of measured data; skips the test where the data is not."""

    def find(name: str) -> Path:
        path = DATA / name
        if not path.is_file():
            pytest.skip(f"measured data is not here: {name}")
        return path

    return find


def single_step(**changes: Any) -> dict[str, Any]:
    """A scenario, as plain data, of one classifier on a whole A100."""
    data: dict[str, Any] = {
        "name": "one",
        "duration": 10.0,
        "models": {"mood": {"emulate": "bert-base"}},
        "traffic": [
            {
                "name": "mood",
                "model": "mood",
                "arrivals": {"process": "poisson", "rate": 20},
                "prompt_tokens": 64,
                "slo": {"e2el_ms": {"p95": 100}},
            }
        ],
        "deployment": {"gpu": "a100-80gb", "replicas": [{"model": "mood"}]},
    }
    return {**data, **changes}
