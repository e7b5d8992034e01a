"""Telemetry on its way into a run: by NVML, by a URL, with what broke on the way, through bench as it is used."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from gpuplan.load.bench import BenchOptions, bench
from gpuplan.record import store
from gpuplan.record.run import TELEMETRY_COLUMNS, Run
from gpuplan.record.summary import summarize
from gpuplan.scenario import deployment, files
from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.schedule import build_schedule
from gpuplan.serve.service import ServiceOptions, serving
from tests.conftest import single_step

from .conftest import Play
from .nvml_fake import a100, sliced

GONE = 15

SHORT = files.build(single_step(duration=1.0, warmup=0.0), Scenario)


async def benched(**options: Any) -> Run:
    return await bench(SHORT, deployment.resolve(SHORT), build_schedule(SHORT), BenchOptions(**options))


def measured(**options: Any) -> Run:
    return asyncio.run(benched(target="in-process", **options))


def test_a_bench_writes_what_the_cards_say(play: Play, tmp_path: Path) -> None:
    play(a100() + sliced(gpm=True))
    store.write(measured(telemetry="nvml", sample_hz=50.0), tmp_path)
    run = store.read(tmp_path)
    rows = run.telemetry
    assert list(rows.columns) == list(TELEMETRY_COLUMNS)
    assert run.meta.telemetry_source == "nvml" and set(rows["source"]) == {"nvml"}
    assert set(rows["slice"].dropna()) == {"gpu1/3g.40gb@4", "gpu1/1g.10gb@0"}
    card = rows[rows["gpu"] == "gpu0"]
    assert 30 < len(card) < 150, "50 readings a second of a run of about a second"
    assert card["time_s"].between(-2.0, run.meta.measured_s + 2.0).all()
    assert set(card["gpu_utilization"]) == {0.5} and set(card["throttle_reasons"]) == {""}
    assert set(card["processes"].dropna()) == {2}
    parent = rows[(rows["gpu"] == "gpu1") & rows["slice"].isna()]
    assert parent["gpu_utilization"].isna().all(), "on MIG not available, and not zero"
    assert parent["energy_j"].isna().all()
    assert rows[rows["slice"] == "gpu1/3g.40gb@4"]["gpu_utilization"].max() == pytest.approx(0.8)
    figures = summarize(run)["telemetry"]
    assert figures["source"] == "nvml"
    assert figures["power_w"]["max"] == 300 and figures["temperature_c"]["max"] == 61
    assert figures["throttled"] == {"share": 0.0, "reasons": {}}
    here = run.meta.machine["gpus"]
    assert [i["profile"]["name"] for i in here[1]["instances"]] == ["1g.10gb", "1g.10gb", "3g.40gb"]
    assert not [note for note in run.meta.notes if "gpu" in note]


def test_a_card_lost_in_mid_run_is_a_note_and_the_run_goes_on(play: Play) -> None:
    play(a100("GPU-1") + f"fail DeviceGetTemperature {GONE} 3\n" + a100("GPU-2"))
    run = measured(telemetry="nvml", sample_hz=20.0)
    assert run.meta.failure is None and (run.requests["status"] == "completed").all()
    assert (run.telemetry["gpu"] == "gpu0").sum() == 3
    assert (run.telemetry["gpu"] == "gpu1").sum() > 10
    assert [n for n in run.meta.notes if "lost in mid-run" in n] == [
        "gpu0: lost in mid-run (NVML says: GPU is lost); no readings from then on"
    ]


@pytest.mark.parametrize(
    ("telemetry", "init_code", "source", "note"),
    [
        ("nvml", 9, "none", "no telemetry: there is no NVIDIA driver on this machine"),  # asked for, so it is said
        ("auto", 9, "emulated", None),  # a machine without a card
        ("auto", 4, "emulated", "the NVIDIA driver does not answer (NVML says: Insufficient Permissions)"),
        ("none", 4, "none", None),
    ],
)
def test_a_driver_that_does_not_start_is_said_once(
    play: Play, telemetry: str, init_code: int, source: str, note: str | None
) -> None:
    play(f"fail InitWithFlags {init_code}\n")
    run = measured(telemetry=telemetry)
    assert run.meta.telemetry_source == source
    assert [n for n in run.meta.notes if "driver" in n] == ([note] if note else [])
    assert (run.requests["status"] == "completed").all()


def test_a_server_on_another_machine_by_its_metrics(play: Play) -> None:
    """Here it is gpuplan's own: what it emulates stays emulated, however far it was carried."""
    play("fail InitWithFlags 9\n")

    async def main() -> Run:
        async with serving(deployment.resolve(SHORT), ServiceOptions()) as service:
            await asyncio.sleep(0.3)  # its first readings
            url = service.url.replace("127.0.0.1", "localhost")
            return await benched(target=service.url, telemetry=f"{url}/metrics")

    run = asyncio.run(main())
    assert run.meta.telemetry_source == "emulated"
    assert len(run.telemetry) >= 1 and run.telemetry["power_w"].max() > 50
    assert pd.isna(run.telemetry["temperature_c"]).all()
    lacking = [note for note in run.meta.notes if "/metrics has no" in note]
    assert len(lacking) == 1 and lacking[0].endswith("has no clocks, temperature")


def test_an_exporter_that_is_not_there_costs_the_run_nothing() -> None:
    run = measured(telemetry="http://127.0.0.1:9/metrics")
    assert (run.meta.telemetry_source, len(run.telemetry)) == ("none", 0)
    assert [n for n in run.meta.notes if "127.0.0.1:9/metrics" in n] == [
        "telemetry: http://127.0.0.1:9/metrics did not answer as expected at times: Connection refused"
    ]
    assert (run.requests["status"] == "completed").all()
