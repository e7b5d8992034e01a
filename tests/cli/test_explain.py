"""`gpuplan explain` on a simulated run: in words, as data, without a log, and where there is nothing to tell."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from .conftest import SHORT, gpuplan, one_error_line


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explain")
    (folder / "short.yaml").write_text(SHORT)
    done = gpuplan("simulate", folder / "short.yaml", "--out", folder / "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def requests(run: Path) -> list[dict[str, Any]]:
    return pd.read_parquet(run / "requests.parquet").to_dict("records")


def first_of(run: Path, traffic_class: str) -> dict[str, Any]:
    return next(r for r in requests(run) if r["traffic_class"] == traffic_class)


def test_a_story_in_words(run: Path) -> None:
    asked = first_of(run, "chatter")
    done = gpuplan("explain", run, asked["request_id"])
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert head == f"request {asked['request_id']} (chatter): 40 prompt tokens, {asked['output_tokens']} to generate"
    texts = [line[12:] for line in lines]
    ttft_ms = (asked["first_token_s"] - asked["scheduled_s"]) * 1e3
    for text, begin in zip(
        texts,
        (
            "scheduled and sent",
            "arrived",
            "waits for chat-0, first in line; answer expected after ",
            "first step on chat-0 (#",
            f"first token, TTFT {ttft_ms:.1f} ms",
            f"{asked['output_tokens'] - 1} more steps, ",
            "complete after ",
        ),
        strict=True,
    ):
        assert text.startswith(begin)
    times = [float(line[:8]) for line in lines if line[:8].strip()]
    assert len(times) == len(lines) - 1, "what took a while has no time of its own"
    assert times == sorted(times) and times[-1] == pytest.approx(asked["done_s"], abs=6e-4)


def test_the_same_story_as_data(run: Path) -> None:
    for asked in (first_of(run, "chatter"), first_of(run, "mood")):
        words = gpuplan("explain", run, asked["request_id"]).stdout.splitlines()
        told = json.loads(gpuplan("explain", run, asked["request_id"], "--json").stdout)
        assert [one["text"] for one in told] == [words[0], *(line[12:] for line in words[1:])]
        assert told[0]["kind"] == "request" and told[0]["prompt_tokens"] == asked["prompt_tokens"]
        kinds = {one["kind"]: one for one in told}
        assert kinds["starts"]["at_s"] == asked["started_s"]
        ended = kinds["ended"]
        assert (ended["at_s"], ended["outcome"]) == (asked["done_s"], "completed")
        assert sum(part["seconds"] for part in ended["parts"]) == pytest.approx(ended["total_s"])
        assert ("first_token" in kinds) == (asked["output_tokens"] > 0)


def test_without_a_log_it_tells_what_the_row_knows(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "decisions.jsonl").unlink()
    asked = first_of(run, "chatter")
    done = gpuplan("explain", tmp_path / "run", asked["request_id"])
    assert done.returncode == 0, done.stderr
    assert "there is no decision log: the server told nothing of its decisions" in done.stdout
    assert "first token, TTFT" in done.stdout and f"{asked['output_tokens']} tokens" in done.stdout
    assert "batch" not in done.stdout and "None" not in done.stdout


def test_an_unknown_request_or_folder_is_bad_input(run: Path, tmp_path: Path) -> None:
    last = len(requests(run)) - 1
    unknown = gpuplan("explain", run, last + 1)
    assert unknown.returncode == 2
    said = f"error: REQUEST_ID: no such request in {run} (got {last + 1}); allowed: 0 to {last}"
    assert one_error_line(unknown) == said
    nowhere = gpuplan("explain", tmp_path, 0)
    assert nowhere.returncode == 2
    assert "RUN: not a run folder" in one_error_line(nowhere)


def test_a_broken_log_is_named_with_its_line(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    log = tmp_path / "run" / "decisions.jsonl"
    lines = log.read_bytes().splitlines()
    asked = first_of(run, "chatter")
    number = next(i for i, line in enumerate(lines) if f'"client_id":"{asked["request_id"]}"'.encode() in line)
    lines[number] = lines[number][:-5]
    log.write_bytes(b"\n".join(lines))
    done = gpuplan("explain", tmp_path / "run", asked["request_id"])
    assert done.returncode == 2
    assert f"decisions.jsonl:{number + 1}: not a decision" in one_error_line(done)
