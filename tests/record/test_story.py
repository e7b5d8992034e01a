"""One request's story, from logs of real cores: every table is fed to a core whose numbers are not the clients'."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import pytest

from gpuplan.errors import InputError
from gpuplan.policy.core import ServingCore
from gpuplan.policy.vocabulary import (
    OUT_OF_MEMORY,
    Action,
    Arrive,
    Assign,
    Cancel,
    Complete,
    Decision,
    Drain,
    Event,
    Reject,
    ReplicaDown,
    ReplicaUp,
    RunStep,
    Scale,
    StartReplica,
    StepDone,
    StepFailed,
    Swap,
    Trip,
    VersionAdded,
    Wake,
)
from gpuplan.record import story
from gpuplan.record.run import REQUEST_COLUMNS, Run
from gpuplan.record.story import Story, tell
from gpuplan.scenario import deployment as supply
from gpuplan.scenario import files
from gpuplan.scenario.schedule import build_schedule
from gpuplan.sim.service_times import ServiceTimes
from gpuplan.sim.simulator import simulate
from tests.conftest import REPOSITORY
from tests.policy.conftest import deployment, started

FIRST = 40
"""What lies between a client's id and the core's number, as in a live log."""
ONE_AT_A_TIME = {"max_batch_size": 1}


def row(request_id: int, **cells: Any) -> dict[str, Any]:
    """A row of requests.parquet, of a request scheduled at 0.9 s and answered at `done_s`."""
    known = {"request_id": request_id, "traffic_class": "talk", "model": "chat", "prompt_tokens": 100}
    times = {"output_tokens": 3, "scheduled_s": 0.9, "sent_s": 0.95, "tokens": 0, "status": "completed"}
    return {**dict.fromkeys(REQUEST_COLUMNS), **known, **times, **cells}


def ask(client: int, tokens: int = 3, *, prompt: int = 100, model: str = "chat", **more: Any) -> Arrive:
    return Arrive(FIRST + client, model, prompt, tokens, str(client), **more)


def log(core: ServingCore, table: Iterable[tuple[float, Event]]) -> list[bytes]:
    """The decision log of a core that meets these events."""
    encode = msgspec.json.Encoder().encode
    return [encode(Decision(now_s, event, core.handle(event, now_s=now_s))) for now_s, event in table]


def short(told: Story) -> list[str]:
    """What happened after the sending, a moment in a few words."""
    return [f"{m.at_s:g} {_short(m)}" if m.at_s is not None else _short(m) for m in told.moments[1:]]


def _short(moment: story.Moment) -> str:
    match moment:
        case story.Waits(replica=replica, ahead=ahead, taken_from=taken_from, cause=cause):
            return f"{cause} {replica} behind {ahead}" + (f" from {taken_from}" if taken_from else "")
        case story.Starts(replica=replica, step_id=step_id, tokens=tokens, batch_size=size):
            return f"starts {replica} #{step_id} {tokens} in {size}"
        case story.Steps(phase=phase, steps=steps, batch_size_min=least, batch_size_max=most, sat_out=sat_out):
            return f"{phase} x{steps} in {least}-{most} without {sat_out}"
        case story.StepFails(step_id=step_id, reason=reason, others=others):
            return f"failed #{step_id} {reason} with {' '.join(others)}"
        case story.RunsAgain(step_id=step_id, others=others):
            return f"again #{step_id} with {' '.join(others)}"
        case story.ReplicaLost(replica=replica, reason=reason, started=started, step_id=step_id, tokens=tokens):
            return f"down {replica} {reason} {started} #{step_id} {tokens}"
        case story.Ended(outcome=outcome, reason=reason):
            return f"{outcome} {reason}".rstrip()
        case story.Note(missing=missing):
            return missing
        case _:
            return moment.kind


def end(told: Story) -> story.Ended:
    (ended,) = [m for m in told.moments if isinstance(m, story.Ended)]
    return ended


def parts(told: Story) -> dict[str, float]:
    """Where its time went, in seconds."""
    ended = end(told)
    assert math.isclose(sum(p.seconds for p in ended.parts), ended.total_s, abs_tol=1e-9), "the parts are all of it"
    assert not ended.parts or math.isclose(sum(p.share for p in ended.parts), 1.0)
    return {p.name: round(p.seconds, 6) for p in ended.parts}


def test_a_long_prompt_and_an_answer_in_company() -> None:
    core = started(deployment(chat=[None], chats={"max_batch_tokens": 60}))
    lines = log(
        core,
        [
            (1.0, ask(1, 9, prompt=10)),
            (1.1, ask(7, 3)),
            (1.2, StepDone("chat-0", 1)),  # 7 starts: 59 of its 100 tokens, beside 1's
            (1.3, StepDone("chat-0", 2)),  # the other 41
            (1.5, StepDone("chat-0", 3)),  # its first token
            (1.6, StepDone("chat-0", 4)),
            (1.9, StepDone("chat-0", 5)),  # its third and last
        ],
    )
    told = tell(row(7, first_token_s=1.55, done_s=2.0), lines)
    assert short(told) == [
        "1.1 arrived",
        "1.1 arrival chat-0 behind 0",
        "1.2 starts chat-0 #2 59 in 2",
        "1.3 prompt x1 in 2-2 without 0",
        "1.55 first_token",
        "1.5 decode x2 in 2-2 without 0",
        "2 completed",
    ]
    assert told.moments[0] == story.Scheduled(0.9, pytest.approx(0.05))
    first, steps = told.moments[5], told.moments[6]
    assert isinstance(first, story.FirstToken) and isinstance(steps, story.Steps)
    assert (first.ttft_ms, first.server_s) == (pytest.approx(650.0), 1.5)
    assert (steps.mean_s, steps.longest_s) == (pytest.approx(0.2), pytest.approx(0.3))
    assert (steps.longest_step_id, steps.longest_prefills) == (5, 0)
    assert parts(told) == {"on_the_way": 0.3, "waiting": 0.1, "prompt": 0.3, "decoding": 0.4}


def test_the_longest_step_says_that_it_read_prompts_of_others() -> None:
    core = started(deployment(chat=[None]))
    table = [(1.0, ask(7)), (1.1, ask(8)), (1.2, StepDone("chat-0", 1)), (1.9, StepDone("chat-0", 2))]
    told = tell(row(7), log(core, [*table, (2.0, StepDone("chat-0", 3))]))
    (steps,) = [m for m in told.moments if isinstance(m, story.Steps)]
    assert (steps.longest_step_id, steps.longest_prefills, steps.steps) == (2, 1, 2)


def test_one_that_another_replica_takes_over() -> None:
    core = started(deployment(chat=[None, None], chats=ONE_AT_A_TIME))
    lines = log(
        core,
        [
            (1.0, ask(1, 50)),
            (1.0, ask(2, 60)),
            (1.0, ask(7, 1)),
            (1.02, StepDone("chat-1", 2, (FIRST + 2,))),
            (1.05, StepDone("chat-1", 3)),
        ],
    )
    told = tell(row(7, first_token_s=1.06, done_s=1.06), lines)
    assert short(told) == [
        "1 arrived",
        "1 arrival chat-0 behind 0",
        "1.02 stolen chat-1 behind 0 from chat-0",
        "1.02 starts chat-1 #3 100 in 1",
        "1.06 first_token",
        "1.06 completed",
    ]
    assert parts(told) == {"on_the_way": 0.11, "waiting": 0.02, "prompt": 0.03}


REFUSALS = [
    # before it, its own arrival, reason, seconds after which to try again
    ([(1.0, ask(1)), (1.0, ask(2))], ask(7), "queue_full", 1.0),
    ([(1.0, Drain())], ask(7), "draining", 1.0),
    ([], ask(7, 5000), "too_long", 0.0),
    ([(1.0, ReplicaDown("chat-0", "killed"))], ask(7), "no_replica", 1.0),
]


@pytest.mark.parametrize(("before", "arrival", "reason", "retry_after_s"), REFUSALS, ids=[r[2] for r in REFUSALS])
def test_one_that_is_refused(
    before: list[tuple[float, Event]], arrival: Arrive, reason: str, retry_after_s: float
) -> None:
    core = started(deployment(chat=[4000], chats={"max_queue_size": 1, "max_batch_size": 1}))
    told = tell(row(7, status="rejected", done_s=1.2, http_status=503), log(core, [*before, (1.1, arrival)]))
    assert short(told) == ["1.1 arrived", f"1.1 refused {reason}", "1.2 answered"]
    assert end(told).retry_after_s == retry_after_s
    assert parts(told) == {"on_the_way": 0.2}


def test_a_step_that_fails_is_split_down_to_the_culprit() -> None:
    core = started(deployment(mood=1, moods={"max_batch_size": 8}))
    ids = (1, 7, 8, 9)
    lines = log(
        core,
        [
            (1.0, ask(0, 0, model="mood")),
            *((1.1, ask(i, 0, model="mood")) for i in ids),
            (1.2, StepDone("mood-0", 1)),
            (1.3, StepFailed("mood-0", 2, "engine_error")),
            (1.4, StepFailed("mood-0", 3, "engine_error")),
            (1.5, StepDone("mood-0", 4)),
            (1.6, StepFailed("mood-0", 5, "engine_error")),
        ],
    )
    before = ["1.1 arrived", "1.1 arrival mood-0 behind 1", "1.2 starts mood-0 #2 100 in 4"]
    culprit = tell(row(7, model="mood", output_tokens=0, status="error", http_status=500), lines)
    assert short(culprit) == [
        *before,
        "1.3 failed #2 engine_error with 1 8 9",
        "1.3 again #3 with 1",
        "1.4 failed #3 engine_error with 1",
        "1.5 again #5 with ",
        "1.6 failed #5 engine_error with ",
        "1.6 failed engine_error",
        "answered",
    ]
    assert parts(culprit) == {"on_the_way": 0.2, "waiting": 0.1, "running": 0.1, "lost": 0.3}
    mate = tell(row(1, model="mood", output_tokens=0, done_s=1.5), lines)
    assert short(mate)[-2:] == ["1.4 again #4 with ", "1.5 completed"]
    assert parts(mate) == {"on_the_way": 0.2, "waiting": 0.1, "running": 0.1, "lost": 0.2}


def test_steps_without_it_are_counted_while_halves_take_turns() -> None:
    core = started(deployment(chat=[None]))
    table: list[tuple[float, Event]] = [(1.0, ask(1, 9)), (1.1, ask(7, 3)), (1.1, ask(3, 9))]
    table += [(1.2, StepDone("chat-0", 1)), (1.3, StepDone("chat-0", 2))]
    table += [(1.4, StepFailed("chat-0", 3, OUT_OF_MEMORY))]
    table += [(1.5 + i / 10, StepDone("chat-0", 4 + i)) for i in range(6)]
    lines = log(core, table)
    told = tell(row(7), lines)
    failed = "1.4 failed #3 out_of_memory with 1 3"
    assert failed in short(told)
    again = next(m for m in told.moments if isinstance(m, story.RunsAgain))
    named = [FIRST + int(i) for i in again.others]
    ran = [
        (action.step_id, {*action.decodes, *(p.request_id for p in action.prefills)})
        for line in lines
        for action in msgspec.json.decode(line, type=Decision).actions
        if isinstance(action, RunStep)
    ]
    assert dict(ran)[again.step_id] == {FIRST + 7, *named}, "who ran with it is who is named"
    mine = [i for i, (_, members) in enumerate(ran) if FIRST + 7 in members]
    start = next(i for i, (step_id, _) in enumerate(ran) if step_id == 4)
    sat_out = sum(m.sat_out for m in told.moments if isinstance(m, story.Steps))
    assert sat_out == sum(1 for i in range(start, mine[-1]) if i not in mine) > 0


def test_a_mate_whose_client_gave_no_id_has_the_core_s_number() -> None:
    core = started(deployment(mood=1))
    unnamed = Arrive(5, "mood", 10)
    table = [(1.0, ask(0, 0, model="mood")), (1.1, ask(7, 0, model="mood")), (1.1, unnamed)]
    lines = log(core, [*table, (1.2, StepDone("mood-0", 1)), (1.3, StepFailed("mood-0", 2, "engine_error"))])
    assert "1.3 failed #2 engine_error with [5]" in short(tell(row(7, output_tokens=0), lines))


def test_a_replica_that_is_lost_before_the_first_token_costs_a_second_try() -> None:
    core = started(deployment(chat=[None, None]))
    lines = log(
        core,
        [
            (1.0, ask(7, 2)),
            (1.3, ReplicaDown("chat-0", "killed", True)),
            (1.4, StepDone("chat-1", 2)),
            (1.5, StepDone("chat-1", 3)),
        ],
    )
    told = tell(row(7, first_token_s=1.4, done_s=1.5), lines)
    assert short(told) == [
        "1 arrived",
        "1 arrival chat-0 behind 0",
        "1 starts chat-0 #1 100 in 1",
        "1.3 down chat-0 killed True #1 0",
        "1.3 lost chat-1 behind 0 from chat-0",
        "1.3 starts chat-1 #2 100 in 1",
        "1.4 first_token",
        "1.4 decode x1 in 1-1 without 0",
        "1.5 completed",
    ]
    assert parts(told) == {"on_the_way": 0.1, "lost": 0.3, "prompt": 0.1, "decoding": 0.1}


def test_a_replica_that_is_lost_after_the_first_token_takes_the_answer_with_it() -> None:
    core = started(deployment(chat=[None, None]))
    lines = log(core, [(1.0, ask(7, 9)), (1.1, StepDone("chat-0", 1)), (1.3, ReplicaDown("chat-0", "killed"))])
    told = tell(row(7, first_token_s=1.1, done_s=1.4, status="error", error="in_stream"), lines)
    assert short(told)[3:] == [
        "1.1 first_token",
        "1.3 down chat-0 killed True #2 1",
        "1.3 failed replica_lost",
        "1.4 answered",
    ]


def test_a_late_word_of_a_lost_step_is_not_taken_for_the_new_one() -> None:
    core = started(deployment(chat=[None]))
    table: list[tuple[float, Event]] = [(1.0, ask(7, 1)), (1.3, ReplicaDown("chat-0", "killed", True))]
    table += [(1.4, ReplicaUp("chat-0")), (1.5, StepDone("chat-0", 1)), (1.6, StepDone("chat-0", 2))]
    assert short(tell(row(7, done_s=1.6), log(core, table)))[3:] == [
        "1.3 down chat-0 killed True #1 0",
        "1.3 lost chat-0 behind 0",  # told once, though the core places it twice
        "1.4 starts chat-0 #2 100 in 1",
        "1.6 first_token",
        "1.6 completed",
    ]


def test_one_that_only_waits_for_a_lost_replica_moves_or_waits_again() -> None:
    core = started(deployment(chat=[None], chats=ONE_AT_A_TIME))
    lines = log(core, [(1.0, ask(1, 9)), (1.1, ask(7, 1)), (1.2, ReplicaDown("chat-0", "killed", True))])
    told = tell(row(7, status="interrupted"), lines)
    assert short(told)[2:] == [
        "1.2 down chat-0 killed False #None 0",
        "1.2 lost chat-0 behind 1",  # 1, which was running, goes first
        "no_end",
        "answered",
    ]


def test_one_whose_deadline_passes() -> None:
    core = started(deployment(chat=[None]))
    lines = log(core, [(1.0, ask(7, 9, timeout_s=0.5)), (1.2, StepDone("chat-0", 1)), (1.5, Wake())])
    told = tell(row(7, first_token_s=1.2, done_s=1.6, status="error", error="timeout"), lines)
    assert short(told)[3:] == ["1.2 first_token", "1.5 failed timeout", "1.6 answered"]
    assert parts(told) == {"on_the_way": 0.1, "prompt": 0.2, "decoding": 0.3}


def test_one_whose_client_leaves() -> None:
    core = started(deployment(chat=[None]))
    lines = log(core, [(1.0, ask(7, 9)), (1.05, ask(8, 9)), (1.1, Cancel(FIRST + 7)), (1.2, StepDone("chat-0", 1))])
    told = tell(row(7, status="error", error="abandoned"), lines)
    assert short(told)[2:] == ["1 starts chat-0 #1 100 in 1", "1.1 cancelled", "answered"]
    other = short(tell(row(8), lines))
    assert "1.1 cancelled" not in other, "the other client's leaving is not its own"


def test_one_that_waits_while_its_model_is_swapped() -> None:
    core = started(deployment(chat=[None], chats=ONE_AT_A_TIME))
    lines = log(
        core,
        [
            (1.0, ask(1, 50)),
            (1.1, ask(7, 1)),
            (1.2, VersionAdded("chat-0#2", "chat-0")),
            (1.3, Swap("chat", ("chat-0#2",), ("chat-0",))),
            (1.35, StepDone("chat-0", 1)),  # of the old version: not its own
            (1.4, StepDone("chat-0#2", 2)),
        ],
    )
    told = tell(row(7, first_token_s=1.4, done_s=1.4), lines)
    assert short(told)[1:] == [
        "1.1 arrival chat-0 behind 0",
        "1.3 swapped chat-0#2 behind 0 from chat-0",
        "1.3 starts chat-0#2 #2 100 in 1",
        "1.4 first_token",
        "1.4 completed",
    ]


def test_a_replica_that_fails_too_often_is_left_by_those_that_wait() -> None:
    """By hand: the breaker's counting is not what is looked at."""
    moved = [Trip("chat-0", "open", "5 failures"), Assign(47, "chat-1", 2, 0.5, "chat-0")]
    decisions = [
        Decision(1.0, ask(7), [Assign(47, "chat-0", 0, 0.5)]),
        Decision(1.1, StepFailed("chat-0", 1, "engine_error"), [*moved]),
    ]
    told = tell(row(7), [msgspec.json.encode(d) for d in decisions])
    assert short(told)[2:4] == ["1.1 left_alone", "1.1 left_alone chat-1 behind 2 from chat-0"]


