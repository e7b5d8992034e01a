"""One scenario on several seeds: a whole run and everybody's figures."""

from __future__ import annotations

from typing import Any

import pytest

from gpuplan.record import intervals
from gpuplan.record.summary import summarize
from gpuplan.scenario import deployment, files
from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.schedule import build_schedule
from gpuplan.sim import seeds
from gpuplan.sim.seeds import simulate_seeds
from gpuplan.sim.simulator import simulate
from tests.conftest import single_step

from .test_many import TIMES


def asked(**changes: Any) -> Scenario:
    return files.build(single_step(duration=2.0, seed=5, **changes), Scenario)


@pytest.mark.parametrize("workers", [1, 2])
def test_each_seed_is_what_it_is_alone(workers: int) -> None:
    scenario, done = asked(), list[int]()
    run, figures = simulate_seeds(
        scenario, build_schedule(scenario), TIMES, seeds=4, workers=workers, on_seed=done.append
    )
    assert [f.seed for f in figures] == [5, 6, 7, 8] and done == [1, 2, 3]
    assert run.meta.seed == 5 and len(run.batches) and run.decisions, "the first is a whole run"
    for told in figures:
        alone = files.build({**single_step(duration=2.0), "seed": told.seed}, Scenario)
        simulated = simulate(alone, deployment.resolve(alone), build_schedule(alone), TIMES, seed=told.seed)
        expected = intervals.main_figures(told.seed, summarize(simulated)).figures
        assert told.figures == pytest.approx(expected)


def test_one_seed_has_no_intervals_and_the_rate_is_kept() -> None:
    scenario = asked()
    run, figures = simulate_seeds(scenario, build_schedule(scenario, rate_scale=2.0), TIMES, rate_scale=2.0)
    assert figures == [] and run.meta.rate_scale == 2.0, "who plans from this run plans for that rate"


def test_a_run_too_long_for_rows_keeps_its_figures_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = asked()
    whole, _ = simulate_seeds(scenario, build_schedule(scenario), TIMES)
    monkeypatch.setattr(seeds, "ROWS_MAX", 10)
    run, _ = simulate_seeds(scenario, build_schedule(scenario), TIMES)
    assert not len(run.batches) and not run.decisions
    assert any("no rows were kept" in note for note in run.meta.notes)
    assert summarize(run)["overall"]["e2el_ms"] == pytest.approx(summarize(whole)["overall"]["e2el_ms"])
