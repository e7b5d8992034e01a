"""Models that answer in one step: when a batch starts, and what is refused."""

from __future__ import annotations

import pytest

from gpuplan.hardware.roofline import StepLoad
from gpuplan.policy.core import ServingCore
from gpuplan.policy.vocabulary import (
    OUT_OF_MEMORY,
    Arrive,
    Assign,
    Cancel,
    Drain,
    Event,
    Reject,
    ReplicaDown,
    ReplicaUp,
    RunStep,
    StepDone,
    StepFailed,
    Swap,
    VersionAdded,
    VersionDropped,
    Wake,
)
from tests.policy.conftest import deployment, done, follow, started

Table = list[tuple[float, Event, list[str]]]


def ask(request_id: int, tokens: int = 10) -> Arrive:
    return Arrive(request_id, "mood", tokens)


def full_batch(count: int) -> Table:
    """Rows after which replica mood-0 is idle and has just answered requests 1 to `count` in one step, its second."""
    return [
        (0.0, ask(0), ["mood-0 #1: 0"]),
        *((0.0, ask(i), []) for i in range(1, count + 1)),
        (0.05, done("mood-0", 1), ["complete 0", f"mood-0 #2: {' '.join(map(str, range(1, count + 1)))}"]),
        (0.1, done("mood-0", 2), [f"complete {i}" for i in range(1, count + 1)]),
    ]