SCALED = [
    ([Scale("chat", 1, "few ask")], "stopped"),
    ([Scale("chat", 3, "many ask"), StartReplica("chat-2")], "stolen"),  # more come, and another took it meanwhile
    ([], "stolen"),
]


@pytest.mark.parametrize(("scaled", "cause"), SCALED, ids=["fewer", "more", "as many"])
def test_a_replica_that_is_to_stop_is_left_by_those_that_wait(scaled: list[Action], cause: str) -> None:
    decisions = [
        Decision(1.0, ask(7), [Assign(47, "chat-0", 0, 0.5)]),
        Decision(1.1, Wake(), [*scaled, Assign(47, "chat-1", 2, 0.5, "chat-0")]),
    ]
    told = tell(row(7), [msgspec.json.encode(d) for d in decisions])
    assert short(told)[2] == f"1.1 {cause} chat-1 behind 2 from chat-0"


def test_an_answer_that_is_no_number_is_no_step_that_went_well() -> None:
    core = started(deployment(chat=[None]))
    table: list[tuple[float, Event]] = [(1.0, ask(7, 5)), (1.1, StepDone("chat-0", 1)), (1.2, StepDone("chat-0", 2))]
    table.append((1.3, StepDone("chat-0", 3, failed=((FIRST + 7, "nan_output"),))))
    told = tell(row(7, first_token_s=1.1, status="error"), log(core, table))
    assert short(told)[3:] == ["1.1 first_token", "1.1 decode x1 in 1-1 without 0", "1.3 failed nan_output", "answered"]


