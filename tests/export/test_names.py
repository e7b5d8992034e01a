"""Whatever a model is called, files stay valid and names stay apart."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gpuplan.export import EXPORTS, names
from gpuplan.export.triton import files

from .plans import HOSTILE, MANY, planned_of

LABEL = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
PARTS = re.compile(r"[A-Za-z0-9._-]+")


@given(st.text(max_size=300))
def test_any_name_becomes_one_that_all_accept(name: str) -> None:
    assert LABEL.fullmatch(names.label(name))
    assert PARTS.fullmatch(names.served(name)) and names.served(name) not in (".", "..")
    assert "\n" not in names.shown(name) and names.shown(name).isprintable()
    assert names.promql_string(name).isascii()


def test_near_names_stay_apart_and_good_ones_stay() -> None:
    assert len({names.label(name) for name in HOSTILE}) == len(HOSTILE)
    assert len({names.served(name) for name in HOSTILE}) == len(HOSTILE)
    assert len({names.variable(names.label(name)) for name in HOSTILE}) == len(HOSTILE)
    assert (names.label("chat-7b"), names.served("Llama-3.1-8B")) == ("chat-7b", "Llama-3.1-8B")


def test_a_name_in_promql_is_read_back_as_it_is() -> None:
    for name in HOSTILE:
        escaped = re.sub(r"\\U000(\w{5})", lambda m: chr(int(m[1], 16)), names.promql_string(name)[1:-1])
        assert json.loads(f'"{escaped}"') == name
        assert not set(names.promql_string(name)) & set("{}$<>`'\n")


@pytest.mark.parametrize("name", [name for name, form in EXPORTS.items() if form.file_name.endswith(".yaml")])
def test_hostile_names_give_yaml_with_names_that_kubernetes_takes(name: str) -> None:
    form = EXPORTS[name]
    text = form.write(MANY, "gpuplan") if form.takes_metrics else form.write(MANY)
    documents = list(yaml.safe_load_all(text))
    assert documents and all(isinstance(document, dict) for document in documents)
    for document in documents:
        if "metadata" in document:
            assert LABEL.fullmatch(document["metadata"]["name"])


def test_compose_reads_no_variable_out_of_a_name() -> None:
    text = EXPORTS["compose"].write(MANY)
    written = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    assert all(re.match(r"\$\{[A-Z0-9_]+:\?[A-Za-z -]+\}", written[m.start() :]) for m in re.finditer(r"\$", written))


def test_half_a_character_makes_no_file_that_cannot_be_written() -> None:
    broken = planned_of({"\ud800": {"role": "classifier"}})
    for name, form in EXPORTS.items():
        if name != "vllm":
            (form.write(broken, "gpuplan") if form.takes_metrics else form.write(broken)).encode()
    assert names.promql_string("\ud800") == '"\\ufffd"'


def test_the_repository_stays_in_its_folder() -> None:
    for path in files(MANY):
        assert all(PARTS.fullmatch(part) and part != ".." for part in path.split("/"))


@pytest.mark.slow
def test_shell_scripts_run_nothing_that_a_name_says(tmp_path: Path) -> None:
    plan: dict[str, Any] = planned_of(
        {f"{name}\n touch {tmp_path}/ran; $(touch {tmp_path}/ran)": {} for name in HOSTILE}
    )
    only = tmp_path / "bin"  # nothing else is found: no nvidia-smi, whatever machine this is
    only.mkdir()
    (only / "touch").symlink_to("/usr/bin/touch")
    for name in ("vllm", "nvidia-smi"):
        script = tmp_path / "script.sh"
        script.write_text(EXPORTS[name].write(plan))
        assert subprocess.run(["/bin/sh", "-n", script], check=False).returncode == 0
        done = subprocess.run(["/bin/sh", script], capture_output=True, env={"PATH": str(only)}, check=False)
        assert done.returncode != 0 and not (tmp_path / "ran").exists()
