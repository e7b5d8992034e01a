"""`gpuplan serve`: who may ask."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import httpx
import pytest

from .conftest import ROOT, command, gpuplan, one_error_line

BAD = [
    ("alice: secret-of-alice\nbob: short\n", ":2: bob: not a usable key; allowed: at least 8"),
    ("alice: secret of alice\n", ":1: alice: not a usable key"),
    ("alice: schlüssel-von-a\n", ":1: alice: not a usable key"),  # no header carries it
    ("alice: 12345678\n", ":1: alice: the key is no text; allowed: a text; a number in quotes"),
    ("alice: secret-of-all\nbob: secret-of-all\n", ":2: bob: has the key of alice"),
    ("alice: secret-of-alice\nalice: secret-of-another\n", ":2: alice: the key stands twice"),
    ("../alice: secret-of-alice\n", ":1: ../alice: not a name; allowed: letters, digits"),
    ("- secret-of-alice\n", ":1: needs a mapping; allowed: names and their keys"),
    ("{}", ":1: needs a mapping"),
    ("", ": needs a mapping"),
    ("alice: !!python/name:os.system x\n", ":1: alice: not a plain value"),
    ("alice: [secret-of-alice\n", "not valid YAML"),
]


@pytest.mark.parametrize(("text", "said"), BAD, ids=range(len(BAD)))
def test_a_bad_file_of_keys_gets_one_line_that_tells_no_key(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    done = gpuplan("serve", "--api-keys", file, "--port", 0)
    assert done.returncode == 2
    line = one_error_line(done)
    assert line.startswith(f"error: {file}") and said in line
    assert "secret" not in done.stderr


@pytest.mark.parametrize("text", ["default: secret-of-file\n", "alice: secret-of-one\n"])
def test_the_key_that_is_given_by_itself_is_another(text: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    done = gpuplan("serve", "--api-keys", file, "--api-key", "secret-of-one", "--port", 0)
    assert done.returncode == 2
    assert "--api-key: stands in the file, too" in one_error_line(done)


def test_every_key_of_the_file_opens_and_the_default_one_too(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("alice: secret-of-alice\nbob: 'secret-of-bob'\n")
    options = ("--port", 0, "--json", "--telemetry", "none", "--api-keys", file, "--api-key", "by-itself")
    with subprocess.Popen(command("serve", *options), stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        try:
            assert server.stdout is not None
            url = json.loads(server.stdout.readline())["url"]
            for key, status in (
                ("secret-of-alice", 200), ("secret-of-bob", 200), ("by-itself", 200), ("alice", 401), ("by-itsel", 401),
            ):  # fmt: skip
                answer = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"})
                assert answer.status_code == status, key
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