def test_another_replica_s_end_is_not_its_own() -> None:
    """At 1.47 s, so that its number, 47, is in the line."""
    core = started(deployment(chat=[None, None]))
    lines = log(core, [(1.0, ask(7, 1)), (1.47, ReplicaDown("chat-1", "killed")), (1.5, StepDone("chat-0", 1))])
    assert b"47" in lines[1]
    assert short(tell(row(7, done_s=1.5), lines))[3:] == ["1.5 first_token", "1.5 completed"]


def test_a_key_that_reads_like_an_id_is_none() -> None:
    core = started(deployment(chat=[None]))
    lines = log(core, [(1.0, ask(7, 1)), (1.2, ask(8, 1, key="7")), (1.3, StepDone("chat-0", 1))])
    assert short(tell(row(7), lines))[0] == "1 arrived"


# --- what is not there --------------------------------------------------------------------------------------------


def test_without_a_log_the_row_speaks_alone() -> None:
    seen = row(7, first_token_s=1.2, done_s=1.5, tokens=3)
    assert short(tell(seen, [])) == ["no_log", "1.2 first_token", "1.5 answered"]
    told_by_server = {**seen, "replica": "chat-0", "arrived_s": 0.97, "started_s": 1.0}
    assert short(tell(told_by_server, [])) == [
        "no_log",
        "0.97 arrived",
        "1 starts chat-0 #None None in None",
        "1.2 first_token",
        "1.5 answered",
    ]
    never = tell(row(7, sent_s=math.nan, status="interrupted"), [])
    assert never.moments[0] == story.Scheduled(0.9, None)


