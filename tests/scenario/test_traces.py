"""Recorded traffic: three dialects in, one out, and the line of every row that is none."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from gpuplan.errors import InputError
from gpuplan.scenario import files, traces
from gpuplan.scenario.traces import TraceRow

ROWS = [TraceRow(0.0, 100, 10), TraceRow(0.5, 7, 0), TraceRow(61.25, 3000, 200)]


@pytest.mark.parametrize(
    "text",
    [
        "arrived_at_s,prompt_tokens,output_tokens\n0,100,10\n0.5,7,0\n61.25,3000,200\n",  # our own
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.0000000,100,10\n"
        "2023-11-16 18:17:03.5000000,7,0\n2023-11-16 18:18:04.2500000,3000,200\n",  # Azure's: seven digits
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16T23:59:59Z,100,10\n"
        "2023-11-16T23:59:59.5Z,7,0\n2023-11-17T00:01:00.25Z,3000,200\n",  # over midnight
        "arrived_at,num_prefill_tokens,num_decode_tokens\n5,100,10\n5.5,7,0\n66.25,3000,200\n",  # vidur's; from 5 s
        "\ufeffsession,output_tokens, arrived_at_s,prompt_tokens\r\na,10,0,100\r\n\r\nb,0,0.5,7\r\nc,200,61.25,3000\r\n",
    ],
)
def test_every_dialect_reads_alike(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text, newline="")
    rows = list(traces.read(path))
    assert [(r.prompt_tokens, r.output_tokens) for r in rows] == [(r.prompt_tokens, r.output_tokens) for r in ROWS]
    assert [r.arrived_at_s for r in rows] == pytest.approx([r.arrived_at_s for r in ROWS], abs=1e-6)


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    assert traces.write(ROWS, tmp_path / "t.csv") == 3
    assert list(traces.read(tmp_path / "t.csv")) == ROWS


HEAD = "arrived_at_s,prompt_tokens,output_tokens\n0,5,5\n"


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (HEAD + "1,many,5\n", 3, "not a trace row (got '1,many,5')"),
        (HEAD + "1,5\n", 3, "not a trace row"),  # a cell is missing
        (HEAD + "soon,5,5\n", 3, "not a trace row"),
        (HEAD + "1,0,5\n", 3, "impossible row"),  # no prompt
        (HEAD + "1,5,-1\n", 3, "impossible row"),
        (HEAD + "2,5,5\n1,5,5\n", 4, "allowed: time in order"),  # backwards
        (HEAD + "nan,5,5\n", 3, "row"),  # no time at all
        (HEAD + "inf,5,5\n", 3, "row"),
        ("a,b,c\n1,2,3\n", 1, "not a known trace (got 'a,b,c'); allowed: arrived_at_s,"),
        ("", 1, "not a known trace"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, text: str, line: int, said: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        list(traces.read(path))
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert said in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00\x01"])
def test_a_trace_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "trace.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="cannot read"):
        list(traces.read(path))


def test_the_azure_trace_reads_whole(data_file: Callable[[str], Path]) -> None:
    rows = list(traces.read(data_file("traces/azure-llm-2023-code.csv")))
    assert len(rows) == 8_819
    assert (rows[0].prompt_tokens, rows[0].output_tokens) == (4808, 10)
    assert all(a.arrived_at_s <= b.arrived_at_s for a, b in pairwise(rows))


def test_an_imported_trace_is_a_scenario(tmp_path: Path) -> None:
    traces.write(ROWS, tmp_path / "recorded.csv")
    out = tmp_path / "replay.yaml"
    assert traces.import_trace(tmp_path / "recorded.csv", out, duration_s=60, model="llama-3-8b", gpu="h100") == 2
    assert files.load(out).duration == 60.0
    assert traces.import_trace(tmp_path / "recorded.csv", out, duration_s=600, model="llama-3-8b", gpu="h100") == 3
    assert files.load(out).duration == pytest.approx(62.25), "the trace ends before"
    with pytest.raises(InputError, match="overwrite its own input"):
        traces.import_trace(tmp_path / "recorded.csv", tmp_path / "recorded.yaml", duration_s=60, model="m", gpu="g")
