"""Rows from decisions: each event leaves what a reader of the tables expects, and nothing else."""

from __future__ import annotations

import msgspec
import numpy as np

from gpuplan.policy.core import ServingCore
from gpuplan.policy.vocabulary import Arrive, Cancel, Decision, Event, ReplicaDown, ReplicaUp, StepDone, StepFailed
from gpuplan.record.recorder import Answer, Recorder, ServerRows, assemble
from gpuplan.record.summary import queue_depth
from gpuplan.scenario import deployment as supply
from gpuplan.scenario import files
from gpuplan.scenario.demand import Scenario
from tests.conftest import single_step


def recorded(*events: tuple[float, Event], size: int = 1) -> Recorder:
    """A recorder that has followed one replica, `mood-0`, up from 0 s, through these events."""
    card = {"gpu": "a100-80gb", "replicas": [{"model": "mood"}], "batching": {"mood": {"max_batch_size": size}}}
    deployment = supply.resolve(files.build(single_step(deployment=card), Scenario))
    core, recorder = ServingCore(deployment), Recorder(deployment, keep_tokens=True)
    for now_s, event in [(0.0, ReplicaUp("mood-0")), *events]:
        recorder.decided(event, core.handle(event, now_s=now_s), now_s=now_s)
    return recorder


def ask(request_id: int) -> Arrive:
    return Arrive(request_id, "mood", 10, client_id=str(request_id))


def rows(recorder: Recorder, *columns: str) -> list[tuple[object, ...]]:
    table = recorder.server_rows().served[list(columns)]
    return [tuple(None if v != v else v for v in row) for row in table.itertuples(index=False)]


def test_a_request_s_way() -> None:
    recorder = recorded((1.0, ask(1)), (2.0, ask(2)), (4.0, StepDone("mood-0", 1)), (5.0, StepDone("mood-0", 2)))
    assert rows(recorder, "client_id", "replica", "arrived_s", "started_s", "finished_s") == [
        ("1", "mood-0", 1.0, 1.0, 4.0),
        ("2", "mood-0", 2.0, 4.0, 5.0),
    ]
    steps = recorder.server_rows().batches[["step_id", "started_s", "done_s", "batch_size", "waiting", "failed"]]
    assert [tuple(row) for row in steps.itertuples(index=False)] == [
        (1, 1.0, 4.0, 1, 0, False),
        (2, 4.0, 5.0, 1, 0, False),
    ]
    assert [recorder.served[i].token_s for i in (1, 2)] == [[4.0], [5.0]]


def test_times_count_from_the_start_of_the_run() -> None:
    served = recorded((101.0, ask(1)), (104.0, StepDone("mood-0", 1))).server_rows(start_s=100.0).served
    assert (served["arrived_s"][0], served["finished_s"][0]) == (1.0, 4.0)


def test_a_failed_step_is_a_row_and_gives_no_token() -> None:
    recorder = recorded((1.0, ask(1)), (2.0, StepFailed("mood-0", 1, "engine_error")))
    assert recorder.server_rows().batches["failed"].tolist() == [True]
    assert recorder.served[1].outcome == "engine_error"
    assert recorder.served[1].token_s == [] and recorder.served[1].first_token_s is None


def test_a_late_word_of_a_lost_step_is_not_taken_for_the_next_step() -> None:
    """The replica came back and runs step 2 when step 1's end is heard: step 2 is not over, its request has no token."""
    recorder = recorded(
        (1.0, ask(1)),
        (2.0, ReplicaDown("mood-0")),
        (3.0, ReplicaUp("mood-0")),
        (4.0, ask(2)),
        (4.5, StepDone("mood-0", 1)),  # stale
        (6.0, StepDone("mood-0", 2)),
    )
    steps = recorder.server_rows().batches
    assert list(zip(steps["step_id"], steps["done_s"], strict=True)) == [(2, 6.0)]
    assert recorder.served[2].token_s == [6.0]


def test_who_cancels_leaves_the_queue() -> None:
    recorder = recorded((1.0, ask(1)), (1.5, ask(2)), (3.0, Cancel(2)), (4.0, StepDone("mood-0", 1)))
    answers = [
        Answer(
            request_id=i,
            traffic_class="mood",
            model="mood",
            warmup=False,
            prompt_tokens=10,
            output_tokens=0,
            scheduled_s=1.0,
        )
        for i in (1, 2)
    ]
    told = recorder.server_rows()
    depth = queue_depth(assemble(answers, told).requests, "mood", np.array([2.0, 3.5, 9.0]))
    assert depth is not None
    assert depth.tolist() == [1, 0, 0]


def test_the_log_holds_every_event_and_can_be_left_out() -> None:
    recorder = recorded((1.0, ask(1)), (2.0, StepDone("mood-0", 1)))
    log = [msgspec.json.decode(line, type=Decision) for line in recorder.decisions]
    assert [type(d.event) for d in log] == [ReplicaUp, Arrive, StepDone]
    assert [d.at_s for d in log] == [0.0, 1.0, 2.0]
    deployment = supply.resolve(files.build(single_step(), Scenario))
    silent = Recorder(deployment, keep_decisions=False)
    silent.decided(ReplicaUp("mood-0"), [], now_s=0.0)
    assert silent.decisions == []


def test_answers_the_server_never_saw_keep_their_row() -> None:
    answer = Answer(
        request_id=7,
        traffic_class="mood",
        model="mood",
        warmup=False,
        prompt_tokens=1,
        output_tokens=0,
        scheduled_s=0.5,
        status="error",
        error="connection",
    )
    tables = assemble([answer], ServerRows(*recorded().server_rows()))
    assert tables.requests["error"].tolist() == ["connection"]
    assert tables.requests["arrived_s"].isna().all()
