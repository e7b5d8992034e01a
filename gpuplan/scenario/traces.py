"""Recorded traffic: rows of (arrival, prompt tokens, output tokens), read one by one.

Reads gpuplan's own CSV (`arrived_at_s,prompt_tokens,output_tokens`), the Azure LLM inference trace as published
(`TIMESTAMP,ContextTokens,GeneratedTokens`) and vidur's form of it (`arrived_at,num_prefill_tokens,num_decode_tokens`).
Raises InputError with the file and line of a row that is not one.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from gpuplan.errors import InputError

COLUMNS = ("arrived_at_s", "prompt_tokens", "output_tokens")
_DIALECTS = (
    COLUMNS,
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    ("arrived_at", "num_prefill_tokens", "num_decode_tokens"),
)


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One recorded request; `arrived_at_s` counts from the first row."""

    arrived_at_s: float
    prompt_tokens: int
    output_tokens: int


def read(path: Path) -> Iterator[TraceRow]:
    """The rows of a trace, in time order, the first at zero."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            dialect = next((d for d in _DIALECTS if set(d) <= set(header)), None)
            if dialect is None:
                known = " or ".join(",".join(d) for d in _DIALECTS)
                raise InputError("not a known trace", file=str(path), line=1, value=",".join(header), allowed=known)
            yield from _rows(reader, [header.index(name) for name in dialect], path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"cannot read: {reason}", file=str(path)) from None


def _rows(reader: Iterable[list[str]], columns: list[int], path: Path) -> Iterator[TraceRow]:
    first: float | None = None
    previous = 0.0
    for line, cells in enumerate(reader, start=2):
        if not cells:
            continue
        try:
            moment = _seconds(cells[columns[0]])
            first = moment if first is None else first
            row = TraceRow(moment - first, int(cells[columns[1]]), int(cells[columns[2]]))
        except (ValueError, IndexError):
            raise InputError("not a trace row", file=str(path), line=line, value=",".join(cells)) from None
        if (
            not math.isfinite(row.arrived_at_s)
            or row.prompt_tokens < 1
            or row.output_tokens < 0
            or row.arrived_at_s < previous
        ):
            raise InputError(
                "impossible row",
                file=str(path),
                line=line,
                value=",".join(cells),
                allowed="time in order, at least 1 prompt token",
            )
        previous = row.arrived_at_s
        yield row


def write(rows: Iterable[TraceRow], path: Path) -> int:
    """Writes gpuplan's own CSV; gives the number of rows."""
    count = 0
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for count, row in enumerate(rows, start=1):  # noqa: B007 - the last one is the count
            writer.writerow((f"{row.arrived_at_s:.6f}", row.prompt_tokens, row.output_tokens))
    return count


def _seconds(text: str) -> float:
    """A number of seconds, or a timestamp with up to 7 digits of a second (Azure's), as seconds."""
    try:
        return float(text)
    except ValueError:
        whole, _, fraction = text.strip().removesuffix("Z").partition(".")
        moment = datetime.fromisoformat(whole).replace(tzinfo=UTC).timestamp()
        return moment + (float(f"0.{fraction}") if fraction else 0.0)


def import_trace(trace: Path, out: Path, *, duration_s: float, model: str, gpu: str) -> int:
    """Writes a scenario that replays the first `duration_s` of a trace, its rows in a CSV beside it; gives their
    number. Raises InputError for a trace that is none or a place that cannot be written."""
    import json

    rows: list[TraceRow] = []
    length_s = duration_s
    for row in read(trace):
        if row.arrived_at_s >= duration_s:
            break
        rows.append(row)
    else:
        length_s = rows[-1].arrived_at_s + 1.0 if rows else 0.0  # the trace ends before
    if not rows:
        raise InputError("the trace has no rows", file=str(trace))
    table = out.with_suffix(".csv")
    if table.resolve() in (trace.resolve(), out.resolve()):
        raise InputError(
            "would overwrite its own input", key="--out", value=str(out), allowed="another name ending in .yaml"
        )
    text = f"""# Replays the first {length_s:g} s of {trace.name}: {len(rows)} recorded arrivals with their lengths.
name: {json.dumps(out.stem)}
duration: {length_s:g}s
models:
  llm: {{emulate: {json.dumps(model)}}}
traffic:
  - name: recorded
    model: llm
    arrivals: {{process: trace, file: {json.dumps(table.name)}}}
    slo: {{ttft_ms: {{p95: 1000}}, tpot_ms: {{p95: 50}}}}
deployment:
  gpu: {json.dumps(gpu)}
  replicas: [{{model: llm}}]
  batching: {{llm: {{max_batch_size: 64}}}}
"""
    try:
        write(rows, table)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write there: {error.strerror}", key="--out", value=str(out)) from None
    return len(rows)
