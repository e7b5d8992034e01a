"""Readings of cards that are not there."""

from __future__ import annotations

import pytest

from gpuplan.hardware import roofline, shapes
from gpuplan.hardware.roofline import StepLoad
from gpuplan.policy.vocabulary import Arrive, Prefill, ReplicaDown, RunStep, StepDone, StepFailed
from gpuplan.record.recorder import Sample
from gpuplan.scenario import deployment, files
from gpuplan.scenario.demand import Scenario
from gpuplan.telemetry.emulated import EmulatedCards
from tests.conftest import single_step


def cards(**card: object) -> EmulatedCards:
    data = single_step(deployment={"gpu": "a100-80gb", **card})
    return EmulatedCards(deployment.resolve(files.build(data, Scenario)))


def step(step_id: int = 1, replica: str = "mood-0") -> RunStep:
    return RunStep(replica, step_id, (Prefill(1, 64, True),), (), StepLoad(64, 4096, 0, 0, 1), 0)


def begin(emulated: EmulatedCards, now_s: float, step_id: int = 1) -> None:
    emulated.decided(Arrive(1, "mood", 64), [step(step_id)], now_s=now_s)


def end(emulated: EmulatedCards, now_s: float, step_id: int = 1) -> None:
    emulated.decided(StepDone("mood-0", step_id), [], now_s=now_s)


def card_of(samples: list[Sample]) -> Sample:
    (card,) = [s for s in samples if s.slice is None]
    return card


def slice_of(samples: list[Sample]) -> Sample:
    (part,) = [s for s in samples if s.slice is not None]
    return part


def test_a_slice_busy_half_the_time() -> None:
    """A 1g slice has 14 of 108 SMs: half of it is 6.5 % of the card, and that much of the power between idle and limit."""
    emulated = cards(mig=["1g.10gb"], replicas=[{"model": "mood", "slice": "1g.10gb"}])
    emulated.read(0.0)
    begin(emulated, 0.2)
    end(emulated, 0.7)
    samples = emulated.read(1.0)
    assert slice_of(samples).gpu_utilization == pytest.approx(0.5)
    assert slice_of(samples).slice == "gpu0/1g.10gb@6"
    assert card_of(samples).gpu_utilization == pytest.approx(0.5 * 14 / 108)
    assert card_of(samples).power_w == pytest.approx(60 + (400 - 60) * 0.5 * 14 / 108)
    assert {s.source for s in samples} == {"emulated"}


def test_processes_that_share_a_slice_are_one_row() -> None:
    rows = [{"model": "mood", "slice": "1g.10gb", "processes": 2}]
    emulated = cards(mig=["1g.10gb"], replicas=rows)
    emulated.read(0.0)
    alone = slice_of(emulated.read(0.1)).memory_used_bytes
    for replica, from_s, to_s in (("mood-0", 0.2, 0.6), ("mood-1", 0.5, 0.7)):
        emulated.decided(Arrive(1, "mood", 64), [step(1, replica)], now_s=from_s)
        emulated.decided(StepDone(replica, 1), [], now_s=to_s)
    busy = slice_of(emulated.read(1.1))
    assert busy.gpu_utilization == pytest.approx(0.6)
    weights = roofline.memory_used_bytes(shapes.shape("bert-base"), 0)
    assert alone == 2 * weights


def test_a_step_that_spans_readings_is_shared_between_them() -> None:
    emulated = cards()
    emulated.read(0.0)
    begin(emulated, 0.75)
    utilizations = [card_of(emulated.read(now_s)).gpu_utilization for now_s in (1.0, 2.0)]
    end(emulated, 2.5)
    utilizations += [card_of(emulated.read(now_s)).gpu_utilization for now_s in (3.0, 4.0)]
    assert utilizations == pytest.approx([0.25, 1.0, 0.5, 0.0])


def test_energy_is_power_over_time() -> None:
    """1 s idle at 60 W, then 1 s busy at 400 W."""
    emulated = cards()
    emulated.read(0.0)
    assert card_of(emulated.read(1.0)).energy_j == pytest.approx(60)
    begin(emulated, 1.0)
    assert card_of(emulated.read(2.0)).energy_j == pytest.approx(460)


def test_memory_is_weights_and_what_the_step_holds() -> None:
    emulated = cards()
    bert = shapes.shape("bert-base")
    assert card_of(emulated.read(0.0)).memory_used_bytes == roofline.memory_used_bytes(bert, 0)
    assert card_of(emulated.read(1.0)).memory_total_bytes == 80 * 2**30


@pytest.mark.parametrize(
    "event", [StepDone("mood-0", 1), StepFailed("mood-0", 1, "engine_error"), ReplicaDown("mood-0")]
)
def test_whatever_ends_a_step_ends_its_busy_time(event: StepDone | StepFailed | ReplicaDown) -> None:
    emulated = cards()
    emulated.read(0.0)
    begin(emulated, 0.0)
    emulated.decided(event, [], now_s=0.5)
    assert card_of(emulated.read(1.0)).gpu_utilization == pytest.approx(0.5)


def test_a_late_word_of_a_lost_step_does_not_end_the_next() -> None:
    emulated = cards()
    emulated.read(0.0)
    begin(emulated, 0.0, step_id=2)
    end(emulated, 0.25, step_id=1)  # stale
    end(emulated, 1.0, step_id=2)
    assert card_of(emulated.read(1.0)).gpu_utilization == pytest.approx(1.0)


def test_two_cards_are_read_apart() -> None:
    emulated = cards(count=2, replicas=[{"model": "mood", "count": 2}])
    emulated.read(0.0)
    emulated.decided(Arrive(1, "mood", 64), [step(replica="mood-1")], now_s=0.0)
    samples = [s for s in emulated.read(1.0) if s.slice is None]
    assert [(s.gpu, s.gpu_utilization) for s in samples] == [("gpu0", 0.0), ("gpu1", 1.0)]


def test_two_readings_at_one_moment_divide_by_nothing() -> None:
    emulated = cards()
    emulated.read(1.0)
    assert card_of(emulated.read(1.0)).gpu_utilization == 0.0


def test_a_host_without_a_card_has_no_readings() -> None:
    data = single_step(models={"mood": {"builtin": "sentiment"}}, deployment={"gpu": "cpu"})
    emulated = EmulatedCards(deployment.resolve(files.build(data, Scenario)))
    begin(emulated, 0.0)
    assert emulated.read(1.0) == []


def test_what_was_done_before_the_first_reading_is_not_counted_after_it() -> None:
    emulated = cards()
    begin(emulated, 0.0)
    end(emulated, 1.0)
    emulated.read(1.0)
    assert card_of(emulated.read(2.0)).gpu_utilization == 0.0