TABLES: dict[str, tuple[dict[str, float], int, Table]] = {
    "no delay": (
        {"max_batch_size": 4},
        1,
        [
            (0.0, ask(1), ["mood-0 #1: 1"]),  # an idle replica starts at once
            (0.1, ask(2), []),  # busy: waits
            (0.2, ask(3), []),
            (0.3, done("mood-0", 1), ["complete 1", "mood-0 #2: 2 3"]),  # all that waited, together
            (0.4, done("mood-0", 2), ["complete 2", "complete 3"]),
            (0.5, ask(4), ["mood-0 #3: 4"]),
        ],
    ),
    "nobody is waited for who was not there": (
        {"max_batch_size": 8, "max_queue_delay": 1.0},
        1,
        [
            (0.0, ask(1), ["mood-0 #1: 1"]),  # nothing is running
            (0.1, done("mood-0", 1), ["complete 1"]),
            (0.2, ask(2), ["mood-0 #2: 2"]),  # as many as the last step answered are back
            (0.3, ask(3), []),
            (0.4, ask(4), []),
            (0.5, done("mood-0", 2), ["complete 2", "mood-0 #3: 3 4"]),  # more than that: at once
            (0.6, done("mood-0", 3), ["complete 3", "complete 4"]),
            (1.7, ask(5), ["mood-0 #4: 5"]),  # its step is longer ago than the delay: nobody will come
        ],
    ),
    "by size": (
        {"max_batch_size": 3, "max_queue_delay": 1.0},
        1,
        [
            *full_batch(3),
            (0.2, ask(4), []),  # the others of the last batch may come back, too
            (0.3, ask(5), []),
            (0.4, ask(6), ["mood-0 #3: 4 5 6"]),  # as many as were answered
            (0.5, ask(7), []),
            (0.5, ask(8), []),
            (0.5, ask(9), []),  # full, and nowhere to run
            (0.5, ask(10), []),
            (
                0.7,
                done("mood-0", 3),
                ["complete 4", "complete 5", "complete 6", "mood-0 #4: 7 8 9"],
            ),  # no more than fit
        ],
    ),
    "by delay": (
        {"max_batch_size": 8, "max_queue_delay": 1.0},
        1,
        [
            *full_batch(3),
            (0.5, ask(4), []),
            (1.4, ask(5), []),
            (1.49, Wake(), []),  # too early: nothing happens
            (1.5, Wake(), ["mood-0 #3: 4 5"]),  # counted from the oldest's arrival
            (1.6, ask(6), []),
            (3.0, done("mood-0", 3), ["complete 4", "complete 5", "mood-0 #4: 6"]),  # overdue: at once
            (3.1, done("mood-0", 4), ["complete 6"]),
        ],
    ),
    "an arrival finds the batch due": (
        {"max_batch_size": 8, "max_queue_delay": 1.0},
        1,
        [
            *full_batch(3),
            (0.2, ask(4), []),
            (1.3, ask(5), ["mood-0 #3: 4 5"]),  # the timer was late; it takes the newcomer along
        ],
    ),
    "a queue shorter than the batch": (
        {"max_batch_size": 8, "max_queue_size": 2, "max_queue_delay": 1.0},
        1,
        [
            *full_batch(2),
            (0.2, ask(3), []),
            (0.3, ask(4), ["mood-0 #3: 3 4"]),  # it can never get fuller than this
        ],
    ),
    "the first idle replica": (
        {"max_batch_size": 4},
        2,
        [
            (0.0, ask(1), ["mood-0 #1: 1"]),  # ties go to the first
            (0.1, ask(2), ["mood-1 #2: 2"]),
            (0.2, ask(3), []),
            (0.3, done("mood-1", 2), ["complete 2", "mood-1 #3: 3"]),  # whoever is free first
            (0.4, done("mood-0", 1), ["complete 1"]),
            (0.5, ask(4), ["mood-0 #4: 4"]),
        ],
    ),
    "queue full": (
        {"max_batch_size": 1, "max_queue_size": 2},
        1,
        [
            (0.0, ask(1), ["mood-0 #1: 1"]),
            (0.0, ask(2), []),
            (0.0, ask(3), []),
            (0.0, ask(4), ["reject 4: queue_full, 1 s"]),  # no rate yet: the least that is asked for
            (10.0, done("mood-0", 1), ["complete 1", "mood-0 #2: 2"]),
            (20.0, done("mood-0", 2), ["complete 2", "mood-0 #3: 3"]),
            (20.0, ask(5), []),
            (20.0, ask(6), []),
            (20.0, ask(7), ["reject 7: queue_full, 20 s"]),  # two wait, one is done every 10 s
            (90.0, done("mood-0", 3), ["complete 3", "mood-0 #4: 5"]),
            (90.0, ask(8), []),
            (90.0, ask(9), ["reject 9: queue_full, 60 s"]),  # 80 s, and no client is asked for more than a minute
        ],
    ),
    "draining": (
        {"max_batch_size": 1},
        1,
        [
            (0.0, ask(1), ["mood-0 #1: 1"]),
            (0.0, ask(2), []),
            (0.1, Drain(), []),
            (0.2, ask(3), ["reject 3: draining, 1 s"]),
            (0.3, done("mood-0", 1), ["complete 1", "mood-0 #2: 2"]),  # what was admitted is finished
            (0.4, done("mood-0", 2), ["complete 2"]),
        ],
    ),
    "cancelled while queued": (
        {"max_batch_size": 4, "max_queue_delay": 1.0},
        1,
        [
            *full_batch(3),
            (0.2, ask(4), []),
            (0.7, ask(5), []),
            (0.8, Cancel(4), []),
            (1.2, Wake(), []),  # the oldest is now 5
            (1.7, Wake(), ["mood-0 #3: 5"]),
            (1.8, Cancel(4), []),  # a second time does nothing
            (1.8, Cancel(99), []),  # nor does one that never was
        ],
    ),
    "cancelled mid-step": (
        {"max_batch_size": 4},
        1,
        [
            (0.0, ask(1), ["mood-0 #1: 1"]),
            (0.1, Cancel(1), []),  # the step runs on
            (0.2, ask(2), []),  # and the replica is still busy
            (0.3, done("mood-0", 1), ["mood-0 #2: 2"]),  # nobody is told of 1
            (0.4, done("mood-0", 2), ["complete 2"]),
        ],
    ),
    "step failed": (
        {"max_batch_size": 2},
        1,
        [
            (0.0, ask(1), ["mood-0 #1: 1"]),
            (0.0, ask(2), []),
            (0.0, ask(3), []),
            (0.1, StepFailed("mood-0", 1, "engine_error"), ["fail 1: engine_error", "mood-0 #2: 2 3"]),  # others go on
            (0.2, Cancel(2), []),
            (0.3, StepFailed("mood-0", 2, "engine_error"), ["mood-0 #3: 3"]),  # 2 does not want to know
            (0.4, StepFailed("mood-0", 2, "engine_error"), []),  # stale
            (0.5, StepFailed("mood-0", 3, "engine_error"), ["fail 3: engine_error"]),
        ],
    ),
    "only the culprit gets the error": (
        {"max_batch_size": 4},
        1,
        [
            (0.0, ask(1), ["mood-0 #1: 1"]),
            *((0.1, ask(i), []) for i in (2, 3, 4, 5, 6)),
            (0.2, done("mood-0", 1), ["complete 1", "mood-0 #2: 2 3 4 5"]),
            (0.3, StepFailed("mood-0", 2, "engine_error"), ["mood-0 #3: 2 3"]),
            (0.4, done("mood-0", 3), ["complete 2", "complete 3", "mood-0 #4: 4 5"]),
            (0.5, StepFailed("mood-0", 4, "engine_error"), ["mood-0 #5: 4"]),
            (0.6, StepFailed("mood-0", 5, "engine_error"), ["fail 4: engine_error", "mood-0 #6: 5"]),
            (0.7, done("mood-0", 6), ["complete 5", "mood-0 #7: 6"]),  # who waited comes after
        ],
    ),
    "an answer that is none fails alone": (
        {"max_batch_size": 4},
        1,
        [
            (0.0, ask(1), ["mood-0 #1: 1"]),
            *((0.1, ask(i), []) for i in (2, 3, 4)),
            (0.2, done("mood-0", 1), ["complete 1", "mood-0 #2: 2 3 4"]),
            (0.3, Cancel(4), []),
            (
                0.4,
                StepDone("mood-0", 2, failed=((3, "nan_output"), (4, "nan_output"))),
                ["fail 3: nan_output", "complete 2"],
            ),  # 4 does not want to know
        ],
    ),
    "without memory batches are smaller": (
        {"max_batch_size": 8},
        1,
        [
            (0.0, ask(1), ["mood-0 #1: 1"]),
            *((0.1, ask(i), []) for i in (2, 3, 4, 5)),
            (0.2, done("mood-0", 1), ["complete 1", "mood-0 #2: 2 3 4 5"]),
            (0.3, StepFailed("mood-0", 2, OUT_OF_MEMORY), ["mood-0 #3: 2 3"]),
            *((0.3, ask(i), []) for i in (6, 7, 8)),
            (0.4, done("mood-0", 3), ["complete 2", "complete 3", "mood-0 #4: 4 5"]),
            (0.5, done("mood-0", 4), ["complete 4", "complete 5", "mood-0 #5: 6 7"]),  # not 6 7 8
            (0.6, StepFailed("mood-0", 5, OUT_OF_MEMORY), ["mood-0 #6: 6"]),
            (0.7, StepFailed("mood-0", 6, OUT_OF_MEMORY), ["fail 6: out_of_memory", "mood-0 #7: 7"]),
        ],
    ),
    "two replicas died under it": (
        {"max_batch_size": 2},
        2,
        [
            (0.0, ask(1), ["mood-0 #1: 1"]),
            (0.1, ReplicaDown("mood-0"), ["mood-1 #2: 1"]),
            (0.2, ReplicaUp("mood-0"), []),
            (0.3, ReplicaDown("mood-1"), ["fail 1: replica_lost"]),  # it is not given a third
        ],
    ),
    "a sibling takes over": (
        {"max_batch_size": 2},
        2,
        [
            (0.0, ask(1), ["mood-0 #1: 1"]),
            (0.0, ask(2), ["mood-1 #2: 2"]),
            (0.1, ask(3), []),
            (0.2, ReplicaDown("mood-0"), []),  # 1 and 3 wait for the other
            (0.3, done("mood-0", 1), []),  # stale: the step of a replica that is gone
            (0.4, done("mood-1", 2), ["complete 2", "mood-1 #3: 1"]),  # alone: mood-0 may have died of it
            (0.5, ask(4), []),
            (0.6, ReplicaUp("mood-0"), ["mood-0 #4: 3 4"]),  # back, and there is work
            (0.7, done("mood-0", 1), []),  # stale still, although a step runs
            (0.8, done("mood-0", 4), ["complete 3", "complete 4"]),
        ],
    ),
    "a replica that returns is waited for": (
        {"max_batch_size": 4},
        1,
        [
            (0.0, ask(1), ["mood-0 #1: 1"]),
            (0.0, ask(2), []),
            (0.1, ReplicaDown("mood-0", "killed", returns=True), []),
            (0.2, ask(3), []),  # so do those who come meanwhile
            (0.3, ReplicaUp("mood-0"), ["mood-0 #2: 1"]),  # alone: it may have died of it
            (0.4, done("mood-0", 2), ["complete 1", "mood-0 #3: 2 3"]),
            (0.5, ReplicaDown("mood-0", "killed", returns=True), []),
            (0.6, ReplicaDown("mood-0", "cannot be loaded"), ["fail 2: no_replica", "fail 3: no_replica"]),
            (0.7, ask(4), ["reject 4: no_replica, 1 s"]),
        ],
    ),
    "a version takes over between two steps": (
        {"max_batch_size": 1},
        1,
        [
            (0.0, ask(1), ["mood-0 #1: 1"]),
            (0.0, ask(2), []),
            (0.1, VersionAdded("mood-0#2", "mood-0"), []),  # it loads; the old one serves on
            (0.2, done("mood-0", 1), ["complete 1", "mood-0 #2: 2"]),
            (0.3, ask(3), []),
            (0.4, Swap("mood", ("mood-0#2",), ("mood-0",)), ["mood-0#2 #3: 3"]),  # what waited goes to the new one
            (0.5, done("mood-0", 2), ["complete 2", "unload mood-0"]),  # what ran ended on the old one
            (0.6, VersionDropped("mood-0"), []),
            (0.7, done("mood-0#2", 3), ["complete 3"]),
            (0.8, ask(4), ["mood-0#2 #4: 4"]),
        ],
    ),
    "a version that has to wait for the memory": (
        {"max_batch_size": 1},
        1,
        [
            (0.0, ask(1), ["mood-0 #1: 1"]),
            (0.1, VersionAdded("mood-0#2", "mood-0", returns=True), []),
            (0.1, Swap("mood", (), ("mood-0",)), []),
            (0.2, ask(2), []),  # nobody takes it yet, and it is not refused
            (0.3, done("mood-0", 1), ["complete 1", "unload mood-0"]),
            (0.4, Swap("mood", ("mood-0#2",)), ["mood-0#2 #2: 2"]),
            (0.5, VersionDropped("mood-0"), []),
        ],
    ),
    "the last replica is gone": (
        {"max_batch_size": 1},
        1,
        [
            (0.0, ask(1), ["mood-0 #1: 1"]),
            (0.0, ask(2), []),
            (0.1, ReplicaDown("mood-0"), ["fail 1: replica_lost", "fail 2: no_replica"]),
            (0.2, ask(3), ["reject 3: no_replica, 1 s"]),
            (0.3, ReplicaUp("mood-0"), []),
            (0.4, ask(4), ["mood-0 #2: 4"]),
        ],
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_table(name: str) -> None:
    rule, replicas, table = TABLES[name]
    follow(started(deployment(mood=replicas, moods=rule)), table)


def test_replicas_start_down() -> None:
    core = ServingCore(deployment(mood=1))
    assert not core.ready()
    follow(core, [(0.0, ask(1), ["reject 1: no_replica, 1 s"]), (1.0, ReplicaUp("mood-0"), [])])
    assert core.ready()
    core.handle(Drain(), now_s=2.0)
    assert not core.ready()


def test_the_timer_is_the_oldest_s_deadline_while_a_replica_is_idle() -> None:
    core = started(deployment(mood=1, moods={"max_batch_size": 2, "max_queue_delay": 0.5}))
    follow(core, full_batch(2))
    # (now_s, event, the timer afterwards)
    for now_s, event, timer_s in [
        (0.2, ask(3), 0.7),
        (0.3, Cancel(3), None),  # nobody waits
        (0.4, ask(4), 0.9),
        (0.5, ask(5), None),  # full: runs
        (0.6, ask(6), None),  # busy: the step's end will look
        (0.7, done("mood-0", 3), 1.1),  # idle again, and 6 may wait until 1.1
    ]:
        core.handle(event, now_s=now_s)
        timer = core.next_timer_s()
        assert timer == (None if timer_s is None else pytest.approx(timer_s)), event


def test_a_batch_is_padded_to_its_longest_prompt() -> None:
    core = started(deployment(mood=1, moods={"max_batch_size": 3}))
    for request_id, tokens in ((1, 5), (2, 10), (3, 30), (4, 20)):
        core.handle(ask(request_id, tokens), now_s=0.0)
    _, step = core.handle(done("mood-0", 1), now_s=0.1)
    assert isinstance(step, RunStep)
    assert step.load == StepLoad(prefill_tokens=90, attended_pairs=2700, decodes=0, context_tokens=0, samples=3)
    assert (step.waiting, step.answered()) == (0, (2, 3, 4))


def test_time_never_runs_backwards() -> None:
    """An event with an older time is taken as happening now, so no deadline moves."""
    core = started(deployment(mood=1, moods={"max_batch_size": 9, "max_queue_delay": 1.0}))
    follow(core, full_batch(3))
    core.handle(ask(5), now_s=0.5)
    core.handle(Cancel(5), now_s=0.5)
    core.handle(ask(6), now_s=0.2)
    assert core.next_timer_s() == 1.5


def test_counts_for_metrics() -> None:
    core = started(deployment(mood=1, moods={"max_batch_size": 1, "max_queue_size": 2}))
    assert [type(core.handle(ask(i), now_s=0.0)[-1]) for i in (1, 2, 3, 4)] == [RunStep, Assign, Assign, Reject]
    assert (core.running("mood"), core.waiting("mood"), core.in_flight) == (1, 2, 3)
