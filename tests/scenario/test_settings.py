"""--set KEY=VALUE: what it puts where, and what it says when it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpuplan.errors import InputError
from gpuplan.scenario import files
from gpuplan.scenario.settings import apply
from tests.conftest import single_step


def data() -> dict[str, Any]:
    return {
        "seed": 1,
        "models": {"llama-3.1-8b": {"emulate": "llama-3.1-8b"}},
        "traffic": [{"name": "chat", "rate": 1}, {"name": "codegen", "rate": 2}],
        "deployment": {"gpu": "a100-80gb", "mig": ["1g.10gb"]},
    }


WORKS: list[tuple[str, str, Any]] = [
    # setting, the key as errors name it, what is then at it (None: gone)
    ("deployment.gpu=h100-80gb", "deployment.gpu", "h100-80gb"),
    ("seed=7", "seed", 7),
    ("traffic.0.rate=2.5", "traffic[0].rate", 2.5),
    ("traffic[1].rate=2.5", "traffic[1].rate", 2.5),
    ("traffic.codegen.rate=3", "traffic[1].rate", 3),  # by its name
    ("deployment.mig=[3g.40gb, 2g.20gb]", "deployment.mig", ["3g.40gb", "2g.20gb"]),
    ("deployment.mig=", "deployment.mig", None),  # taken away
    ("models.llama-3.1-8b.emulate=phi-2", "models.llama-3.1-8b.emulate", "phi-2"),  # a name with dots
    ("deployment.batching.chat.max_batch_size=8", "deployment.batching.chat.max_batch_size", 8),  # mappings are made
    ("name=a=b", "name", "a=b"),
]


@pytest.mark.parametrize(("setting", "key", "value"), WORKS)
def test_a_value_is_put_where_its_key_leads(setting: str, key: str, value: Any) -> None:
    told = data()
    assert apply(told, [setting]) == [key]
    at: Any = told
    for name in key.replace("llama-3.1-8b", "llama").replace("[", ".").replace("]", "").split("."):
        at = at.get(name.replace("llama", "llama-3.1-8b")) if isinstance(at, dict) else at[int(name)]
    assert at == value


def test_an_entry_can_be_taken_away_and_the_last_setting_wins() -> None:
    told = data()
    apply(told, ["traffic.chat=", "seed=2", "seed=3"])
    assert [c["name"] for c in told["traffic"]] == ["codegen"] and told["seed"] == 3


FAILS = [
    ("seed", "--set: not KEY=VALUE (got 'seed'); allowed: e.g. deployment.gpu=h100-80gb"),
    ("=5", "--set: not KEY=VALUE"),
    ("traffic.7.rate=1", "--set: no entry '7' (got 'traffic.7.rate=1'); allowed: 0 to 1, chat, codegen"),
    ("traffic.chta.rate=1", "--set: no entry 'chta'"),
    ("seed.x=1", "--set: nothing is under a plain value (1) (got 'seed.x=1')"),
    ("deployment.mig=[1g", "--set deployment.mig: not valid YAML (got '[1g')"),
    ("seed=!!python/object:os.system x", "--set seed: not a plain value"),
]


@pytest.mark.parametrize(("setting", "said"), FAILS)
def test_what_leads_nowhere_is_said(setting: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        apply(data(), [setting])
    assert str(error.value).startswith(said)


IN_A_FILE = [
    ("deployment.gpu=h100-90gb", "--set: deployment.gpu: unknown GPU (got 'h100-90gb')"),
    ("traffic.0.arrivals.rate=-1", "--set: traffic[0].arrivals.rate: invalid value (got -1); allowed: float > 0"),
    ("trafic.0.rate=1", "--set: trafic: unknown key"),
    ("duration=0s", "--set: duration: must be above zero"),
    ("warmup=20s", "--set: warmup: nothing is left to measure"),
]


@pytest.mark.parametrize(("setting", "said"), IN_A_FILE)
def test_a_bad_value_is_not_blamed_on_the_file(setting: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "one.yaml"
    file.write_text(json.dumps(single_step()))
    with pytest.raises(InputError) as error:
        files.load(file, settings=[setting])
    assert str(error.value).startswith(said)
    with pytest.raises(InputError, match=r"one.yaml:1: traffic\[0\].model: no such model"):
        files.load(file, settings=["models={other: {emulate: bert-base}}"])


def test_a_set_value_counts_and_paths_in_it_are_relative_to_the_file(tmp_path: Path) -> None:
    file = tmp_path / "one.yaml"
    file.write_text(json.dumps(single_step()))
    (tmp_path / "rows.csv").write_text("arrived_at_s,prompt_tokens,output_tokens\n0.0,5,0\n")
    loaded = files.load(
        file, settings=["deployment.gpu=h100-80gb", "traffic.mood.arrivals={process: trace, file: rows.csv}"]
    )
    assert loaded.deployment.gpu == "h100-80gb"
    assert loaded.traffic[0].arrivals.file == str(tmp_path / "rows.csv")  # type: ignore[union-attr]
