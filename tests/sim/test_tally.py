"""Without rows a simulation says the same, steps taken many at once or not."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from gpuplan.policy.vocabulary import Decision, RunStep
from gpuplan.record.summary import Summary, summarize
from gpuplan.scenario import deployment, files
from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.schedule import Columns, build_schedule
from gpuplan.sim.service_times import Fit, ServiceTimes
from gpuplan.sim.simulator import simulate
from tests.conftest import REPOSITORY

SPREAD = ServiceTimes(
    {("chat", "1g.10gb"): Fit(0.0005, 1.0, 0.0, 0.0, (0.8, 0.9, 1.0, 1.0, 1.1, 1.4), 100, 0.1)},
    uplink_s=(0.001, 0.002, 0.004),
    downlink_s=(0.001, 0.003),
)


def chats(rate: float, replicas: int = 3, **traffic: Any) -> Scenario:
    chat = {
        "name": "chat",
        "model": "chat",
        "arrivals": {"process": "poisson", "rate": rate},
        "prompt_tokens": {"lognormal": {"p50": 100, "p95": 300}},
        "output_tokens": {"uniform": {"min": 2, "max": 150}},
        "slo": {"e2el_ms": {"p95": 3000}, "tpot_ms": {"p95": 30}},
        **traffic,
    }
    told = {
        "name": "chats",
        "seed": 3,
        "duration": 60,
        "warmup": 5,
        "models": {"chat": {"emulate": "phi-2"}},
        "traffic": [chat],
        "deployment": {
            "gpu": "a100-80gb",
            "mig": ["1g.10gb"] * replicas,
            "replicas": [{"model": "chat", "slice": "1g.10gb", "count": replicas}],
            "batching": {"chat": {"max_batch_size": 8, "max_queue_size": 20}},
        },
    }
    scenario = files.build(told, Scenario)
    files.check(scenario)
    return scenario


def both(scenario: Scenario, times: ServiceTimes) -> tuple[Summary, Summary]:
    supply, schedule = deployment.resolve(scenario), build_schedule(scenario)
    with_rows, without = (
        summarize(simulate(scenario, supply, schedule, times, seed=5, keep_telemetry=False, keep_rows=keep))
        for keep in (True, False)
    )
    return with_rows, without


def flat(told: Any, key: str = "") -> dict[str, Any]:
    if isinstance(told, dict):
        return {k: v for name, part in told.items() for k, v in flat(part, f"{key}.{name}").items()}
    if isinstance(told, list):
        return {k: v for i, part in enumerate(told) for k, v in flat(part, f"{key}.{i}").items()}
    return {key: told}


def kept(figures: Summary) -> dict[str, Any]:
    """The figures that are numbers, and are there without rows."""
    numbers = {k: v for k, v in flat(figures).items() if isinstance(v, int | float)}
    return {k: v for k, v in numbers.items() if ".itl_ms." not in k and ".step_ms." not in k}


@pytest.mark.parametrize("rate", [1.0, 2.5, 10.0])
def test_one_replica_does_the_same(rate: float) -> None:
    """Nothing is to be chosen, and no luck has a part."""
    with_rows, without = both(chats(rate, replicas=1), ServiceTimes({}))
    assert with_rows["overall"]["rejected"] > 0 or rate < 10
    assert without["overall"]["itl_ms"]["mean"] is None
    assert kept(without) == pytest.approx(kept(with_rows), rel=0.005, abs=1e-3)


def test_with_a_choice_and_a_spread_it_is_near() -> None:
    """Of two that are as good as each other, now one is chosen and now the other."""
    with_rows, without = (figures["overall"] for figures in both(chats(6.0), SPREAD))
    assert without["completed"] == with_rows["completed"]
    for metric in ("ttft_ms", "tpot_ms", "e2el_ms"):
        assert without[metric]["mean"] == pytest.approx(with_rows[metric]["mean"], rel=0.03)


def test_single_steps_are_exactly_the_same() -> None:
    scenario = files.load(REPOSITORY / "scenarios" / "quickstart.yaml")
    classes = [c for c in scenario.traffic if not c.output_tokens]
    assert classes
    names = {c.model for c in classes}
    with_rows, without = both(scenario, ServiceTimes({}))
    for c in classes:
        one, other = with_rows["classes"][c.name], without["classes"][c.name]
        assert kept(one) == pytest.approx(kept(other), rel=1e-3)
    for name in names:
        assert kept(with_rows["models"][name]) == pytest.approx(kept(without["models"][name]), rel=1e-3)


def test_faults_and_clients_who_hang_up() -> None:
    scenario = chats(5.0, abandon={"share": 0.3, "after": 0.5})
    told = files.to_builtins(scenario)
    told["faults"] = [
        {"at": 10.0, "replica": "chat-0", "crash": {"back_after": 10.0}},
        {"at": 20.0, "for": 20.0, "replica": "chat-1", "slow": {"factor": 4.0}},
        {"at": 30.0, "replica": "chat-2", "hang": {"back_after": 5.0}},
    ]
    with_rows, without = (figures["overall"] for figures in both(files.from_builtins(told), ServiceTimes({})))
    assert with_rows["errors"]["abandoned"] > 50
    assert without["errors"]["abandoned"] == pytest.approx(with_rows["errors"]["abandoned"], rel=0.1)
    assert without["completed"] == pytest.approx(with_rows["completed"], rel=0.03)


def test_columns_are_the_requests() -> None:
    requests = build_schedule(chats(5.0, abandon={"share": 0.3, "after": 0.5})).requests
    columns = Columns.of(requests)
    assert list(columns) == list(requests) and columns[-1] == requests[-1]
    assert columns[3:5] == tuple(requests[3:5])
    assert Columns.of(columns) is columns
    with pytest.raises(IndexError):
        columns[len(requests)]


def test_who_gives_way_and_is_read_again_has_its_first_token_once() -> None:
    """With 60 blocks of 16 tokens, those that run together outgrow the cache, and some give way."""
    data = files.to_builtins(chats(3.0, replicas=1))
    data["deployment"] = {
        "gpu": "a100-80gb",
        "engine": {"kind": "vllm", "num_gpu_blocks_override": 60, "max_num_seqs": 8, "async_scheduling": False},
    }
    scenario = files.from_builtins(data)
    supply, schedule = deployment.resolve(scenario), build_schedule(scenario)
    run = simulate(scenario, supply, schedule, ServiceTimes({}), keep_decisions=True)
    actions = [a for line in run.decisions for a in msgspec.json.decode(line, type=Decision).actions]
    read = [p.request_id for a in actions if isinstance(a, RunStep) for p in a.prefills if p.last]
    assert len(read) > len(set(read)), "somebody was read twice"
    with_rows, without = both(scenario, ServiceTimes({}))
    for metric in ("ttft_ms", "tpot_ms"):
        assert without["overall"][metric] == pytest.approx(with_rows["overall"][metric], rel=0.02)
