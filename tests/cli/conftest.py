"""The command as a user runs it: a process, its exit code, and what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Two seconds of traffic on an emulated card: enough for every file of a run.
SHORT = """
name: short
seed: 2
duration: 2s
models: {chat: {emulate: llama-3-8b}, mood: {builtin: sentiment}}
traffic:
  - name: chatter
    model: chat
    arrivals: {process: poisson, rate: 6}
    prompt_tokens: 40
    output_tokens: {uniform: {min: 5, max: 15}}
    slo: {ttft_ms: {p95: 500}}
  - name: mood
    model: mood
    arrivals: {process: constant, rate: 20}
    prompt_tokens: 12
    slo: {e2el_ms: {p95: 100}}
deployment:
  gpu: h100-80gb
  mig: [4g.40gb, 1g.10gb]
  replicas: [{model: chat, slice: 4g.40gb}, {model: mood, slice: 1g.10gb}]
  autoscale: {max_gpus: 1}
"""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "gpuplan", *map(str, arguments)]


def gpuplan(*arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=False)


def one_error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The single line of an error, which is no traceback."""
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0]


@pytest.fixture
def short(tmp_path: Path) -> Path:
    file = tmp_path / "short.yaml"
    file.write_text(SHORT)
    return file
