"""Many simulations at once give what they give one by one, and end together."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gpuplan.errors import InputError, RunError
from gpuplan.scenario import files
from gpuplan.scenario.demand import BatchingSpec, Scenario
from gpuplan.scenario.schedule import build_schedule
from gpuplan.sim import many
from gpuplan.sim.candidate import Candidate, Outcome, ScheduleBytes, answer, crossed, encode, outcome, simulate_one
from gpuplan.sim.many import simulate_many
from gpuplan.sim.service_times import Fit, ServiceTimes
from tests.conftest import REPOSITORY, single_step

TIMES = ServiceTimes({("mood", "whole"): Fit(0.01, 0.0, 0.0, 0.0, (0.5, 1.0, 1.5), 100, 0.0)}, (0.0, 0.001), (0.002,))


def scenario(**changes: Any) -> Scenario:
    built = files.build(single_step(duration=2.0, **changes), Scenario)
    files.check(built)
    return built


def cards(*counts: int) -> dict[str, Any]:
    """Deployments of so many cards, each with its replica."""
    data = {f"{n} cards": {"gpu": "a100-80gb", "count": n, "replicas": [{"model": "mood", "count": n}]} for n in counts}
    return {name: scenario(deployment=spec).deployment for name, spec in data.items()}


CROSSED = list(crossed(scenario(), cards(1, 2), range(3)))


@pytest.fixture(scope="module")
def one_by_one() -> list[Outcome]:
    return simulate_many(CROSSED, TIMES, workers=1)


def test_deployments_and_seeds_are_crossed(one_by_one: list[Outcome]) -> None:
    assert [o.name for o in one_by_one] == [f"{n} cards, seed {s}" for n in (1, 2) for s in range(3)]
    assert [o.seed for o in one_by_one] == [0, 1, 2, 0, 1, 2]
    asked = [o.summary["overall"]["requests"] for o in one_by_one if o.summary]
    assert asked[:3] == asked[3:] and len(set(asked[:3])) > 1, "the same requests for every deployment of a seed"


def test_processes_give_the_same_in_order(one_by_one: list[Outcome]) -> None:
    done: list[str] = []
    assert simulate_many(CROSSED, TIMES, workers=2, on_done=lambda o: done.append(o.name)) == one_by_one
    assert sorted(done) == sorted(o.name for o in one_by_one)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_a_ray_cluster_gives_the_same(one_by_one: list[Outcome]) -> None:
    assert simulate_many(CROSSED, TIMES, ray="local") == one_by_one


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_its_absence_is_said() -> None:
    with pytest.raises(InputError, match=r"Ray is not installed.*pip install 'gpuplan\[ray\]'"):
        simulate_many(CROSSED, TIMES, ray="auto")


@pytest.mark.parametrize("file", sorted((REPOSITORY / "scenarios").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_scenario_passes_through_bytes_unchanged(file: Path) -> None:
    asked = files.load(file)
    candidate = Candidate("one", asked, asked.seed, build_schedule(asked))
    if asked.deployment.gpu != "cpu":
        assert outcome("one", answer(encode(candidate, ServiceTimes({})))) == simulate_one(candidate, ServiceTimes({}))
    else:
        with pytest.raises(RunError, match="one: no service times"):
            outcome("one", answer(encode(candidate, ServiceTimes({}))))


def test_who_cannot_win_is_stopped() -> None:
    slow = ServiceTimes({("mood", "whole"): Fit(1.0, 0.0, 0.0, 0.0, (), 100, 0.0)})
    lost, won = simulate_many(crossed(scenario(), cards(1, 100), [0], early_stop=True), slow, workers=1)
    assert lost.summary is None and lost.stopped is not None and not lost.meets_slos
    assert won.summary is None, "a step of one second is too long for 100 ms, with any number of cards"
    fine, _ = simulate_many(crossed(scenario(), cards(1, 2), [0], early_stop=True), TIMES, workers=1)
    assert fine.stopped is None and fine.meets_slos


def test_common_random_numbers_make_differences_less_noisy_than_values() -> None:
    """Two cards against three, at a load at which both wait: over seeds, the difference of their means varies less than
    twice the variance of one, which is what independent draws would give."""
    busy = scenario(traffic=[{**single_step()["traffic"][0], "arrivals": {"process": "poisson", "rate": 150}}])
    rule = {"mood": BatchingSpec(max_batch_size=1, max_queue_size=10_000)}
    specs = {name: msgspec.structs.replace(spec, batching=rule) for name, spec in cards(2, 3).items()}
    outcomes = simulate_many(crossed(busy, specs, range(12)), TIMES, workers=1)
    means = [o.summary["overall"]["e2el_ms"]["mean"] for o in outcomes if o.summary]
    two, three = means[:12], means[12:]
    assert variance([a - b for a, b in zip(two, three, strict=True)]) < variance(two) + variance(three)


def variance(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / (len(values) - 1)


@pytest.mark.parametrize(
    ("told", "cpus"),
    [("200000 100000", 2.0), ("50000 100000", 0.5), ("max 100000", math.inf), ("", math.inf), (None, math.inf)],
)
def test_a_container_s_limit_is_kept_to(told: str | None, cpus: float, tmp_path: Path) -> None:
    if told is not None:
        (tmp_path / "cpu.max").write_text(told + "\n")
    assert many._quota(tmp_path / "cpu.max") == cpus
    assert 1 <= many.cores() <= (os.cpu_count() or 1)


def test_prompts_that_begin_alike_do_so_for_a_worker_too() -> None:
    talk = {
        **single_step()["traffic"][0],
        "model": "chat",
        "prompt_tokens": 400,
        "output_tokens": 5,
        "shared_prefix": {"tokens": 300, "groups": 2, "share": 0.5},
        "slo": {},
        "abandon": {"share": 0.2, "after": 5.0},
    }
    card = {"gpu": "a100-80gb", "engine": "vllm"}
    asked = scenario(models={"chat": {"emulate": "phi-2"}}, traffic=[talk], deployment=card)
    schedule = build_schedule(asked)
    sent = ScheduleBytes.of(schedule).schedule()
    assert list(sent.requests) == list(schedule.requests) and any(r.spans for r in sent.requests)
    candidate = Candidate("one", asked, 0, schedule)
    assert outcome("one", answer(encode(candidate, ServiceTimes({})))) == simulate_one(candidate, ServiceTimes({}))
