"""Tables that were measured elsewhere, read as they are."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuplan.errors import InputError, RunError
from gpuplan.hardware.roofline import StepLoad
from gpuplan.plan.search import make_plan
from gpuplan.record.summary import summarize
from gpuplan.scenario import deployment, files
from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.schedule import build_schedule
from gpuplan.sim import profiles
from gpuplan.sim.service_times import WHOLE_SLICES, Curve, Fit, ServiceTimes
from gpuplan.sim.simulator import simulate
from tests.conftest import single_step

PARVA = """model,gpu_instance_slices,batch_size,processes,throughput_per_process_per_s,latency_s
net,1,1,1,100.0,0.01
net,1,4,1,200.0,0.02
net,1,8,1,0,0
net,1,4,2,100.0,0.04
net,2,1,1,0,0.004
other,1,1,1,50.0,0.02
"""
ANALYZER = """Model,Batch,Concurrency,Model Config Path,Instance Group,Max Batch Size,Satisfies Constraints,Throughput (infer/sec),p99 Latency (ms)
resnet50,1,2,resnet50_config_default,1:GPU,8,Yes,195.0,11.0
resnet50,1,1,resnet50_config_default,1:GPU,8,Yes,164.0,8.1
resnet50,8,1,resnet50_config_default,1:GPU,8,Yes,800.0,12.0

