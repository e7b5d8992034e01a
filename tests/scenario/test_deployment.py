"""What a file may say of its own hardware and models: profiles that NVML gave, shapes, and the paths of such."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpuplan.errors import InputError
from gpuplan.hardware import catalog, mig
from gpuplan.scenario import deployment, files
from gpuplan.scenario.demand import DeploymentSpec, ShapeSpec
from tests.conftest import single_step
from tests.hardware.test_shapes import LLAMA_3, PHI_2

A100 = catalog.gpu("a100-80gb")


def loaded(folder: Path, **changes: Any) -> Any:
    """A scenario file on disk (YAML reads JSON), loaded."""
    file = folder / "own.yaml"
    file.write_text(json.dumps(single_step(**changes)))
    return files.load(file)


# --- mig_profiles -------------------------------------------------------------------------------------------------

HALF = {
    "name": "3g.39gb",
    "slices": 3,
    "width": 4,
    "starts": [0, 4],
    "count_max": 2,
    "memory_gib": 38.5,
    "sm_count": 42,
}


def on_own_profiles(**changes: Any) -> dict[str, Any]:
    row = {**HALF, **changes}
    return {"gpu": "a100-80gb", "mig": ["3g.40gb", "3g.39gb"], "mig_profiles": [row], "replicas": [{"model": "mood"}]}


def test_profiles_in_the_file_win_over_the_catalogue_s(tmp_path: Path) -> None:
    part = "3g.40gb"  # another driver's name of the same slice
    spec = {**on_own_profiles(), "replicas": [{"model": "mood", "slice": part}]}
    resolved = deployment.resolve(loaded(tmp_path, deployment=spec))
    assert resolved.layouts == (("3g.39gb", "3g.39gb"),)
    assert resolved.gpu is not None
    (only,) = resolved.gpu.profiles
    assert (only.memory_bytes, only.cells, resolved.gpu.sm_count) == (int(38.5 * 2**30), 8, 108)
    assert mig.maximal_layouts(resolved.gpu) == (("3g.39gb", "3g.39gb"),), "what the planner tries"


def test_a_tuple_of_profiles_becomes_rows_and_the_same_tuple_again() -> None:
    rows = deployment.profile_rows(A100.profiles)
    card = deployment.card_of(DeploymentSpec(gpu="a100-80gb", mig_profiles=rows))
    assert card is not None
    assert mig.differences(A100.profiles, card.profiles) == []
    assert [p.memory_bytes for p in card.profiles] == [p.memory_bytes for p in A100.profiles]
    assert [(p.suffix, p.profile_id) for p in card.profiles] == [(p.suffix, p.profile_id) for p in A100.profiles]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "half"}, "deployment.mig_profiles[0].name: no name of a MIG profile (got 'half')"),
        (
            {"starts": [0, 5]},
            "deployment.mig_profiles[0].starts: does not lie on the card (got [0, 5]); allowed: cells 0 to 4",
        ),
        ({"starts": []}, "deployment.mig_profiles[0].starts: does not lie on the card"),
        ({"cells": 4}, "deployment.mig_profiles[0].starts: does not lie on the card"),
        ({"memory_gib": 0}, "deployment.mig_profiles[0].memory_gib: invalid value"),
        ({"memory_gib": 1e308}, "deployment.mig_profiles[0].memory_gib: invalid value"),
        ({"bandwidth": 1}, "deployment.mig_profiles[0].bandwidth: unknown key; allowed: cells, count_max"),
    ],
)
def test_a_row_that_cannot_be_is_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        loaded(tmp_path, deployment=on_own_profiles(**changes))
    assert said in str(caught.value)


# --- shapes -------------------------------------------------------------------------------------------------------

OWN = {"layers": 16, "hidden": 2048, "heads": 32, "kv_heads": 8, "ffn": 8192, "vocabulary": 128256}


def with_shape(shape: Any, *, role: str = "decoder") -> dict[str, Any]:
    data = single_step(models={"mood": {"shape": shape}})
    if role == "decoder":
        data["traffic"][0].update(output_tokens=5, slo={})
    return {"models": data["models"], "traffic": data["traffic"]}


def test_a_shape_of_one_s_own_is_served_like_a_known_one(tmp_path: Path) -> None:
    scenario = loaded(tmp_path, **with_shape({**OWN, "context_tokens_max": 8192, "tied_embeddings": True}))
    shape = deployment.shape_of(scenario.models["mood"])
    assert shape is not None
    assert (shape.name, shape.role, shape.gated_ffn) == ("own", "decoder", True)
    assert shape.weights_bytes / 2e9 == pytest.approx(1.24, rel=0.01), "Llama-3.2-1B's shape"
    (replica,) = deployment.resolve(scenario).replicas
    assert replica.role == "decoder"
    assert replica.kv_tokens_max is not None and replica.kv_tokens_max > 1_000_000


@pytest.mark.parametrize("where", ["model/config.json", "model"])
def test_a_config_json_is_read_once_and_kept_as_the_shape(tmp_path: Path, where: str) -> None:
    (tmp_path / "model").mkdir()
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(PHI_2))
    scenario = loaded(tmp_path, **with_shape(where))
    config.unlink()
    again = files.from_builtins(json.loads(json.dumps(files.to_builtins(scenario))))
    assert again == scenario, "the run folder needs no other file"
    assert isinstance(again.models["mood"].shape, ShapeSpec)
    shape = deployment.shape_of(again.models["mood"])
    assert shape is not None
    assert (shape.name, shape.layers, shape.kv_bytes_per_token) == ("phi-2", 32, 2 * 32 * 2560 * 2)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (OWN, "models.mood.shape.context_tokens_max: missing"),
        ({**OWN, "context_tokens_max": 1, "depth": 2}, "models.mood.shape.depth: unknown key"),
        ({**OWN, "context_tokens_max": 1, "heads": 30}, "models.mood.shape.heads: must divide hidden (got 30)"),
        ({**OWN, "context_tokens_max": 1, "kv_heads": 5}, "models.mood.shape.kv_heads: must divide heads (got 5)"),
        ({**OWN, "context_tokens_max": 1, "experts": 8}, "models.mood.shape.experts_per_token: does not fit the experts"),
        ({**OWN, "context_tokens_max": 1, "experts_per_token": 2}, "(got 2); allowed: 0 without experts"),
        ({**OWN, "context_tokens_max": 1, "role": "chat"}, "models.mood.shape.role: invalid value"),
        ("nowhere.json", "models.mood.shape: cannot read: No such file"),
        ("9" * 400, "models.mood.shape: cannot read: File name too long"),
        ("broken.json", "models.mood.shape: not JSON"),
        ("weights.json", "models.mood.shape: not JSON"),  # JSON, and no configuration: it is not read to its end
        ("list.json", "models.mood.shape: needs a mapping"),
        ("half.json", "models.mood.shape: vocab_size is missing"),
        (7, "models.mood.shape: invalid value"),
    ],
)  # fmt: skip
def test_a_shape_that_says_too_little_is_named(tmp_path: Path, shape: Any, said: str) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "weights.json").write_text(json.dumps({"w": "0" * (1 << 20)}))
    (tmp_path / "half.json").write_text(json.dumps({k: v for k, v in LLAMA_3.items() if k != "vocab_size"}))
    with pytest.raises(InputError) as caught:
        loaded(tmp_path, **with_shape(shape))
    assert str(caught.value).startswith(f"{tmp_path / 'own.yaml'}")
    assert said in str(caught.value)