def test_one_that_the_log_does_not_know_was_not_let_in() -> None:
    """Whom the gate refuses has told nothing but its head, so the log has a number and no client's id."""
    lines = [msgspec.json.encode(Decision(1.0, ask(17), [Reject(57, "queue_full", 1.0)]))]
    assert short(tell(row(7, status="rejected", http_status=429), lines)) == ["no_arrival", "answered"]


def test_only_the_lines_of_its_life_are_read() -> None:
    core = started(deployment(chat=[None]))
    lines = log(core, [(1.0, ask(7, 1)), (1.1, StepDone("chat-0", 1))])
    garbage = [b'{"chat-0" 47 broken']
    told = tell(row(7, done_s=1.1), [*garbage, *lines, *garbage])
    assert end(told).outcome == "completed"
    others = [b'{"chat-1" 48 broken']
    assert tell(row(7, done_s=1.1), [lines[0], *others, lines[1]]) == told
    with pytest.raises(InputError, match=r"decisions.jsonl:2: not a decision"):
        tell(row(7, done_s=1.1), [lines[0], *garbage, lines[1]])


def test_a_number_that_is_part_of_another_is_not_its_own() -> None:
    decisions = [
        Decision(1.0, ask(7), [Assign(47, "chat-0", 0, 0.5)]),
        Decision(1.1, Wake(), [Complete(471), Complete(147)]),
        Decision(1.2, Wake(), [Complete(47)]),
    ]
    told = tell(row(7), [msgspec.json.encode(d) for d in decisions])
    assert [m.at_s for m in told.moments if isinstance(m, story.Ended)] == [1.2]