Model,GPU UUID,GPU Memory Usage (MB),GPU Utilization (%)
triton-server,0,277.0,0.0
"""


def table(folder: Path, text: str) -> Path:
    file = folder / "table.csv"
    file.write_text(text)
    return file


def seconds(curve: Curve, size: int) -> float:
    return curve.seconds(StepLoad(10 * size, 0, 0, 0, size))


def test_a_table_by_slice_batch_and_processes(tmp_path: Path) -> None:
    curves = profiles.read(table(tmp_path, PARVA))
    assert set(curves) == {("net", 1, 1), ("net", 1, 2), ("net", 2, 1), ("other", 1, 1)}
    net = curves["net", 1, 1]
    assert net.batch_sizes == (1, 4), "zeros are no measurement"
    assert [seconds(net, n) for n in (1, 4)] == pytest.approx([0.01, 0.02]), "batch / throughput"
    assert seconds(net, 2) == pytest.approx(0.01 + 0.01 / 3), "between them a straight line"
    assert seconds(net, 7) == pytest.approx(0.03), "and on from there"
    assert seconds(curves["net", 2, 1], 1) == pytest.approx(0.004), "the latency where there is no throughput"
    assert seconds(curves["net", 2, 1], 3) == pytest.approx(0.012), "of a single point: in proportion"


def test_model_analyzer_s_csv(tmp_path: Path) -> None:
    curves = profiles.read(table(tmp_path, ANALYZER))
    assert set(curves) == {("resnet50", WHOLE_SLICES, 1)}
    curve = curves["resnet50", WHOLE_SLICES, 1]
    assert [seconds(curve, n) for n in (1, 8)] == pytest.approx([1 / 164, 8 / 800]), "of the lowest concurrency"


BAD = [
    ("a,b\n1,2\n", "table.csv:1: not a table of measurements"),
    (PARVA.replace("200.0", "fast"), "table.csv:3: could not convert string to float: 'fast'"),
    (PARVA.replace("200.0", "-1"), "table.csv:3: not a measurement"),
    (PARVA.replace("net,1,4,1,", "net,1,0,1,"), "table.csv:3: not a measurement"),
    (PARVA.splitlines()[0], "table.csv: no measurement in it"),
]


@pytest.mark.parametrize(("text", "said"), BAD)
def test_what_is_no_table_is_said(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        profiles.read(table(tmp_path, text))
    assert said in str(error.value)


@given(st.lists(st.floats(1e-4, 10.0), min_size=1, max_size=30))
def test_no_larger_batch_is_faster_and_what_rises_stays(values: list[float]) -> None:
    smooth = profiles.rising(values)
    assert all(b >= a * (1 - 1e-12) for a, b in itertools.pairwise(smooth))
    assert profiles.rising(sorted(values)) == pytest.approx(sorted(values))


# --- in a scenario ------------------------------------------------------------------------------------------------


def asked(file: Path, **changes: Any) -> Scenario:
    card = {"gpu": "a100-80gb", "mig": ["1g.10gb"], "replicas": [{"model": "mood", "slice": "1g.10gb"}]}
    data = {"models": {"mood": {"profiled": "net"}}, "profiles": str(file), "deployment": card, **changes}
    built = files.build(single_step(**data), Scenario)
    files.check(built)
    return built


def test_a_profiled_model_takes_what_the_table_says(tmp_path: Path) -> None:
    scenario = asked(table(tmp_path, PARVA))
    times = profiles.service_times(scenario)
    run = simulate(scenario, deployment.resolve(scenario), build_schedule(scenario), times)
    single = run.batches[run.batches["batch_size"] == 1]
    assert (single["done_s"] - single["started_s"]).to_numpy() == pytest.approx(0.01)
    assert run.meta.engines == {"mood": "simulated, step times measured elsewhere"}
    assert run.meta.notes == ["mood: step times of a table that was measured elsewhere"]
    assert summarize(run)["meets_slos"]


def test_what_was_measured_here_wins_and_processes_and_slices_count(tmp_path: Path) -> None:
    scenario = asked(table(tmp_path, PARVA))
    here, fit = deployment.resolve(scenario), Fit(0.5, 0.0, 0.0, 0.0, (), 100, 0.0)
    (replica,) = here.replicas
    elsewhere = profiles.service_times(scenario).measured
    load = StepLoad(40, 0, 0, 0, 4)
    assert ServiceTimes({("mood", "1g.10gb"): fit}, measured=elsewhere).timer(here, replica)(load) == 0.5
    assert ServiceTimes({("mood", "2g.20gb"): fit}, measured=elsewhere).timer(here, replica)(load) == pytest.approx(
        0.02
    )
    shared = asked(
        Path(scenario.profiles or ""),
        deployment={
            "gpu": "a100-80gb",
            "mig": ["1g.10gb"],
            "replicas": [{"model": "mood", "slice": "1g.10gb", "processes": 2}],
        },
    )
    both = deployment.resolve(shared)
    assert ServiceTimes({}, measured=elsewhere).timer(both, both.replicas[0])(load) == pytest.approx(0.04)
    card = {"gpu": "a100-80gb", "mig": ["3g.40gb"], "replicas": [{"model": "mood", "slice": "3g.40gb"}]}
    other = deployment.resolve(asked(Path(scenario.profiles or ""), deployment=card))
    with pytest.raises(RunError, match=r"no service times for mood on 3g\.40gb"):
        ServiceTimes({}, measured=elsewhere).timer(other, other.replicas[0])


def test_what_a_table_lacks_is_said(tmp_path: Path) -> None:
    file = table(tmp_path, PARVA)
    with pytest.raises(
        InputError, match=r"models.mood.profiled: the table has no such model \(got 'bert'\); allowed: net, other"
    ):
        profiles.service_times(asked(file, models={"mood": {"profiled": "bert"}}))
    with pytest.raises(InputError, match=r"models.mood.profiled: there is no table"):
        asked(file, profiles=None)
    with pytest.raises(InputError, match=r"profiles: no such file"):
        asked(tmp_path / "nowhere.csv")


def test_a_plan_from_a_real_table_stays_on_what_was_measured(data_file: Callable[[str], Path]) -> None:
    """Eleven networks on an A100: 1, 2, 3, 4 and 7 slices, no uncut card."""
    scenario = asked(data_file("mig-profiles/a100-80gb-models.csv"), models={"mood": {"profiled": "bert"}})
    supply, times = deployment.resolve(scenario), profiles.service_times(scenario)
    plan = make_plan(simulate(scenario, supply, build_schedule(scenario), times))
    assert plan["meets_slos"]
    assert {row["basis"] for row in plan["service_times"]} == {"measured elsewhere"}
    reasons = {tuple(a["profiles"]): a["reason"] for a in plan["alternatives"]}
    assert "a measurement for mood" in reasons[("whole",)]
