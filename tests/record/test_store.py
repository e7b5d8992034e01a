"""Run folders: what is written reads back, and what is none is refused in a sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpuplan.errors import InputError
from gpuplan.record import store
from gpuplan.record.intervals import SeedFigures
from gpuplan.record.run import REQUEST_COLUMNS, SCHEMA_VERSION, TELEMETRY_COLUMNS, Run
from gpuplan.record.summary import summarize
from gpuplan.scenario import deployment, files
from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.schedule import build_schedule
from gpuplan.sim.service_times import ServiceTimes
from gpuplan.sim.simulator import simulate
from tests.conftest import REPOSITORY, single_step


@pytest.fixture(scope="module")
def run() -> Run:
    scenario = files.load(REPOSITORY / "scenarios" / "quickstart.yaml")
    answers = deployment.resolve(scenario)
    return simulate(scenario, answers, build_schedule(scenario), ServiceTimes({}), seed=3, keep_decisions=True)


def test_what_is_written_reads_back(run: Run, tmp_path: Path) -> None:
    folder = store.prepare(tmp_path / "a" / "run")
    store.write(run, folder)
    again = store.read(folder)
    assert again.meta == run.meta
    assert again.decisions == run.decisions
    assert summarize(again) == summarize(run)
    assert not list(folder.glob("*.part")), "nothing half-written stays"
    store.write(again, folder)
    assert summarize(store.read(folder)) == summarize(run), "and once more, over itself"


def test_a_run_without_rows_reads_back(tmp_path: Path) -> None:
    scenario = files.build(single_step(traffic=[]), Scenario)
    empty = simulate(scenario, deployment.resolve(scenario), build_schedule(scenario), ServiceTimes({}))
    store.write(empty, tmp_path)
    assert summarize(store.read(tmp_path)) == summarize(empty)


def changed(folder: Path, **fields: Any) -> None:
    raw = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**raw, **fields}))


def test_a_newer_schema_is_refused(run: Run, tmp_path: Path) -> None:
    store.write(run, tmp_path)
    changed(tmp_path, schema_version=99)
    refused = rf"schema_version: written by a newer gpuplan \(got 99\); allowed: up to {SCHEMA_VERSION}"
    with pytest.raises(InputError, match=refused):
        store.read(tmp_path)


def test_an_older_table_gets_nulls_for_newer_columns(run: Run, tmp_path: Path) -> None:
    store.write(run, tmp_path)
    older = {name: kind for name, kind in REQUEST_COLUMNS.items() if name not in ("merged_tokens", "message")}
    store.write_table(run.requests, older, tmp_path / "requests.parquet")
    requests = store.read(tmp_path).requests
    assert list(requests.columns) == list(REQUEST_COLUMNS)
    assert requests["merged_tokens"].isna().all()


def test_a_folder_of_schema_1_opens_and_sums_up_as_before(run: Run, tmp_path: Path) -> None:
    """Telemetry had nine columns then."""
    store.write(run, tmp_path)
    changed(tmp_path, schema_version=1)
    first_nine = dict(list(TELEMETRY_COLUMNS.items())[:9])
    store.write_table(run.telemetry, first_nine, tmp_path / "telemetry.parquet")
    figures = summarize(store.read(tmp_path))["telemetry"]
    assert figures == summarize(run)["telemetry"]
    assert figures["power_w"] and figures["energy_j"]
    assert (figures["temperature_c"], figures["throttled"], figures["sm_clock_mhz"]) == (None, None, None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", None),  # missing
        ("run.json", b"{"),  # cut off
        ("run.json", b"[]"),  # not a mapping
        ("run.json", b'{"schema_version": "one"}'),
        ("run.json", b'{"schema_version": 1}'),  # fields are missing
        ("requests.parquet", None),
        ("requests.parquet", b"not parquet"),
    ],
)
def test_a_folder_that_is_no_run_says_so(run: Run, tmp_path: Path, name: str, content: bytes | None) -> None:
    store.write(run, tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="not a run folder"):
        store.read(tmp_path)


def test_a_place_that_cannot_be_written_is_found_out_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match="--out: cannot write there") as caught:
            store.prepare(place)
        assert str(place) in str(caught.value)
    assert store.prepare(tmp_path / "new" / "run") == store.prepare(tmp_path / "new" / "run"), "twice is no error"
    assert list((tmp_path / "new" / "run").iterdir()) == [], "the proof is taken away again"


def test_json_is_strict(tmp_path: Path) -> None:
    store.write_json(tmp_path / "x.json", {"a": float("nan"), "b": [float("inf"), 1.5], 3: "ö"})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [None, 1.5], "3": "ö"}


def test_what_was_derived_from_another_run_does_not_stay(run: Run, tmp_path: Path) -> None:
    store.write_json(tmp_path / "plan.json", {"gpus_needed": 99})
    store.write(run, tmp_path)
    assert not (tmp_path / "plan.json").exists()


def test_a_simulation_without_rows_leaves_no_tables_and_says_so(run: Run, tmp_path: Path) -> None:
    store.write(run, tmp_path)
    store.write(replace(run, steps={}), tmp_path)
    assert not list(tmp_path.glob("*.parquet")), "those of the run before are not its own"
    with pytest.raises(InputError, match="a simulation that kept no rows"):
        store.read(tmp_path)


def test_seeds_are_kept_until_another_run_comes(run: Run, tmp_path: Path) -> None:
    seeds = [SeedFigures(3, True, {"overall.goodput": 1.5}), SeedFigures(4, False, {})]
    assert store.read_seeds(tmp_path) == []
    store.write_seeds(seeds, tmp_path)
    assert store.read_seeds(tmp_path) == seeds
    store.write(run, tmp_path)
    assert store.read_seeds(tmp_path) == []
    (tmp_path / store.SEEDS).write_text("{}")
    with pytest.raises(InputError, match=r"seeds\.json: cannot read"):
        store.read_seeds(tmp_path)
