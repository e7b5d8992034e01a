"""A simulation ends early only where its verdict is certain: held against the whole run, and against the rule itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuplan.record.summary import Summary, slo_met, summarize
from gpuplan.scenario import deployment, files
from gpuplan.scenario.demand import SLO_STATISTICS, Scenario
from gpuplan.scenario.schedule import build_schedule
from gpuplan.sim.early_stop import BeyondDoubt, Stopped, _Doubt
from gpuplan.sim.service_times import Fit, ServiceTimes
from gpuplan.sim.simulator import simulate
from tests.conftest import single_step

TIMES = ServiceTimes(
    {
        ("mood", "whole"): Fit(0.010, 0.0, 0.0, 0.001, (0.5, 1.0, 1.5), 100, 0.0),
        ("chat", "whole"): Fit(0.010, 0.0, 0.0, 0.0, (0.5, 1.0, 1.5), 100, 0.0),
    },
    uplink_s=(0.0, 0.001, 0.004),
    downlink_s=(0.001, 0.003),
)


def both(data: dict[str, Any], seed: int = 0, *, rows: bool = True) -> tuple[Summary, Stopped | None]:
    """The summary of the whole run, and why one that may stop early did."""
    scenario = files.build(data, Scenario)
    files.check(scenario)
    supply, schedule = deployment.resolve(scenario), build_schedule(scenario)
    how: dict[str, Any] = {"seed": seed, "keep_telemetry": False, "keep_rows": rows}
    whole = simulate(scenario, supply, schedule, TIMES, **how)
    try:
        simulate(scenario, supply, schedule, TIMES, **how, early_stop=True)
    except BeyondDoubt as end:
        return summarize(whole), end.stopped
    return summarize(whole), None


def verdict(figures: Summary, stopped: Stopped) -> bool | None:
    """Of the SLO that the simulation was stopped for, in the whole run."""
    (slo,) = (
        v
        for v in figures["classes"][stopped.traffic_class]["slos"]
        if (v["metric"], v["statistic"]) == (stopped.metric, stopped.statistic)
    )
    met: bool | None = slo["met"]
    return met


def mood(rate: float, slo: dict[str, Any], **more: Any) -> dict[str, Any]:
    arrivals = {"process": "poisson", "rate": rate}
    return {"name": "mood", "model": "mood", "arrivals": arrivals, "prompt_tokens": 10, "slo": {"e2el_ms": slo}, **more}


def one_card(limit: int, queue: int) -> dict[str, Any]:
    batching = {"mood": {"max_batch_size": limit, "max_queue_size": queue}}
    return {"gpu": "a100-80gb", "replicas": [{"model": "mood"}], "batching": batching}


# Warm-up, refusals, clients that leave, limits near what is reached: whatever a run can be.
@settings(max_examples=150, deadline=None)
@given(
    rate=st.sampled_from([20, 60, 90, 110, 200]),
    slo=st.dictionaries(st.sampled_from(SLO_STATISTICS), st.floats(5, 400), min_size=1, max_size=3),
    batch=st.sampled_from([1, 4]),
    queue=st.sampled_from([1, 5, 256]),
    warmup=st.sampled_from([0.0, 0.5]),
    abandon=st.sampled_from([None, {"share": 0.1, "after": 0.05}]),
    seed=st.integers(0, 5),
    rows=st.booleans(),
)
def test_it_never_changes_a_verdict(
    rate: float, slo: dict[str, float], batch: int, queue: int, warmup: float, abandon: Any, seed: int, rows: bool
) -> None:
    traffic = [mood(rate, slo, **({"abandon": abandon} if abandon else {}))]
    data = single_step(duration=2.0, warmup=warmup, seed=seed, traffic=traffic, deployment=one_card(batch, queue))
    figures, stopped = both(data, seed, rows=rows)
    if stopped is not None:
        assert verdict(figures, stopped) is False


@settings(max_examples=60, deadline=None)
@given(
    rate=st.sampled_from([1, 4, 8, 30]),
    metric=st.sampled_from(["ttft_ms", "tpot_ms", "itl_ms", "e2el_ms"]),
    statistic=st.sampled_from(SLO_STATISTICS),
    limit_ms=st.one_of(st.floats(8, 30), st.floats(50, 500)),
    tokens=st.sampled_from([(1, 2), (1, 40)]),
    queue=st.sampled_from([1, 256]),
    seed=st.integers(0, 5),
    rows=st.booleans(),
)
def test_nor_that_of_a_model_that_streams(
    rate: float,
    metric: str,
    statistic: str,
    limit_ms: float,
    tokens: tuple[int, int],
    queue: int,
    seed: int,
    rows: bool,
) -> None:
    talk = {
        "name": "talk",
        "model": "chat",
        "arrivals": {"process": "poisson", "rate": rate},
        "prompt_tokens": 50,
        "output_tokens": {"uniform": {"min": tokens[0], "max": tokens[1]}},
        "slo": {metric: {statistic: limit_ms}},
    }
    batching = {"chat": {"max_batch_size": 4, "max_queue_size": queue}}
    card = {"gpu": "a100-80gb", "replicas": [{"model": "chat"}], "batching": batching}
    data = single_step(models={"chat": {"emulate": "llama-3-8b"}}, traffic=[talk], deployment=card, duration=3.0)
    figures, stopped = both({**data, "seed": seed}, seed, rows=rows or metric == "itl_ms")
    if stopped is not None:
        assert verdict(figures, stopped) is False


@settings(max_examples=500, deadline=None)
@given(
    statistic=st.sampled_from([s for s in SLO_STATISTICS if s != "mean"]),
    good=st.lists(st.floats(0.0, 100.0), max_size=150),
    late=st.lists(st.floats(100.001, 1e9), max_size=40),
    lost=st.integers(0, 40),
)
def test_one_miss_more_than_the_rule_bears_is_enough_whatever_kind_they_are(
    statistic: str, good: list[float], late: list[float], lost: int
) -> None:
    asked, missed = len(good) + len(late) + lost, len(late) + lost
    if _Doubt(statistic, 100.0).over(missed - 1, asked):
        values = np.array([*good, *late])
        assert not slo_met(values, statistic, 100.0, lost=lost, answered=len(values))


@pytest.mark.parametrize(
    ("slo", "asked", "missed"),
    [
        ({"p95": 50}, 600, 32),  # of 600 thirty may be lost; one more, and one for doubt
        ({"p50": 50}, 600, 302),
        ({"p99": 50}, 600, 8),
        ({"max": 50}, 600, 2),
    ],
)
def test_it_ends_with_the_request_that_decides(slo: dict[str, Any], asked: int, missed: int) -> None:
    """Twice what a replica of 11 ms a request can do: those who wait beyond the limit count at once."""
    traffic = [{**mood(1, slo), "arrivals": {"process": "constant", "rate": 200}}]
    figures, stopped = both(single_step(duration=3.0, traffic=traffic, deployment=one_card(1, 10_000)))
    assert stopped is not None and figures["classes"]["mood"]["requests"] == asked
    assert stopped.asked == asked and missed <= stopped.missed <= missed + 1, "several can be overdue at one event"
    assert stopped.at_s < 0.15 + missed / 100, "waiting begins with the first requests"
    said = (
        f"mood cannot meet E2EL {next(iter(slo))} <= 50 ms: {stopped.missed} of 600 missed it by {stopped.at_s:.1f} s"
    )
    assert str(stopped) == said


def test_what_holds_is_followed_to_its_end_and_a_class_without_slos_stops_nothing() -> None:
    traffic = [mood(20, {"p95": 200}), {**mood(200, {}), "name": "free", "slo": {}}]
    assert both(single_step(duration=2.0, traffic=traffic, deployment=one_card(64, 5)))[1] is None


def test_lost_requests_decide_a_mean_at_once() -> None:
    figures, stopped = both(single_step(traffic=[mood(200, {"mean": 1e6})], deployment=one_card(1, 1)))
    assert stopped is not None and verdict(figures, stopped) is False
    assert stopped.missed == 1 and stopped.at_s < 0.5