# --- whole runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faulty() -> Run:
    """Replicas that die, hang, slow down and run out of memory."""
    scenario = files.load(REPOSITORY / "scenarios" / "faults.yaml")
    answers = supply.resolve(scenario)
    return simulate(scenario, answers, build_schedule(scenario), ServiceTimes({}), seed=11, keep_decisions=True)


def test_every_story_agrees_with_its_row(faulty: Run) -> None:
    kinds: set[str] = set()
    for index, cells in enumerate(faulty.requests.to_dict("records")):
        told = story.of_run(faulty, index, folder="x")
        kinds |= {m.kind for m in told.moments}
        ended = end(told)
        assert (ended.outcome == "completed") == (cells["status"] == "completed")
        assert ended.total_s == pytest.approx(cells["done_s"] - cells["scheduled_s"])
        spent = parts(told)
        starts = [m for m in told.moments if isinstance(m, story.Starts)]
        assert starts[0].at_s == cells["started_s"] and starts[-1].replica == cells["replica"]
        if len(starts) == 1:
            assert spent.get("waiting", 0.0) == pytest.approx(cells["started_s"] - cells["arrived_s"], abs=1e-6)
        if ended.outcome == "completed" and cells["output_tokens"]:
            decoded = sum(m.steps for m in told.moments if isinstance(m, story.Steps) and m.phase == "decode")
            assert 1 + decoded + _again(told.moments) == cells["tokens"], "every token has its step"
    assert {"replica_lost", "step_failed", "runs_again", "steps", "first_token"} <= kinds, "and all of it happens"


def _again(moments: Sequence[story.Moment]) -> int:
    """Second runs that went well: what follows them is no failure of the same step."""
    failed = {m.step_id for m in moments if isinstance(m, story.StepFails)}
    return sum(1 for m in moments if isinstance(m, story.RunsAgain) and m.step_id not in failed)


@pytest.mark.parametrize("request_id", [-1, 10**9])
def test_an_unknown_request_is_bad_input(faulty: Run, request_id: int) -> None:
    last = len(faulty.requests) - 1
    with pytest.raises(InputError) as caught:
        story.of_run(faulty, request_id, folder="runs/one")
    said = f"REQUEST_ID: no such request in runs/one (got {request_id}); allowed: 0 to {last}"
    assert str(caught.value) == said
