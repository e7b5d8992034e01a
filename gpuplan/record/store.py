"""A run folder: the files other tools rely on, written and read here and nowhere else.

`run.json`, `requests.parquet`, `batches.parquet`, `telemetry.parquet`, `decisions.jsonl`; beside them whatever was
derived from the run (`summary.json`, `plan.json`). Every file is written under another name and renamed, so a reader
never meets half of one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from gpuplan.errors import InputError
from gpuplan.policy.vocabulary import Decision
from gpuplan.record import run as run_module
from gpuplan.record.intervals import SeedFigures
from gpuplan.record.recorder import ServerRows, shifted
from gpuplan.record.run import Run, RunMeta

if TYPE_CHECKING:
    import pandas as pd

TABLES = {
    "requests": run_module.REQUEST_COLUMNS,
    "batches": run_module.BATCH_COLUMNS,
    "telemetry": run_module.TELEMETRY_COLUMNS,
}

SEEDS = "seeds.json"
DERIVED = (SEEDS, "summary.json", "plan.json", "report.html")

SERVER_TABLES = {
    "served": run_module.SERVED_COLUMNS,
    "batches": run_module.BATCH_COLUMNS,
    "telemetry": run_module.TELEMETRY_COLUMNS,
}


def prepare(folder: Path) -> Path:
    """Makes the folder and proves that it can be written, before anything is measured. Raises InputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"cannot write there: {error.strerror}", key="--out", value=str(folder), allowed="a folder you may write to"
        ) from None
    return folder


def write(run: Run, folder: Path) -> None:
    """Writes every file of the run, of one that kept no rows no tables. What was derived from another run in the same
    folder is taken away."""
    for name in DERIVED:
        (folder / name).unlink(missing_ok=True)
    write_json(folder / "run.json", msgspec.to_builtins(run.meta))
    log = folder / "decisions.jsonl"
    if run.steps is not None:  # it kept no rows; those of another run are not its own
        for path in (*(folder / f"{name}.parquet" for name in TABLES), log):
            path.unlink(missing_ok=True)
        return
    for name, columns in TABLES.items():
        write_table(getattr(run, name), columns, folder / f"{name}.parquet")
    _replace(log, lambda path: path.write_bytes(b"".join(line + b"\n" for line in run.decisions)))


def read(folder: Path) -> Run:
    """The run in a folder. Raises InputError when it is none, or of a schema this version does not know."""
    try:
        raw = json.loads((folder / "run.json").read_bytes())
        if raw.get("schema_version", 0) > run_module.SCHEMA_VERSION:
            raise InputError(
                "written by a newer gpuplan",
                file=str(folder / "run.json"),
                key="schema_version",
                value=raw["schema_version"],
                allowed=f"up to {run_module.SCHEMA_VERSION}",
            )
        meta = msgspec.convert(raw, RunMeta)
        if meta.source == "simulate" and not any((folder / f"{name}.parquet").exists() for name in TABLES):
            raise InputError(
                "a simulation that kept no rows",
                key="RUN",
                value=str(folder),
                allowed="its report.html and summary.json",
            )
        tables = {name: read_table(folder / f"{name}.parquet", columns) for name, columns in TABLES.items()}
        log = folder / "decisions.jsonl"
        decisions = tuple(log.read_bytes().splitlines()) if log.exists() else ()
    except (OSError, ValueError, TypeError, AttributeError, msgspec.ValidationError) as error:
        reason = (error.strerror or "") if isinstance(error, OSError) else str(error)
        raise InputError(f"not a run folder: {reason}", key="RUN", value=str(folder)) from None
    return Run(meta, tables["requests"], tables["batches"], tables["telemetry"], decisions)


def write_seeds(seeds: Sequence[SeedFigures], folder: Path) -> None:
    """Writes the main figures of each seed beside the run of the first one; none where there is one seed."""
    if seeds:
        write_json(folder / SEEDS, msgspec.to_builtins(list(seeds)))


def read_seeds(folder: Path) -> list[SeedFigures]:
    """The main figures of each seed; none where the run has only its own. Raises InputError for what is neither."""
    try:
        return msgspec.json.decode((folder / SEEDS).read_bytes(), type=list[SeedFigures])
    except FileNotFoundError:
        return []
    except (OSError, msgspec.DecodeError) as error:
        raise InputError(f"cannot read: {error}", file=str(folder / SEEDS)) from None


def write_server_rows(rows: ServerRows, about: dict[str, Any], folder: Path) -> None:
    """What a server process leaves for the load generator that started it; `about` last, as the sign of a whole set."""
    for name, columns in SERVER_TABLES.items():
        write_table(getattr(rows, name), columns, folder / f"{name}.parquet")
    _replace(
        folder / "decisions.jsonl", lambda path: path.write_bytes(b"".join(line + b"\n" for line in rows.decisions))
    )
    write_json(folder / "server.json", about)


def read_server_rows(folder: Path, *, start_s: float) -> tuple[ServerRows, dict[str, Any]]:
    """A server process's rows, written on the machine's monotonic clock, counted from `start_s`. Raises OSError."""
    about = json.loads((folder / "server.json").read_bytes())
    tables = {
        name: shifted(read_table(folder / f"{name}.parquet", columns), start_s)
        for name, columns in SERVER_TABLES.items()
    }
    lines = (folder / "decisions.jsonl").read_bytes().splitlines()
    return ServerRows(**tables, decisions=shifted_decisions(lines, start_s)), about


def shifted_decisions(lines: Iterable[bytes], start_s: float) -> tuple[bytes, ...]:
    """Lines of a decision log with their times counted from `start_s`."""
    decoder, encoder = msgspec.json.Decoder(Decision), msgspec.json.Encoder()
    decided = (decoder.decode(line) for line in lines)
    return tuple(encoder.encode(msgspec.structs.replace(d, at_s=d.at_s - start_s)) for d in decided)


def write_json(path: Path, data: Any) -> None:
    """Strict JSON: NaN and infinity become null."""
    write_text(path, json.dumps(_finite(data), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_table(table: pd.DataFrame, columns: dict[str, str], path: Path) -> None:
    """A Parquet file with exactly these columns and types."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {
        "int64": pa.int64(),
        "float64": pa.float64(),
        "bool": pa.bool_(),
        "string": pa.string(),
        "list": pa.list_(pa.float64()),
    }
    schema = pa.schema([(name, kinds[kind]) for name, kind in columns.items()])
    arrow = pa.Table.from_pandas(table[list(columns)], schema=schema, preserve_index=False)
    _replace(path, lambda temporary: pq.write_table(arrow, temporary))


def read_table(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    """The table, with nulls for columns that an older version did not write."""
    import pyarrow.parquet as pq

    arrow = pq.read_table(path)
    table: pd.DataFrame = arrow.to_pandas()
    for name, kind in columns.items():
        if name not in table:
            table[name] = None
        if kind == "int64":
            table[name] = table[name].astype("Int64")
    return table[list(columns)]


def _replace(path: Path, write_to: Callable[[Path], object]) -> None:
    temporary = path.with_name(path.name + ".part")
    write_to(temporary)
    temporary.replace(path)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(item) for item in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data
