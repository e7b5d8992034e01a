"""Service times from a table that was measured elsewhere: `profiles: table.csv` of a scenario.

Two forms are read as they are. A table of `model, gpu_instance_slices, batch_size, processes,
throughput_per_process_per_s, latency_s` (the form of ParvaGPU's profiles, SC'24) has a row for each slice by its number
of GPU slices, batch size and number of processes that share the slice; zeros mean that it had no memory. A CSV of
Triton Model Analyzer has batch sizes and concurrencies of a whole card; of each batch size its lowest concurrency
counts, in which requests wait least for each other.

A step of a batch takes batch / throughput seconds; the latency, which is rounded more, counts where there is no
throughput. Between batch sizes times go in straight lines, beyond the last as from the last two. A measurement that
falls as batches grow is averaged with its neighbours, so that no larger batch is faster. Such times have no spread.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from gpuplan.errors import InputError
from gpuplan.scenario.demand import Scenario
from gpuplan.sim.service_times import WHOLE_SLICES, Curve, ServiceTimes

ROWS_MAX = 1_000_000
COLUMNS = (
    "model", "gpu_instance_slices", "batch_size", "processes", "throughput_per_process_per_s", "latency_s",
)  # fmt: skip
ANALYZER = ("Model", "Batch", "Concurrency", "Instance Group", "Throughput (infer/sec)", "p99 Latency (ms)")


class _Row(NamedTuple):
    model: str
    slices: int
    batch: int
    processes: int
    throughput_per_s: float
    latency_s: float
    concurrency: int = 1


def service_times(scenario: Scenario) -> ServiceTimes:
    """What the scenario's table says of its models, by their names or, of a `profiled` one, by the name given there.

    Raises InputError for a table that cannot be read, and for a profiled model that it does not have.
    """
    if scenario.profiles is None:
        return ServiceTimes({})
    curves = read(Path(scenario.profiles))
    named = {name: source.profiled or name for name, source in scenario.models.items()}
    known = {model for model, *_ in curves}
    for name, source in scenario.models.items():
        if source.profiled is not None and source.profiled not in known:
            raise InputError(
                "the table has no such model",
                key=f"models.{name}.profiled",
                value=source.profiled,
                allowed=", ".join(sorted(known)),
            )
    told = {
        (name, slices, processes): curve
        for name, model in named.items()
        for (measured, slices, processes), curve in curves.items()
        if measured == model
    }
    return ServiceTimes({}, measured=told)


def read(path: Path) -> Mapping[tuple[str, int, int], Curve]:
    """Curves of step times by model, number of GPU slices (WHOLE_SLICES: an uncut card) and processes."""
    best: dict[tuple[str, int, int], dict[int, _Row]] = {}
    for row in _rows(path):
        if row.throughput_per_s <= 0 and row.latency_s <= 0:
            continue  # out of memory
        batches = best.setdefault((row.model, row.slices, row.processes), {})
        if row.batch not in batches or row.concurrency < batches[row.batch].concurrency:
            batches[row.batch] = row
    if not best:
        raise InputError("no measurement in it", file=str(path), allowed=f"columns {', '.join(COLUMNS)}")
    return {key: _curve(rows) for key, rows in best.items()}


def _curve(rows: Mapping[int, _Row]) -> Curve:
    sizes = sorted(rows)
    seconds = [
        size / row.throughput_per_s if row.throughput_per_s > 0 else row.latency_s
        for size, row in ((size, rows[size]) for size in sizes)
    ]
    return Curve(tuple(sizes), tuple(rising(seconds)))


def rising(values: list[float]) -> list[float]:
    """The nearest sequence that never falls: neighbours that do are replaced by their geometric mean (pool adjacent
    violators; Barlow et al., Statistical Inference under Order Restrictions, 1972)."""
    pools: list[tuple[float, int]] = []  # the mean logarithm, and of how many
    for value in values:
        mean, count = math.log(value), 1
        while pools and pools[-1][0] > mean:
            before, many = pools.pop()
            mean, count = (before * many + mean * count) / (many + count), many + count
        pools.append((mean, count))
    return [math.exp(mean) for mean, count in pools for _ in range(count)]


def _rows(path: Path) -> Iterator[_Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header: list[str] = []
            for number, cells in enumerate(csv.reader(file), start=1):
                if number > ROWS_MAX:
                    raise InputError("too many rows", file=str(path), allowed=f"up to {ROWS_MAX:,}")
                if not any(cells):
                    header = []  # Model Analyzer writes several tables below each other
                elif not header:
                    header = cells
                    if number == 1 and not (_has(header, COLUMNS) or _has(header, ANALYZER[:2])):
                        raise InputError(
                            "not a table of measurements", file=str(path), line=1, value=",".join(cells),
                            allowed=f"columns {', '.join(COLUMNS)}, or the CSV of Triton Model Analyzer",
                        )  # fmt: skip
                elif (row := _row(dict(zip(header, cells, strict=False)), path, number)) is not None:
                    yield row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read: {error}", key="profiles", value=str(path)) from None


def _has(header: list[str], columns: tuple[str, ...]) -> bool:
    return set(columns) <= set(header)


def _row(cells: Mapping[str, str], path: Path, number: int) -> _Row | None:
    """None in a part of the file that has no throughput by batch size."""
    try:
        if set(COLUMNS) <= set(cells):
            model, slices, batch, processes, throughput, latency = (cells[name] for name in COLUMNS)
            row = _Row(model, int(slices), int(batch), int(processes), float(throughput), float(latency))
        elif set(ANALYZER) <= set(cells):
            model, size, concurrency, _, throughput, latency = (cells[name] for name in ANALYZER)
            if int(size) < 1:
                return None  # the part about the card, in old versions
            row = _Row(model, WHOLE_SLICES, int(size), 1, float(throughput), float(latency) / 1e3, int(concurrency))
        else:
            return None
    except ValueError as error:
        raise InputError(str(error), file=str(path), line=number, allowed="numbers") from None
    if row.batch < 1 or row.processes < 1 or not all(0 <= x < math.inf for x in row[4:6]):
        raise InputError("not a measurement", file=str(path), line=number, value=",".join(map(str, row)))
    return row
