"""`gpuplan models`: the built-ins, and one ONNX file from outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.serve.engines.graphs import votes

from .conftest import gpuplan, one_error_line


def test_the_builtins_and_what_a_file_needs() -> None:
    shown = gpuplan("models")
    assert shown.returncode == 0
    rows = [line.split()[0] for line in shown.stdout.splitlines() if "/v1/" in line]
    assert rows[:2] == ["sentiment", "embed"]
    assert "tokenizer.json   needed" in shown.stdout and "task: embed" in shown.stdout
    told = {one["name"]: one for one in json.loads(gpuplan("models", "--json").stdout)["builtin"]}
    assert told["sentiment"]["endpoint"] == "/v1/classify"
    assert told["embed"]["role"] == "embedder" and told["embed"]["context_tokens_max"] == 512
    assert 1e6 < told["embed"]["parameters"] < 10e6


def test_a_file_that_can_be_served(tmp_path: Path) -> None:
    labels = {"0": "no", "1": "[bold]yes\n"}
    file = votes(tmp_path, id2label=labels, architectures=["BertForSequenceClassification"], max_position_embeddings=99)
    shown = gpuplan("models", file)
    assert shown.returncode == 0, shown.stderr
    for words in (
        "task: classify (config.json), served at /v1/classify",
        "context window: 99 tokens",
        "labels: no, [bold]yes\N{REPLACEMENT CHARACTER}\n",
        "attention_mask",
        "[batch, tokens]",
        "it can be served",
    ):
        assert words in shown.stdout
    told = json.loads(gpuplan("models", file, "--json").stdout)
    assert told["inputs"][0] == {"name": "input_ids", "type": "int64", "shape": ["batch", "tokens"]}
    assert told["outputs"] == [{"name": "logits", "type": "float", "shape": ["batch", 2]}]
    assert (told["task"], told["context_tokens_max"], told["problem"]) == ("classify", 99, None)
    assert told["tokenizer"] == str(tmp_path / "tokenizer.json")


def test_a_file_that_cannot_be_served_is_shown_with_the_reason(tmp_path: Path) -> None:
    file = votes(tmp_path, hidden=True)
    done = gpuplan("models", file)
    assert done.returncode == 2
    assert "last_hidden_state" in done.stdout and "can be served" not in done.stdout
    assert one_error_line(done).endswith("not [batch, labels]; set task: embed")
    assert gpuplan("models", file, "--task", "embed").returncode == 0
    told = gpuplan("models", file, "--task", "generate", "--json")
    assert told.returncode == 2
    assert json.loads(told.stdout)["problem"].startswith("the model has no output logits")


def test_bad_input_gets_one_line_that_helps(tmp_path: Path) -> None:
    file = votes(tmp_path)
    text = tmp_path / "text.onnx"
    text.write_text("not a model")
    empty = tmp_path / "empty.onnx"
    empty.write_bytes(b"")
    (tmp_path / "bare").mkdir()
    bare = tmp_path / "bare" / "m.onnx"
    bare.write_bytes(file.read_bytes())
    for arguments, said in (
        (("nowhere.onnx",), "MODEL: no such file (got 'nowhere.onnx')"),
        ((tmp_path,), "MODEL: no such file"),
        ((text,), "MODEL: not an ONNX model"),
        ((empty,), "MODEL: not an ONNX model: it has no nodes"),
        ((file, "--task", "sing"), "--task: invalid value (got 'sing'); allowed: classify, embed, generate"),
        (("--task", "embed"), "--task: needs a model"),
        ((bare,), "cannot be served: models: no such file"),
    ):
        done = gpuplan("models", *arguments)
        assert done.returncode == 2, arguments
        assert said in one_error_line(done)


@pytest.mark.parametrize("config", ["{", "[]"])
def test_a_broken_config_is_bad_input(tmp_path: Path, config: str) -> None:
    file = votes(tmp_path)
    (tmp_path / "config.json").write_text(config)
    done = gpuplan("models", file)
    assert done.returncode == 2
    assert "MODEL: not" in one_error_line(done)
