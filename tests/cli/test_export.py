"""`gpuplan export` and `gpuplan lint` as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from gpuplan.export import EXPORTS
from tests.export.plans import QUICKSTART
from tests.telemetry.conftest import fake_library  # noqa: F401
from tests.telemetry.nvml_fake import a100

from .conftest import ROOT, command, gpuplan, one_error_line


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(QUICKSTART))
    return file


def test_every_format_goes_to_a_file_and_to_standard_output(plan: Path, tmp_path: Path) -> None:
    for name in ("keda", "triton"):
        out = tmp_path / "out" / name
        written = gpuplan("export", plan, "--to", name, "--out", out)
        assert written.returncode == 0 and written.stdout == "", written.stderr
        shown = gpuplan("export", plan.parent, "--to", name)
        assert shown.returncode == 0
        if EXPORTS[name].files:
            assert (out / "moderator" / "config.pbtxt").exists() and (out / "assistant" / "1" / "model.json").exists()
            assert "# ---- moderator/config.pbtxt" in shown.stdout
        else:
            assert out.read_text() == shown.stdout


BAD = [
    (("--to", "helm"), "unknown format (got 'helm')"),
    (("--to", "hpa", "--metrics", "vlm"), "unknown source of metrics (got 'vlm'); allowed: did you mean vllm"),
    (("--to", "vllm", "--metrics", "vllm"), "--metrics: no metrics are in such a file"),
    (("--to", "vllm", "--undo"), "--undo: is for nvidia-smi alone"),
    (("--to", "keda", "--apply"), "--apply: is for nvidia-smi alone"),
    (("--to", "nvidia-smi", "--apply", "--undo"), "--apply: writes the undo itself"),
    (("--to", "nvidia-smi", "--apply"), "--apply: there is no terminal to ask on; allowed: a terminal, or --yes"),
    (("--to", "keda", "--out", "/proc/nowhere/keda.yaml"), "--out: cannot write"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD, ids=[" ".join(b[0]) for b in BAD])
def test_bad_arguments_get_one_line(arguments: tuple[str, ...], said: str, plan: Path) -> None:
    done = gpuplan("export", plan, *arguments)
    assert done.returncode == 2 and said in one_error_line(done)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("3", "not a plan"),
        ("{", "not a plan"),
        ("{}", "not a plan (it has no "),
        ("[" * 100_000, "not a plan"),
        (json.dumps(QUICKSTART | {"autoscale": {"assistant": {"scale_up_at": float("nan")}}}), "not a plan"),
    ],
)
def test_what_is_no_plan_gets_one_line(text: str, said: str, plan: Path) -> None:
    plan.write_text(text)
    done = gpuplan("export", plan, "--to", "hpa", "--metrics", "gpuplan")
    assert done.returncode == 2 and said in one_error_line(done), done.stdout


def test_a_card_is_cut_when_asked_to(plan: Path, tmp_path: Path, fake_library: Path) -> None:  # noqa: F811
    """By a driver and an nvidia-smi of the tests' own, which are all that the command can find."""
    programs, log = tmp_path / "bin", tmp_path / "log"
    programs.mkdir()
    (programs / "nvidia-smi").write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    (programs / "nvidia-smi").chmod(0o755)
    script = tmp_path / "nvml.txt"
    environment = {"PATH": str(programs), "LD_LIBRARY_PATH": str(fake_library.parent), "NVML_FAKE": str(script)}
    environment |= {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), "HOME": str(tmp_path)}
    undo = tmp_path / "undo.sh"
    asked = command("export", plan, "--to", "nvidia-smi", "--apply", "--yes", "--out", undo)

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(asked, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=60, check=False)

    script.write_text(a100())
    used = run()
    assert used.returncode == 1 and "processes use card 0 (pid 100, 101)" in one_error_line(used)
    assert not log.exists() and not undo.exists()
    script.write_text(a100().replace("processes 2", "processes 0"))
    done = run()
    assert done.returncode == 0, done.stderr
    assert log.read_text().splitlines()[-1] == "mig -i 0 -cgi 4g.40gb:0,2g.20gb:4,1g.10gb:6 -C"
    assert undo.read_text().splitlines()[-1] == "nvidia-smi -i 0 -mig 0"


def test_lint_names_file_line_key_and_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "keda.yaml"
    file.write_text(
        "kind: ScaledObject\napiVersion: keda.sh/v1alpha1\nmetadata: {name: chat}\nspec:\n  minReplicaCount: 1\n"
        "  cooldownPeriod: 60\n  triggers:\n  - type: cpu\n    metadata: {value: '60'}\n"
    )
    done = gpuplan("lint", file)
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{file}:6: ScaledObject/chat: spec.cooldownPeriod = 60: KEDA waits for it before the step")
    told = json.loads(gpuplan("lint", file, "--json").stdout)
    assert [(row["key"], row["value"], row["line"]) for row in told] == [("spec.cooldownPeriod", 60, 6)]
    file.write_text(file.read_text().replace("  cooldownPeriod: 60\n", ""))
    assert gpuplan("lint", file).stdout == f"{file}: nothing found\n"
    assert gpuplan("lint", file).returncode == 0
    file.write_text("kind: Service")
    assert gpuplan("lint", file).returncode == 2
