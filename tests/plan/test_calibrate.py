"""Fits find the law that made the steps; the back-test of a simulation by itself is near zero."""

from __future__ import annotations

import dataclasses

import pytest

from gpuplan.hardware.roofline import StepLoad
from gpuplan.plan import calibrate
from gpuplan.record.run import Run
from gpuplan.scenario import deployment
from gpuplan.sim.service_times import Fit, ServiceTimes

from .conftest import scenario, simulated

CHAT, MOOD = ("chat", "3g.40gb"), ("mood", "1g.10gb")


def test_the_fit_of_a_roofline_run_is_the_roofline(run: Run) -> None:
    times = calibrate.fit(run)
    for key in (CHAT, MOOD):
        fit = times.fits[key]
        assert fit.error < 1e-6
        assert fit.roofline_factor == pytest.approx(1, rel=1e-3)
        assert fit.ratios[0] == pytest.approx(1)


def test_a_slower_card_with_a_fixed_cost_is_found() -> None:
    law = Fit(0.002, 1.5, 0.0, 0.0, (0.9, 1.0, 1.1), 1, 0.0)
    asked = scenario()
    fit = calibrate.fit(simulated(asked, ServiceTimes({CHAT: law, MOOD: law}))).fits[CHAT]
    timer = ServiceTimes({CHAT: law}).timer(deployment.resolve(asked), deployment.resolve(asked).replicas[0])
    found = ServiceTimes({CHAT: fit}).timer(deployment.resolve(asked), deployment.resolve(asked).replicas[0])
    for load in (StepLoad(0, 0, 4, 4000, 4), StepLoad(500, 125_000, 2, 900, 3)):
        assert found(load) == pytest.approx(timer(load), rel=0.03)
    assert fit.ratios[0] == pytest.approx(0.9, rel=0.05)
    assert fit.ratios[-1] == pytest.approx(1.1, rel=0.05)


def test_without_a_roofline_tokens_and_samples_are_fitted() -> None:
    law = Fit(0.001, 0.0, 2e-6, 3e-4, (), 1, 0.0)
    asked = scenario(
        models={"mood": {"builtin": "sentiment"}},
        traffic=[
            {
                "name": "mood",
                "model": "mood",
                "arrivals": {"process": "poisson", "rate": 400},
                "prompt_tokens": {"uniform": {"min": 10, "max": 900}},
            }
        ],
        deployment={"gpu": "cpu", "batching": {"mood": {"max_batch_size": 8}}},
    )
    fit = calibrate.fit(simulated(asked, ServiceTimes({("mood", "cpu"): law}))).fits[("mood", "cpu")]
    assert fit.per_token_s == pytest.approx(2e-6, rel=0.02)
    assert fit.per_sample_s == pytest.approx(3e-4, rel=0.02)
    assert fit.fixed_s == pytest.approx(1e-3, rel=0.05)


def test_too_few_steps_are_not_fitted(run: Run) -> None:
    few = dataclasses.replace(run, batches=run.batches.head(calibrate.STEPS_MIN - 1))
    assert calibrate.fit(few).fits == {}


def test_a_simulation_predicts_itself(run: Run) -> None:
    result = calibrate.backtest(run)
    assert result is not None
    assert result["worst_percent"] < 0.5
    assert "classes.chat.ttft_ms.p50" in result["error_percent"]
    assert "classes.chat.ttft_ms.p99" not in result["error_percent"], (
        "a p99 of 15 requests is not held against anything"
    )


def test_a_prediction_above_the_measurement_is_a_positive_error(run: Run) -> None:
    slowed = run.requests.copy()
    slowed["done_s"] = slowed["scheduled_s"] + (slowed["done_s"] - slowed["scheduled_s"]) / 2
    result = calibrate.backtest(dataclasses.replace(run, requests=slowed))
    assert result is not None
    assert result["error_percent"]["classes.mood.e2el_ms.p50"] == pytest.approx(100, abs=5)


def test_a_noisy_host_does_not_lead_the_fit_astray() -> None:
    noisy = (0.25, 0.7, 0.9, 0.95, 1.0, 1.0, 1.05, 1.1, 1.2, 4.0)
    law = Fit(0.001, 0.0, 1e-7, 1e-5, noisy, 1, 0.0)
    asked = scenario(
        models={"mood": {"builtin": "sentiment"}},
        traffic=[
            {
                "name": "mood",
                "model": "mood",
                "arrivals": {"process": "poisson", "rate": 60},
                "prompt_tokens": {"lognormal": {"p50": 30, "p95": 900}},
            }
        ],
        deployment={"gpu": "cpu"},
    )
    fit = calibrate.fit(simulated(asked, ServiceTimes({("mood", "cpu"): law}))).fits[("mood", "cpu")]
    for tokens in (30, 1500):
        load = StepLoad(tokens, tokens * tokens, 0, 0, 1)
        assert fit.seconds(load, 0.0) == pytest.approx(law.seconds(load, 0.0), rel=0.25)


def test_steps_that_an_injected_fault_slowed_are_not_the_cards() -> None:
    slow = [{"at": 5.0, "for": 10.0, "replica": "chat-0", "slow": {"factor": 5.0}}]
    done = simulated(scenario(faults=slow))
    steps = done.batches[done.batches["replica"] == "chat-0"]
    assert (steps["started_s"] - done.requests["arrived_s"].min()).between(5.0, 15.0).mean() > 0.05
    fit = calibrate.fit(done).fits[CHAT]
    assert fit.error < 1e-6 and fit.roofline_factor == pytest.approx(1, rel=1e-3)
