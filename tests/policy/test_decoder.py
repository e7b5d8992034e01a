"""Decoders: sequences join between steps, long prompts are read in chunks, KV cache is never overcommitted."""

from __future__ import annotations

from typing import Any

import pytest

from gpuplan.hardware.roofline import StepLoad
from gpuplan.policy.vocabulary import OUT_OF_MEMORY, Arrive, Cancel, Event, ReplicaDown, ReplicaUp, RunStep, StepFailed
from tests.policy.conftest import deployment, done, follow, started

Table = list[tuple[float, Event, list[str]]]


def ask(request_id: int, prompt: int = 10, output: int = 2) -> Arrive:
    return Arrive(request_id, "chat", prompt, output)


TABLES: dict[str, tuple[list[int | None], dict[str, Any], Table]] = {
    "join between steps": (
        [1000],
        {},
        [
            (0.0, ask(1, 10, 3), ["chat-0 #1: 1+10!"]),
            (0.1, ask(2, 20, 1), []),  # not into a step that runs
            (0.2, done("chat-0", 1), ["chat-0 #2: 2+20! =1"]),  # the prefill gave 1 its first token
            (0.3, done("chat-0", 2), ["complete 2", "chat-0 #3: =1"]),  # its one token came with the prefill
            (0.4, done("chat-0", 3), ["complete 1"]),  # the third: its limit
        ],
    ),
    "ended before the limit": (
        [1000],
        {},
        [
            (0.0, ask(1, 10, 100), ["chat-0 #1: 1+10!"]),
            (0.1, ask(2, 10, 100), []),
            (0.2, done("chat-0", 1), ["chat-0 #2: 2+10! =1"]),
            (0.3, done("chat-0", 2, 1), ["complete 1", "chat-0 #3: =2"]),  # the engine met an end of text
            (0.4, done("chat-0", 3, 2), ["complete 2"]),
        ],
    ),
    "ended with the first token": (
        [1000],
        {},
        [(0.0, ask(1, 10, 9), ["chat-0 #1: 1+10!"]), (0.1, done("chat-0", 1, 1), ["complete 1"])],
    ),
    "chunked prefill": (
        [1000],
        {"max_batch_tokens": 16},
        [
            (0.0, ask(1, 10, 9), ["chat-0 #1: 1+10!"]),
            (0.1, ask(2, 40, 9), []),
            (0.1, ask(3, 5, 9), []),
            (0.2, done("chat-0", 1), ["chat-0 #2: 2+15 =1"]),  # one of the 16 is 1's token
            (0.3, done("chat-0", 2), ["chat-0 #3: 2+15 =1"]),  # 1's tokens keep coming
            (0.4, done("chat-0", 3), ["chat-0 #4: 2+10! 3+5! =1"]),  # what is left over goes to the next
            (0.5, done("chat-0", 4), ["chat-0 #5: =1 =2 =3"]),
        ],
    ),
    "decodes fill the token budget": (
        [10_000],
        {"max_batch_tokens": 16, "max_batch_size": 32},
        [
            (0.0, ask(0, 1, 9), ["chat-0 #1: 0+1!"]),
            *[(0.0, ask(i, 1, 9), []) for i in range(1, 17)],
            (0.1, done("chat-0", 1), ["chat-0 #2: " + " ".join(f"{i}+1!" for i in range(1, 16)) + " =0"]),
            (0.2, done("chat-0", 2), ["chat-0 #3: 16+1! " + " ".join(f"={i}" for i in range(16))]),  # never starves
        ],
    ),
    "the batch is full": (
        [1000],
        {"max_batch_size": 1},
        [
            (0.0, ask(1, 10, 2), ["chat-0 #1: 1+10!"]),
            (0.0, ask(2, 10, 1), []),
            (0.1, done("chat-0", 1), ["chat-0 #2: =1"]),  # 2 waits although tokens are left
            (0.2, done("chat-0", 2), ["complete 1", "chat-0 #3: 2+10!"]),
            (0.3, done("chat-0", 3), ["complete 2"]),
        ],
    ),
    "KV cache is full": (
        [100],
        {},
        [
            (0.0, ask(1, 50, 10), ["chat-0 #1: 1+50!"]),
            (0.0, ask(2, 39, 2), []),  # 60 + 41 > 100
            (0.0, ask(3, 10, 1), []),  # would fit, and does not overtake
            (0.0, ask(4, 90, 11), ["reject 4: too_long, 0 s"]),  # never fits: nothing to wait for
            (0.1, done("chat-0", 1, 1), ["complete 1", "chat-0 #2: 2+39! 3+10!"]),
        ],
    ),
    "whoever is done first": (
        [1000, 1000],
        {},
        [
            (0.0, ask(1, 10, 9), ["chat-0 #1: 1+10!"]),  # ties go to the first
            (0.1, ask(2, 10, 9), ["chat-1 #2: 2+10!"]),  # 0 against 1
            (0.2, ask(3, 10, 9), []),
            (0.3, done("chat-1", 2), ["chat-1 #3: 3+10! =2"]),  # it has room, and the other one is late
            (0.4, done("chat-0", 1), ["chat-0 #4: =1"]),
            (0.401, ask(4, 10, 9), []),
            (0.41, done("chat-0", 4), ["chat-0 #5: 4+10! =1"]),  # 1 against 2: here
        ],
    ),
    "what fits only the larger waits for it": (
        [50, 1000],
        {"max_batch_size": 1},
        [
            (0.0, ask(1, 100, 9), ["chat-1 #1: 1+100!"]),
            (0.1, ask(2, 100, 9), []),
            (0.2, done("chat-1", 1, 1), ["complete 1", "chat-1 #2: 2+100!"]),
        ],
    ),
    "cancelled mid-decode": (
        [1000],
        {},
        [
            (0.0, ask(1, 10, 9), ["chat-0 #1: 1+10!"]),
            (0.1, ask(2, 10, 9), []),
            (0.2, done("chat-0", 1), ["chat-0 #2: 2+10! =1"]),
            (0.3, Cancel(1), []),
            (0.4, done("chat-0", 2), ["chat-0 #3: =2"]),  # its place is free, and nobody is told
        ],
    ),
    "cancelled mid-prefill": (
        [1000],
        {"max_batch_tokens": 16},
        [
            (0.0, ask(1, 40, 9), ["chat-0 #1: 1+16"]),
            (0.1, Cancel(1), []),
            (0.2, ask(2, 10, 1), []),
            (0.3, done("chat-0", 1), ["chat-0 #2: 2+10!"]),  # no chunk more
            (0.4, done("chat-0", 2), ["complete 2"]),
        ],
    ),
    "cancelled on the way to its last token": (
        [1000],
        {},
        [
            (0.0, ask(1, 10, 1), ["chat-0 #1: 1+10!"]),
            (0.1, Cancel(1), []),
            (0.2, done("chat-0", 1, 1), []),  # no Complete for who is gone
        ],
    ),
    "a failed step is tried again in halves": (
        [1000],
        {"max_batch_tokens": 16},
        [
            (0.0, ask(1, 10, 9), ["chat-0 #1: 1+10!"]),
            (0.1, ask(2, 40, 9), []),
            (0.1, ask(3, 40, 9), []),
            (0.2, done("chat-0", 1), ["chat-0 #2: 2+15 =1"]),  # 3 has joined and is not in the step
            (0.3, StepFailed("chat-0", 2, "engine_error"), ["chat-0 #3: =1"]),
            (0.4, done("chat-0", 3), ["chat-0 #4: 2+16"]),  # it has the budget to itself
            (0.5, StepFailed("chat-0", 4, "engine_error"), ["fail 2: engine_error", "chat-0 #5: 3+15 =1"]),
            (0.6, done("chat-0", 5), ["chat-0 #6: 3+15 =1"]),
        ],
    ),
    "without memory they take turns": (
        [1000],
        {"max_batch_tokens": 100},
        [
            (0.0, ask(1, 10, 9), ["chat-0 #1: 1+10!"]),
            (0.1, ask(2, 10, 9), []),
            (0.1, ask(3, 10, 9), []),
            (0.2, done("chat-0", 1), ["chat-0 #2: 2+10! 3+10! =1"]),
            (0.3, StepFailed("chat-0", 2, OUT_OF_MEMORY), ["chat-0 #3: 2+10! =1"]),
            (0.4, StepFailed("chat-0", 3, OUT_OF_MEMORY), ["chat-0 #4: =1"]),
            (0.5, done("chat-0", 4), ["chat-0 #5: 2+10!"]),
            (0.6, done("chat-0", 5), ["chat-0 #6: 3+10!"]),
            (0.7, done("chat-0", 6), ["chat-0 #7: =1"]),  # one at a time from now on, in turn
            (0.8, done("chat-0", 7), ["chat-0 #8: =2"]),
            (0.9, Cancel(3), []),
            (1.0, done("chat-0", 8), ["chat-0 #9: =1"]),
        ],
    ),
    "a failed step, and one cancelled beside it": (
        [1000],
        {"max_batch_tokens": 16},
        [
            (0.0, ask(1, 40, 9), ["chat-0 #1: 1+16"]),
            (0.1, ask(2, 40, 9), []),
            (0.2, done("chat-0", 1), ["chat-0 #2: 1+16"]),  # 2 has joined and is not in the step
            (0.3, Cancel(2), []),
            (0.4, StepFailed("chat-0", 2, "oom"), ["fail 1: oom"]),  # 2 is gone: no step for it
        ],
    ),
    "a replica is lost": (
        [1000, 1000],
        {"max_batch_size": 1},
        [
            (0.0, ask(1, 10, 9), ["chat-0 #1: 1+10!"]),
            (0.0, ask(2, 10, 9), ["chat-1 #2: 2+10!"]),
            (0.0, ask(3, 10, 9), []),
            (0.1, Cancel(2), []),
            (0.2, ReplicaDown("chat-1"), []),  # 2 has been cancelled: nobody is told
            (0.3, ReplicaUp("chat-1"), ["chat-1 #3: 3+10!"]),  # with its KV cache empty
            (0.4, done("chat-1", 2), []),  # stale
            (0.5, ReplicaDown("chat-0"), []),  # 1 had no token yet: it waits for the other
            (0.6, ReplicaDown("chat-1"), ["fail 3: replica_lost", "fail 1: no_replica"]),
        ],
    ),
    "a token was sent": (
        [1000, 1000],
        {},
        [
            (0.0, ask(1, 10, 9), ["chat-0 #1: 1+10!"]),
            (0.1, done("chat-0", 1), ["chat-0 #2: =1"]),
            (0.2, ReplicaDown("chat-0"), ["fail 1: replica_lost"]),  # nobody can go on where it stopped
        ],
    ),
    "the only one large enough is lost": (
        [50, 1000],
        {"max_batch_size": 1},
        [
            (0.0, ask(1, 100, 9), ["chat-1 #1: 1+100!"]),
            (0.1, ask(2, 100, 9), []),
            (0.2, ask(3, 10, 9), ["chat-0 #2: 3+10!"]),  # 2, which waits for the larger, is not in its way
            (0.3, ReplicaDown("chat-1"), ["fail 1: replica_lost", "fail 2: no_replica"]),  # 2 fits nowhere now
        ],
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_table(name: str) -> None:
    kv_limits, rule, table = TABLES[name]
    follow(started(deployment(chat=kv_limits, chats=rule)), table)


def test_a_step_says_what_it_carries() -> None:
    core = started(deployment(chat=[1000], chats={"max_batch_tokens": 32}))
    core.handle(ask(1, 10, 9), now_s=0.0)
    core.handle(ask(2, 50, 9), now_s=0.0)
    (first,) = core.handle(done("chat-0", 1), now_s=0.1)
    assert isinstance(first, RunStep)
    # 31 new tokens attend to themselves and those before; 1 reads its 10 prompt tokens and its first own
    assert first.load == StepLoad(31, 31 * 32 // 2, 1, 11, 1)
    assert first.answered() == (1,)
    (second,) = core.handle(done("chat-0", 2), now_s=0.2)
    assert isinstance(second, RunStep)
    assert second.load == StepLoad(19, 19 * 31 + 19 * 20 // 2, 1, 12, 2), "the last chunk needs the output head too"
    assert second.answered() == (1, 2)


def test_decoders_need_no_timer() -> None:
    core = started(deployment(chat=[1000]))
    core.handle(ask(1), now_s=0.0)
    core.handle(ask(2), now_s=0.0)
    assert core.next_timer_s() is None


def test_models_do_not_wait_for_each_other() -> None:
    core = started(deployment(mood=1, chat=[1000], moods={"max_queue_size": 1}))
    follow(
        core,
        [
            (0.0, ask(1), ["chat-0 #1: 1+10!"]),
            (0.0, Arrive(2, "mood", 5), ["mood-0 #2: 2"]),
            (0.1, Arrive(3, "mood", 5), []),
            (0.1, Arrive(4, "mood", 5), ["reject 4: queue_full, 1 s"]),
            (0.2, ask(5), []),  # the other model's queue is its own
        ],
    )
