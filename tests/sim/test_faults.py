"""What a scenario's faults do to a simulation: who is lost, when a replica is back, exactly."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from gpuplan.policy.vocabulary import Decision, ReplicaDown, ReplicaUp
from gpuplan.record.run import Run
from gpuplan.record.summary import summarize
from gpuplan.scenario import deployment, files
from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.schedule import build_schedule
from gpuplan.sim.service_times import Fit, ServiceTimes
from gpuplan.sim.simulator import simulate
from tests.conftest import single_step

SERVICE_S = 0.02
EVERY_S = 0.05
"""A request comes every 50 ms and takes 20: step k runs from k / 20 s on."""


def run(*faults: dict[str, Any], replicas: int = 1, **rule: Any) -> Run:
    """Three seconds of one classifier whose every step takes SERVICE_S, with these faults."""
    data = single_step(
        duration=3.0,
        faults=list(faults),
        deployment={
            "gpu": "a100-80gb",
            "count": replicas,
            "replicas": [{"model": "mood", "count": replicas}],
            "batching": {"mood": {"max_batch_size": 1, **rule}},
            "breakers": {"consecutive_failures": 1000, "window": 10_000},  # none opens: faults alone decide
        },
    )
    data["traffic"][0]["arrivals"] = {"process": "constant", "rate": 1 / EVERY_S}
    return simulated(data, {("mood", "whole"): Fit(SERVICE_S, 0.0, 0.0, 0.0, (), 100, 0.0)})


def simulated(data: dict[str, Any], fits: dict[tuple[str, str], Fit]) -> Run:
    scenario = files.build(data, Scenario)
    files.check(scenario)
    supply, schedule = deployment.resolve(scenario), build_schedule(scenario)
    return simulate(scenario, supply, schedule, ServiceTimes(fits), keep_decisions=True)


def comings(done: Run) -> list[tuple[float, str, bool | None]]:
    """When replicas went down (and whether they return) and came up, after the start."""
    told: list[tuple[float, str, bool | None]] = []
    for line in done.decisions:
        decision = msgspec.json.decode(line, type=Decision)
        if isinstance(decision.event, ReplicaDown):
            told.append((round(decision.at_s, 9), f"{decision.event.replica_id} down", decision.event.returns))
        elif isinstance(decision.event, ReplicaUp) and decision.at_s > 0:
            told.append((round(decision.at_s, 9), f"{decision.event.replica_id} up", None))
    return told


def crash(at: float, back_after: float | None = None) -> dict[str, Any]:
    return {"at": at, "replica": "mood-0", "crash": {} if back_after is None else {"back_after": back_after}}


def hang(at: float, back_after: float = 0.0) -> dict[str, Any]:
    return {"at": at, "replica": "mood-0", "hang": {"back_after": back_after}}


TIMES: list[tuple[list[dict[str, Any]], list[tuple[float, str, bool | None]]]] = [
    ([crash(1.01, 0.5)], [(1.01, "down", True), (1.51, "up", None)]),
    ([crash(1.04, 0.5)], [(1.04, "down", True), (1.54, "up", None)]),  # of an idle replica
    ([crash(1.01)], [(1.01, "down", True), (1.11, "down", False)]),  # as a server's first try to load it fails
    ([crash(1.01, 0.0)], [(1.01, "down", True), (1.11, "up", None)]),  # a server takes 0.1 s to try again
    ([crash(0.0, 0.5)], [(0.0, "down", True), (0.5, "up", None)]),
    ([crash(1.0, 1.0), crash(1.5, 1.0)], [(1.0, "down", True), (2.5, "up", None)]),  # it dies again while it is down
    ([crash(1.5, 0.2), crash(1.0, 1.0)], [(1.0, "down", True), (2.0, "up", None)]),
    ([crash(1.0, 1.0), crash(1.5)], [(1.0, "down", True), (1.1, "down", False)]),
    (
        [crash(1.0, 0.5), crash(2.0, 0.5)],
        [(1.0, "down", True), (1.5, "up", None), (2.0, "down", True), (2.5, "up", None)],
    ),
    ([hang(1.01)], [(1.35, "down", True), (1.45, "up", None)]),  # the step of 1.05, after its 0.3 s
    ([hang(1.05, 1.0)], [(1.35, "down", True), (2.35, "up", None)]),
    ([hang(1.01), crash(1.2, 0.5)], [(1.2, "down", True), (1.7, "up", None)]),  # nobody is left to notice the hang
    (
        [hang(1.01), crash(1.1, 0.1), hang(1.2)],  # the second is noticed by its own time, not by the first's
        [(1.1, "down", True), (1.2, "up", None), (1.5, "down", True), (1.6, "up", None)],
    ),
    (
        [hang(1.0), hang(1.0)],  # the second takes the first step after the first
        [(1.3, "down", True), (1.4, "up", None), (1.7, "down", True), (1.8, "up", None)],
    ),
    ([crash(2.98)], []),  # after the last request has its answer
]


@pytest.mark.parametrize(("faults", "expected"), TIMES)
def test_a_replica_goes_and_comes_at_its_time(
    faults: list[dict[str, Any]], expected: list[tuple[float, str, bool | None]]
) -> None:
    told = comings(run(*faults, step_timeout=0.3))
    assert told == [(time_s, f"mood-0 {what}", returns) for time_s, what, returns in expected]


def test_what_ran_runs_again_when_the_replica_is_back_and_what_came_meanwhile_has_waited() -> None:
    done = run(crash(1.01, 0.5))
    assert (done.requests["status"] == "completed").all()
    assert done.requests["finished_s"].iloc[20] == pytest.approx(1.51 + SERVICE_S), "it ran when the replica died"
    assert done.requests["finished_s"].iloc[21] == pytest.approx(1.51 + 2 * SERVICE_S)
    starts_s = done.batches["started_s"]
    assert not ((starts_s > 0.96) & (starts_s < 1.5)).any(), "the step that was lost has no end and no row"
    assert starts_s.max() == pytest.approx(2.95), "the queue is worked off"


def test_without_a_return_the_run_ends_all_the_same_and_every_request_has_an_answer() -> None:
    done = run(crash(1.01))
    rows = done.requests
    assert (rows["status"].iloc[:20] == "completed").all()
    assert rows["finished_s"].iloc[20:23].to_list() == pytest.approx([1.11, 1.11, 1.11]), "until then there was hope"
    assert (rows["error"].iloc[20:] == "no_replica").all() and (rows["http_status"].iloc[20:] == 503).all()
    assert done.meta.measured_s == 3.0
    assert len(done.batches) == 20


def test_a_request_that_was_in_two_steps_of_which_a_replica_died_is_lost() -> None:
    rows = run(crash(1.01, 0.2), crash(1.22, 0.2)).requests
    assert rows["error"].dropna().to_dict() == {20: "replica_lost"}
    assert rows["http_status"].iloc[20] == 503 and rows["finished_s"].iloc[20] == pytest.approx(1.22)


def test_a_fault_after_the_last_answer_prolongs_nothing() -> None:
    done = run(crash(1000.0), hang(1000.0))
    assert done.meta.measured_s == 3.0
    assert done.meta.notes == []
    assert (done.requests["status"] == "completed").all()


def test_steps_are_slower_for_as_long_as_the_fault_lasts_and_the_worst_holds() -> None:
    slow = [
        {"at": 1.0, "for": 0.5, "replica": "mood-0", "slow": {"factor": 1.5}},
        {"at": 1.2, "for": 0.1, "model": "mood", "slow": {"factor": 2.0}},
    ]
    batches = run(*slow, replicas=1).batches
    k = (batches["started_s"] / EVERY_S).round().astype(int).to_numpy()
    factor = np.where((k >= 24) & (k < 26), 2.0, np.where((k >= 20) & (k < 30), 1.5, 1.0))
    np.testing.assert_allclose(batches["done_s"] - batches["started_s"], SERVICE_S * factor)


def test_answers_that_are_not_numbers_are_errors_of_the_server_while_the_fault_lasts() -> None:
    rows = run({"at": 1.0, "for": 0.5, "replica": "mood-0", "nan": {"share": 1.0}}).requests
    assert rows["error"].dropna().to_dict() == dict.fromkeys(range(20, 30), "nan_output")
    assert set(rows["http_status"].iloc[20:30]) == {500} and set(rows["status"].iloc[20:30]) == {"error"}


def test_of_a_share_of_the_answers_about_that_share_fails_and_the_same_ones_again() -> None:
    nan = {"at": 0.0, "model": "mood", "nan": {"share": 0.3}}
    first, second = (run(nan, replicas=2).requests["error"] for _ in range(2))
    assert first.equals(second)
    assert 8 <= first.notna().sum() <= 30  # of 60: 18 expected, three standard deviations of 3.5


def test_steps_that_are_too_large_have_no_memory_and_smaller_ones_follow() -> None:
    fault = {"at": 1.0, "for": 1.0, "replica": "mood-0", "out_of_memory": {"above_batch": 2}}
    done = run(fault, {"at": 1.0, "replica": "mood-0", "slow": {"factor": 12.0}}, max_batch_size=8)
    failed = done.batches[done.batches["failed"].astype(bool)]
    assert len(failed) and (failed["batch_size"] > 2).all() and (failed["done_s"] == failed["started_s"]).all()
    assert failed["started_s"].between(1.0, 2.0).all()
    ran = done.batches[~done.batches["failed"].astype(bool)]
    assert ran["batch_size"][ran["started_s"].between(1.0, 2.0)].max() == 2
    assert (done.requests["status"] == "completed").all()


def test_a_model_means_all_of_its_replicas_and_a_replica_only_itself() -> None:
    of_model = comings(run({"at": 1.01, "model": "mood", "crash": {}}, replicas=2))
    assert of_model[:2] == [(1.01, "mood-0 down", True), (1.01, "mood-1 down", True)] and len(of_model) == 4
    done = run(crash(1.01), replicas=2)
    assert {who for _, who, _ in comings(done)} == {"mood-0 down"}
    assert (done.requests["status"] == "completed").all(), "the other one takes over"
    assert set(done.requests["replica"].iloc[20:]) == {"mood-1"}


def test_times_count_from_the_first_request() -> None:
    data = single_step(duration=3.0, faults=[crash(1.0, 0.5)])
    data["traffic"][0]["arrivals"] = {"process": "poisson", "rate": 5}
    done = simulated(data, {("mood", "whole"): Fit(SERVICE_S, 0.0, 0.0, 0.0, (), 100, 0.0)})
    first_s = done.requests["arrived_s"].min()
    assert first_s > 0.05
    assert [time_s for time_s, *_ in comings(done)] == pytest.approx([first_s + 1.0, first_s + 1.5])


def test_a_run_says_what_was_injected() -> None:
    notes = run(
        crash(1.0, 0.5),
        crash(2.0),
        crash(500.0),
        hang(1.7, 1.0),
        hang(1.8),
        {"at": 1.0, "for": 0.5, "replica": "mood-0", "slow": {"factor": 2.5}},
        {"at": 0.5, "model": "mood", "nan": {"share": 0.1}},
        {"at": 1.0, "for": 60.0, "replica": "mood-0", "out_of_memory": {"above_batch": 8}},
    ).meta.notes
    assert notes == [
        "mood-0: injected at 0.5 s: 10 % of the answers are not numbers, to the end",
        "mood-0: injected at 1 s: crash, back after 0.5 s",
        "mood-0: injected at 1 s: steps take 2.5 times as long, for 0.5 s",
        "mood-0: injected at 1 s: no memory for steps of more than 8, for 60 s",
        "mood-0: injected at 1.7 s: the next step hangs, back 1 s after it is noticed",
        "mood-0: injected at 1.8 s: the next step hangs",
        "mood-0: injected at 2 s: crash, never back",
    ]


# --- models that stream -------------------------------------------------------------------------------------------


def streamed(*faults: dict[str, Any]) -> Run:
    """A request of 40 tokens every 0.2 s, to two replicas whose every step takes 20 ms."""
    talk = {
        "name": "talk",
        "model": "chat",
        "arrivals": {"process": "constant", "rate": 5},
        "prompt_tokens": 10,
        "output_tokens": 40,
    }
    card = {"gpu": "a100-80gb", "count": 2, "replicas": [{"model": "chat", "count": 2}]}
    data = single_step(
        duration=4.0, models={"chat": {"emulate": "llama-3-8b"}}, traffic=[talk], deployment=card, faults=list(faults)
    )
    return simulated(data, {("chat", "whole"): Fit(SERVICE_S, 0.0, 0.0, 0.0, (), 100, 0.0)})


def test_streams_of_a_replica_that_dies_end_where_they_are_and_all_others_go_on() -> None:
    done = streamed({"at": 2.01, "replica": "chat-0", "crash": {"back_after": 1.0}})
    rows = done.requests
    lost = rows[rows["error"].notna()]
    assert len(lost) and set(lost["error"]) == {"replica_lost"} and set(lost["replica"]) == {"chat-0"}
    assert (lost["done_s"] == 2.01).all()
    assert (lost["http_status"] == 200).all() and lost["tokens"].between(1, 39).all(), "a stream had begun"
    assert (lost["first_token_s"] < 2.01).all() and [len(g) for g in lost["gaps_ms"]] == [n - 1 for n in lost["tokens"]]
    kept = rows[rows["error"].isna()]
    assert (kept["tokens"] == 40).all()
    here = kept[kept["replica"] == "chat-0"]
    assert (here["done_s"] < 2.01).any() and (here["started_s"] >= 3.01).any()
    assert not ((here["done_s"] > 2.01) & (here["started_s"] < 3.01)).any()
    assert summarize(done)["overall"]["errors"] == {"replica_lost": len(lost)}


def test_a_stream_whose_first_token_is_not_a_number_has_none() -> None:
    rows = streamed({"at": 1.0, "for": 1.0, "replica": "chat-0", "nan": {"share": 1.0}}).requests
    bad = rows[rows["error"].notna()]
    assert len(bad) and set(bad["error"]) == {"nan_output"} and set(bad["replica"]) == {"chat-0"}
    assert set(bad["http_status"]) == {500} and (bad["tokens"] == 0).all() and bad["first_token_s"].isna().all()
    assert bad["started_s"].between(1.0, 2.0).all()
    others = rows[rows["error"].isna()]
    assert (others["tokens"] == 40).all(), "a stream that has begun goes on"
    assert not ((others["replica"] == "chat-0") & others["started_s"].between(1.0, 2.0, inclusive="left")).any()
