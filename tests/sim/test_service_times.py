"""Where a simulation's times come from, and that it says so."""

from __future__ import annotations

import pytest

from gpuplan.errors import RunError
from gpuplan.hardware import mig, slices
from gpuplan.hardware.engines import TIMES
from gpuplan.hardware.roofline import StepLoad
from gpuplan.scenario import deployment, files
from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.deployment import Deployment
from gpuplan.sim.service_times import Fit, ServiceTimes, step_costs
from tests.conftest import single_step

LOAD = StepLoad(640, 640 * 64, 0, 0, 10)
FIT = Fit(fixed_s=0.001, roofline_factor=2.0, per_token_s=1e-6, per_sample_s=1e-4, ratios=(), steps=100, error=0.05)


def supply(**card: object) -> Deployment:
    return deployment.resolve(files.build(single_step(deployment={"gpu": "a100-80gb", **card}), Scenario))


@pytest.mark.parametrize(
    ("fits", "basis"),
    [
        ({("mood", "whole"): FIT}, "fitted"),  # this very slice
        ({("mood", "1g.10gb"): FIT}, "scaled"),  # another slice of the card
        ({("mood", "cpu"): FIT}, "roofline"),  # a CPU says nothing of a GPU
        ({("other", "whole"): FIT}, "roofline"),
        ({}, "roofline"),
    ],
)
def test_the_basis_is_named(fits: dict[tuple[str, str], Fit], basis: str) -> None:
    times, here = ServiceTimes(fits), supply()
    (replica,) = here.replicas
    costs = step_costs(here, replica)
    assert costs is not None
    base = costs.step_s
    assert times.basis(replica) == basis
    expected = base(LOAD) if basis == "roofline" else 0.001 + 2 * base(LOAD) + 640e-6 + 10e-4
    assert times.timer(here, replica)(LOAD) == pytest.approx(expected)


def test_of_two_neighbours_the_better_measured_counts() -> None:
    worse = Fit(9.0, 0.0, 0.0, 0.0, (), 5, 0.5)
    times, here = ServiceTimes({("mood", "1g.10gb"): worse, ("mood", "2g.20gb"): FIT}), supply()
    assert times.timer(here, here.replicas[0])(LOAD) < 1.0


def test_a_cpu_has_to_be_measured() -> None:
    data = single_step(models={"mood": {"builtin": "sentiment"}}, deployment={"gpu": "cpu"})
    here = deployment.resolve(files.build(data, Scenario))
    (replica,) = here.replicas
    with pytest.raises(RunError, match="no service times for mood on cpu: measure it first"):
        ServiceTimes({}).timer(here, replica)
    measured = ServiceTimes({("mood", "cpu"): FIT})
    assert measured.basis(replica) == "fitted"
    assert measured.timer(here, replica)(LOAD) == pytest.approx(0.001 + 640e-6 + 10e-4), "no roofline to multiply"


def test_what_has_no_shape_is_carried_over_by_the_speed_of_the_slices() -> None:
    """An ONNX file measured on 1g: on 3g the fixed part stays, what grows with the work shrinks."""
    card = {"gpu": "a100-80gb", "mig": ["3g.40gb", "1g.10gb"], "replicas": [{"model": "mood", "slice": "3g.40gb"}]}
    data = single_step(models={"mood": {"onnx": "mood.onnx"}}, deployment=card)
    here = deployment.resolve(files.build(data, Scenario))
    (replica,) = here.replicas
    times = ServiceTimes({("mood", "1g.10gb"): FIT})
    assert times.basis(replica) == "scaled"
    assert here.gpu is not None and replica.slice.profile is not None
    small, large = (mig.profile(here.gpu, name) for name in ("1g.10gb", "3g.40gb"))
    faster = slices.speed(here.gpu, large) / slices.speed(here.gpu, small)
    assert 3 < faster < 4
    assert times.timer(here, replica)(LOAD) == pytest.approx(0.001 + (640e-6 + 10e-4) / faster)


def test_a_file_whose_shape_is_known_has_to_be_measured_all_the_same() -> None:
    """Its shape says what fits into memory, not how near to a roofline its graph runs."""
    shape = {"layers": 6, "hidden": 384, "heads": 12, "ffn": 1536, "vocabulary": 30522, "context_tokens_max": 512}
    card = {"gpu": "a100-80gb", "mig": ["1g.10gb"]}
    data = single_step(models={"mood": {"onnx": "mood.onnx", "onnx_shape": shape}}, deployment=card)
    here = deployment.resolve(files.build(data, Scenario))
    with pytest.raises(RunError, match="measure it first"):
        ServiceTimes({}).timer(here, here.replicas[0])
    assert ServiceTimes({("mood", "1g.10gb"): FIT}).timer(here, here.replicas[0])(LOAD) > 0


def test_a_request_s_way_is_the_engine_s_unless_it_was_measured() -> None:
    data = single_step(models={"mood": {"emulate": "bert-base"}})
    built_in = deployment.resolve(files.build(data, Scenario))
    vllm = deployment.resolve(files.build({**data, "deployment": {**data["deployment"], "engine": "vllm"}}, Scenario))
    assert ServiceTimes({}).uplinks_s(built_in) == (0.0,)
    assert ServiceTimes({}).uplinks_s(vllm) == (TIMES["vllm"].request_s,)
    assert ServiceTimes({}, uplink_s=(0.001, 0.002)).uplinks_s(vllm) == (0.001, 0.002)
