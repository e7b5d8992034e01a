"""Schedules: the same for the same seed, each class on its own, and distributed as asked."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpuplan.errors import InputError
from gpuplan.scenario import files, traces
from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.schedule import Schedule, build_schedule
from gpuplan.scenario.traces import TraceRow
from tests.conftest import single_step

TOKENS = {"prompt_tokens": {"lognormal": {"p50": 100, "p95": 400}}, "output_tokens": 10}


def traffic(name: str, process: str = "poisson", *, model: str = "chat", **more: Any) -> dict[str, Any]:
    arrivals = {"process": process, **({} if process == "trace" else {"rate": 10})}
    arrivals |= {k: more.pop(k) for k in ("rate", "burstiness", "file") if k in more}
    return {"name": name, "model": model, "arrivals": arrivals, **TOKENS, **more}


def scenario(*classes: dict[str, Any], seed: int = 1, duration: float = 60.0, shape: str = "mistral-7b") -> Scenario:
    data = {
        "name": "s",
        "seed": seed,
        "duration": duration,
        "models": {"chat": {"emulate": shape}},
        "traffic": list(classes),
        "deployment": {"gpu": "h100"},
    }
    built = files.build(data, Scenario)
    files.check(built)
    return built


def times(schedule: Schedule, name: str) -> list[float]:
    return [r.scheduled_s for r in schedule.requests if r.traffic_class == name]


def test_same_seed_same_schedule_and_another_seed_another() -> None:
    a, b = traffic("a"), traffic("b", "gamma", burstiness=0.5)
    assert build_schedule(scenario(a, b)) == build_schedule(scenario(a, b))
    assert build_schedule(scenario(a, b)) != build_schedule(scenario(a, b, seed=2))


@pytest.mark.parametrize(
    "changed",
    [
        [traffic("a")],  # the other class is gone
        [traffic("b", rate=99), traffic("a")],  # it comes first now, and ten times as often
        [traffic("a", output_tokens={"uniform": {"min": 1, "max": 9}}), traffic("b")],  # other lengths, same arrivals
    ],
)
def test_a_class_s_arrivals_do_not_depend_on_the_rest(changed: list[dict[str, Any]]) -> None:
    before, after = build_schedule(scenario(traffic("a"), traffic("b"))), build_schedule(scenario(*changed))
    assert times(before, "a") == times(after, "a")


def test_indices_follow_time_and_ties_follow_the_file() -> None:
    schedule = build_schedule(scenario(traffic("b", "constant"), traffic("a", "constant"), traffic("c")))
    assert [r.index for r in schedule.requests] == list(range(len(schedule.requests)))
    assert all(x.scheduled_s <= y.scheduled_s for x, y in pairwise(schedule.requests))
    assert [r.traffic_class for r in schedule.requests[:2]] == ["b", "a"]


def test_constant_arrivals_are_exact() -> None:
    schedule = build_schedule(scenario(traffic("a", "constant", rate=8), duration=2.0))
    assert times(schedule, "a") == [i / 8 for i in range(16)]


def test_every_request_is_within_the_duration() -> None:
    schedule = build_schedule(scenario(traffic("a"), traffic("b", "gamma", burstiness=0.2)))
    assert all(0 <= r.scheduled_s < 60 for r in schedule.requests)


@pytest.mark.parametrize(
    ("arrivals", "variance"),
    [
        ({"process": "poisson"}, 1.0),  # of the gap, in units of its mean squared: 1 / burstiness
        ({"process": "gamma", "burstiness": 1.0}, 1.0),
        ({"process": "gamma", "burstiness": 0.25}, 4.0),  # burstier
        ({"process": "gamma", "burstiness": 4.0}, 0.25),  # steadier
    ],
)
def test_gaps_have_the_mean_and_variance_asked_for(arrivals: dict[str, Any], variance: float) -> None:
    """About 20,000 gaps: their mean lies within 3 %, their variance within 10 % (about three standard errors)."""
    schedule = build_schedule(scenario(traffic("a", arrivals.pop("process"), rate=100, **arrivals), duration=200.0))
    gaps = np.diff([0.0, *times(schedule, "a")])
    assert gaps.mean() == pytest.approx(0.01, rel=0.03)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(variance, rel=0.10)


@pytest.mark.parametrize(
    ("lengths", "p50", "p95"),
    [
        ({"lognormal": {"p50": 100, "p95": 400}}, 100, 400),
        ({"lognormal": {"p50": 60, "p95": 60}}, 60, 60),  # no spread at all
        ({"uniform": {"min": 1, "max": 1000}}, 500, 950),
        ({"quantiles": {"min": 3, "p50": 1469, "p95": 7303, "max": 7437}}, 1469, 7303),
        (77, 77, 77),
    ],
)
def test_lengths_have_the_percentiles_asked_for(lengths: Any, p50: float, p95: float) -> None:
    schedule = build_schedule(scenario(traffic("a", rate=100, prompt_tokens=lengths), duration=200.0))
    drawn = [r.prompt_tokens for r in schedule.requests]
    assert min(drawn) >= 1
    assert np.percentile(drawn, [50, 95]) == pytest.approx([p50, p95], rel=0.05)


def test_a_lognormal_s_max_holds() -> None:
    lengths = {"lognormal": {"p50": 100, "p95": 400, "max": 150}}
    schedule = build_schedule(scenario(traffic("a", prompt_tokens=lengths)))
    assert max(r.prompt_tokens for r in schedule.requests) == 150


@pytest.mark.parametrize(
    ("prompt", "output", "sent", "clipped"),
    [
        (4000, 96, (4000, 96), False),  # exactly the window of 4,096
        (4000, 97, (4000, 96), True),  # the prompt stays, the answer is cut
        (9000, 50, (4095, 1), True),  # the prompt is cut, one token is left to answer with
    ],
)
def test_what_exceeds_the_context_window_is_cut_and_counted(
    prompt: int, output: int, sent: tuple[int, int], clipped: bool
) -> None:
    asked = scenario(traffic("a", prompt_tokens=prompt, output_tokens=output), shape="llama-2-7b")
    schedule = build_schedule(asked)
    assert {(r.prompt_tokens, r.output_tokens) for r in schedule.requests} == {sent}
    assert schedule.clipped == (len(schedule.requests) if clipped else 0)


def test_a_classifier_s_prompt_may_fill_its_window() -> None:
    """It answers without a token, so nothing has to be left for one."""
    mood = {k: v for k, v in traffic("a", prompt_tokens=600).items() if k != "output_tokens"}
    schedule = build_schedule(scenario(mood, shape="bert-base"))
    assert {(r.prompt_tokens, r.output_tokens) for r in schedule.requests} == {(512, 0)}


@pytest.mark.parametrize(
    ("speed", "rate_scale", "expected"),
    [
        (1.0, 1.0, [0.0, 10.0, 40.0]),  # the row at 100 s is beyond the end
        (2.0, 1.0, [0.0, 5.0, 20.0, 50.0]),
        (1.0, 4.0, [0.0, 2.5, 10.0, 25.0]),  # a trace has no rate: it is replayed faster
    ],
)
def test_a_trace_keeps_its_times_and_lengths(
    tmp_path: Path, speed: float, rate_scale: float, expected: list[float]
) -> None:
    path = tmp_path / "t.csv"
    traces.write([TraceRow(t, 50 + i, 5 + i) for i, t in enumerate((0.0, 10.0, 40.0, 100.0))], path)
    recorded = {k: v for k, v in traffic("a", "trace", file=str(path)).items() if not k.endswith("_tokens")}
    asked = scenario(recorded, traffic("b", "constant", rate=1), duration=60.0)
    schedule = build_schedule(asked, speed=speed, rate_scale=rate_scale)
    assert times(schedule, "a") == pytest.approx(expected)
    mine = [(r.prompt_tokens, r.output_tokens) for r in schedule.requests if r.traffic_class == "a"]
    assert mine == [(50 + i, 5 + i) for i in range(len(expected))]
    assert len(times(schedule, "b")) == 60 * rate_scale, "speed is for traces, the rate for all"


def test_a_shape_of_one_s_own_has_its_window_too() -> None:
    own = {"layers": 2, "hidden": 64, "heads": 4, "ffn": 128, "vocabulary": 100, "context_tokens_max": 100}
    data = single_step(models={"mood": {"shape": own}}, duration=2.0)
    data["traffic"][0] |= {"prompt_tokens": 90, "output_tokens": 30, "slo": {}}
    schedule = build_schedule(files.build(data, Scenario))
    assert {(r.prompt_tokens, r.output_tokens) for r in schedule.requests} == {(90, 10)}
    assert schedule.clipped == len(schedule.requests) > 0


def test_a_schedule_that_no_run_could_hold_is_refused_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpuplan.scenario.schedule.REQUESTS_MAX", 100)
    data = single_step()
    data["traffic"][0]["arrivals"]["rate"] = 1e6
    with pytest.raises(
        InputError, match=r"traffic\[0\].arrivals: too many requests for one run; allowed: up to 100 in"
    ):
        build_schedule(files.build(data, Scenario))
