"""Who is left alone for a while, what of it all counts, and how it comes back."""

from __future__ import annotations

from typing import Any

import pytest

from gpuplan.policy.core import ServingCore
from gpuplan.policy.health import SLOW_STEPS
from gpuplan.policy.retries import REQUESTS_PER_RETRY, RESERVE
from gpuplan.policy.vocabulary import (
    OUT_OF_MEMORY,
    Arrive,
    Assign,
    Cancel,
    Event,
    Fail,
    ReplicaDown,
    ReplicaUp,
    RunStep,
    StepDone,
    StepFailed,
    Trip,
    Wake,
)
from gpuplan.scenario.demand import BreakerSpec
from tests.policy.conftest import deployment, done, follow, said, started

Table = list[tuple[float, Event, list[str]]]

SPEC = BreakerSpec(consecutive_failures=3, slow_factor=1000, open=5, open_max=15)
"""Three in a row, and slowness is no matter."""


def ask(request_id: int, timeout_s: float | None = None) -> Arrive:
    return Arrive(request_id, "mood", 10, timeout_s=timeout_s)


def chat(request_id: int, prompt: int = 10, output: int = 50) -> Arrive:
    return Arrive(request_id, "chat", prompt, output)


def bad(replica_id: str, step_id: int, reason: str = "engine_error") -> StepFailed:
    return StepFailed(replica_id, step_id, reason)


def moods(replicas: int, batch: int = 1, **spec: Any) -> dict[str, Any]:
    return {"mood": replicas, "moods": {"max_batch_size": batch}, "breakers": BreakerSpec(**spec) if spec else SPEC}


ONE_OF_TWO_IS_OPEN: Table = [
    (0.0, ask(1), ["1 waits for mood-0", "mood-0 #1: 1"]),
    (0.0, ask(2), ["2 waits for mood-1", "mood-1 #2: 2"]),
    (0.1, bad("mood-0", 1), ["fail 1: engine_error"]),
    (0.1, ask(3), ["3 waits for mood-0", "mood-0 #3: 3"]),
    (0.2, bad("mood-0", 3), ["fail 3: engine_error"]),
    (0.2, done("mood-1", 2), ["complete 2"]),  # so the model as a whole has not failed three times in a row
    (0.2, ask(4), ["4 waits for mood-0", "mood-0 #4: 4"]),
    (0.2, ask(5), ["5 waits for mood-1", "mood-1 #5: 5"]),
    (0.2, ask(6), ["6 waits for mood-0"]),
    (0.2, ask(7), ["7 waits for mood-1"]),
    (0.3, bad("mood-0", 4), ["fail 4: engine_error", "mood-0 open", "6 waits for mood-1, no longer for mood-0"]),
]

THE_ONLY_ONE_IS_OPEN: Table = [
    (0.0, ask(1), ["1 waits for mood-0", "mood-0 #1: 1"]),
    *((0.0, ask(i), [f"{i} waits for mood-0"]) for i in (2, 3, 4, 5)),
    (0.1, bad("mood-0", 1), ["fail 1: engine_error", "mood-0 #2: 2"]),
    (0.2, bad("mood-0", 2), ["fail 2: engine_error", "mood-0 #3: 3"]),
    (0.3, bad("mood-0", 3), ["fail 3: engine_error", "mood-0 open", "mood open"]),
]

TABLES: dict[str, tuple[dict[str, Any], Table]] = {
    # --- a replica with a neighbour ---
    "it gets nothing while it is open": (
        moods(2),
        [
            *ONE_OF_TWO_IS_OPEN,
            (0.4, ask(8), ["8 waits for mood-1"]),  # although mood-0 has nothing to do
            (0.5, done("mood-1", 5), ["complete 5", "mood-1 #6: 6"]),
            (5.2, Wake(), []),  # early
            (5.2, ask(9), ["9 waits for mood-1"]),
        ],
    ),
    "one request finds out, and it is well again": (
        moods(2),
        [
            *ONE_OF_TWO_IS_OPEN,
            (5.3, Wake(), ["mood-0 half_open", "6 waits for mood-0, no longer for mood-1", "mood-0 #6: 6"]),
            (5.4, ask(8), ["8 waits for mood-1"]),  # one is enough
            (5.4, ask(9), ["9 waits for mood-1"]),
            (5.5, done("mood-0", 6), ["complete 6", "mood-0 closed", "7 waits for mood-0, no longer for mood-1", "mood-0 #7: 7"]),
            (5.5, ask(10), ["10 waits for mood-0"]),
        ],
    ),
    "it is open for twice as long when the one fails, and no longer than the most": (
        moods(2),
        [
            *ONE_OF_TWO_IS_OPEN,
            (5.3, Wake(), ["mood-0 half_open", "6 waits for mood-0, no longer for mood-1", "mood-0 #6: 6"]),
            (5.4, bad("mood-0", 6), ["fail 6: engine_error", "mood-0 open"]),
            (5.5, done("mood-1", 5), ["complete 5", "mood-1 #7: 7"]),
            (15.3, Wake(), []),
            (15.4, Wake(), ["mood-0 half_open"]),
            (15.4, ask(8), ["8 waits for mood-0", "mood-0 #8: 8"]),
            (15.5, bad("mood-0", 8), ["fail 8: engine_error", "mood-0 open"]),
            (30.4, Wake(), []),
            (30.5, Wake(), ["mood-0 half_open"]),  # 15 s, not 20
        ],
    ),
    "a probe that is cancelled lets another through": (
        moods(2),
        [
            *ONE_OF_TWO_IS_OPEN,
            (5.3, Wake(), ["mood-0 half_open", "6 waits for mood-0, no longer for mood-1", "mood-0 #6: 6"]),
            (5.4, Cancel(6), []),
            (5.5, ask(8), ["8 waits for mood-1"]),  # its step is not over
            (5.6, done("mood-0", 6), ["7 waits for mood-0, no longer for mood-1", "mood-0 #7: 7"]),  # nobody knows
            (5.6, ask(9), ["9 waits for mood-1"]),
        ],
    ),
    "what ran before it opened goes on, and says nothing": (
        {"chat": [1000, 1000], "chats": {"max_batch_size": 4}, "breakers": BreakerSpec(consecutive_failures=1, open=5)},
        [
            (0.0, chat(1), ["1 waits for chat-0", "chat-0 #1: 1+10!"]),
            (0.0, chat(2), ["2 waits for chat-1", "chat-1 #2: 2+10!"]),
            (0.0, chat(3), ["3 waits for chat-0"]),
            (0.006, done("chat-0", 1), ["chat-0 #3: 3+10! =1"]),
            (0.006, done("chat-1", 2), ["chat-1 #4: =2"]),
            (0.013, StepDone("chat-0", 3, (), ((3, "nan_output"),)), ["fail 3: nan_output", "chat-0 open", "chat open", "chat-0 #5: =1"]),
            (0.019, StepDone("chat-0", 5, (), ((1, "nan_output"),)), ["fail 1: nan_output"]),
            (0.019, done("chat-1", 4, 2), ["complete 2"]),
            (5.0, Wake(), []),  # as long as it was
            (5.013, Wake(), ["chat half_open", "chat-0 half_open"]),
        ],
    ),
    "nobody joins those that run there yet when it is tried": (
        {"chat": [1000, 1000], "chats": {"max_batch_size": 4}, "breakers": BreakerSpec(consecutive_failures=1, open=0.01)},
        [
            (0.0, chat(1), ["1 waits for chat-0", "chat-0 #1: 1+10!"]),
            (0.0, chat(2), ["2 waits for chat-1", "chat-1 #2: 2+10!"]),
            (0.0, chat(3), ["3 waits for chat-0"]),
            (0.0, chat(4), ["4 waits for chat-1"]),
            (0.006, done("chat-0", 1), ["chat-0 #3: 3+10! =1"]),
            (0.006, done("chat-1", 2), ["chat-1 #4: 4+10! =2"]),
            (0.013, done("chat-1", 4), ["chat-1 #5: =2 =4"]),
            (0.013, StepDone("chat-0", 3, (), ((3, "nan_output"),)), ["fail 3: nan_output", "chat-0 open", "chat open", "chat-0 #6: =1"]),
            (0.019, done("chat-0", 6), ["chat-0 #7: =1"]),
            (0.019, done("chat-1", 5), ["chat-1 #8: =2 =4"]),
            (0.023, Wake(), ["chat half_open", "chat-0 half_open"]),
            (0.024, chat(5), ["5 waits for chat-1"]),  # 1 runs on, and would be taken for a probe
            (0.025, done("chat-0", 7, 1), ["complete 1"]),  # 5 starts with the next step where it is
            (0.025, done("chat-1", 8), ["chat-1 #9: 5+10! =2 =4"]),
        ],
    ),
    "what waits and fits nowhere else stays, and is not said again": (
        {"chat": [50, 1000], "chats": {"max_batch_size": 1}, "breakers": SPEC},
        [
            (0.0, chat(1, 100), ["1 waits for chat-1", "chat-1 #1: 1+100!"]),
            *((0.0, chat(i, 100), [f"{i} waits for chat-1"]) for i in (2, 3, 4, 5)),
            (0.1, bad("chat-1", 1), ["fail 1: engine_error", "chat-1 #2: 2+100!"]),
            (0.2, bad("chat-1", 2), ["fail 2: engine_error", "chat-1 #3: 3+100!"]),
            (0.2, chat(6, 10, 5), ["6 waits for chat-0", "chat-0 #4: 6+10!"]),
            (0.3, done("chat-0", 4, 6), ["complete 6"]),  # the model is well
            (0.4, chat(7, 10, 5), ["7 waits for chat-0", "chat-0 #5: 7+10!"]),
            (0.4, chat(8, 10, 5), ["8 waits for chat-0"]),
            (0.5, bad("chat-1", 3), ["fail 3: engine_error", "chat-1 open"]),  # 4 and 5 wait for it as before
            (0.6, done("chat-0", 5, 7), ["complete 7", "chat-0 #6: 8+10!"]),
            (0.6, chat(9, 100), ["reject 9: circuit_open, 4.9 s"]),  # no other could hold it
            (0.6, Cancel(5), []),
            (5.5, Wake(), ["chat-1 half_open", "chat-1 #7: 4+100!"]),
        ],
    ),
    "whoever is refused comes back when one is tried that could hold it": (
        {"chat": [50, 1000, 50], "chats": {"max_batch_size": 1}, "breakers": BreakerSpec(consecutive_failures=2, open=5)},
        [
            (0.0, chat(1, 10, 5), ["1 waits for chat-0", "chat-0 #1: 1+10!"]),
            (0.0, chat(2, 100), ["2 waits for chat-1", "chat-1 #2: 2+100!"]),
            (0.0, chat(3, 10, 5), ["3 waits for chat-2", "chat-2 #3: 3+10!"]),
            (0.1, bad("chat-0", 1), ["fail 1: engine_error"]),
            (0.1, done("chat-2", 3, 3), ["complete 3"]),
            (0.1, chat(4, 10, 5), ["4 waits for chat-0", "chat-0 #4: 4+10!"]),
            (0.1, chat(5, 10, 5), ["5 waits for chat-2", "chat-2 #5: 5+10!"]),
            (0.2, bad("chat-0", 4), ["fail 4: engine_error", "chat-0 open"]),
            (0.2, done("chat-2", 5, 5), ["complete 5"]),
            (1.0, bad("chat-1", 2), ["fail 2: engine_error"]),
            (1.0, chat(6, 10, 5), ["6 waits for chat-1", "chat-1 #6: 6+10!"]),
            (1.0, chat(7, 10, 5), ["7 waits for chat-2", "chat-2 #7: 7+10!"]),
            (1.1, done("chat-2", 7, 7), ["complete 7"]),
            (2.0, bad("chat-1", 6), ["fail 6: engine_error", "chat-1 open"]),
            (3.0, chat(8, 100), ["reject 8: circuit_open, 4 s"]),  # chat-0 is tried in two, and is too small
            (3.0, chat(9, 10, 5), ["9 waits for chat-2", "chat-2 #8: 9+10!"]),
        ],
    ),
    # --- the only one ---
    "those who wait stay, and go on when it is tried": (
        moods(1),
        [
            *THE_ONLY_ONE_IS_OPEN,
            (0.4, ask(6), ["reject 6: circuit_open, 4.9 s"]),  # when it will be tried
            (0.4, ask(7), ["reject 7: circuit_open, 4.9 s"]),
            (4.9, ask(8), ["reject 8: circuit_open, 1 s"]),
            (5.3, Wake(), ["mood half_open", "mood-0 half_open", "mood-0 #4: 4"]),  # one
            (5.4, ask(9), ["reject 9: circuit_open, 1 s"]),  # nobody knows yet
            (5.5, done("mood-0", 4), ["complete 4", "mood-0 closed", "mood-0 #5: 5"]),
            (5.6, done("mood-0", 5), ["complete 5"]),
            (5.6, ask(10), ["10 waits for mood-0", "mood-0 #6: 10"]),  # and the model's own
            (5.7, done("mood-0", 6), ["complete 10", "mood closed"]),
        ],
    ),
    "they wait for longer when it fails": (
        moods(1),
        [
            *THE_ONLY_ONE_IS_OPEN,
            (5.3, Wake(), ["mood half_open", "mood-0 half_open", "mood-0 #4: 4"]),
            (5.4, bad("mood-0", 4), ["fail 4: engine_error", "mood-0 open"]),
            (5.4, ask(6), ["reject 6: circuit_open, 10 s"]),
            (15.4, Wake(), ["mood-0 half_open", "mood-0 #5: 5"]),
        ],
    ),
    "whoever waits there may be cancelled": (
        moods(1),
        [
            *THE_ONLY_ONE_IS_OPEN,
            (0.4, Cancel(4), []),
            (5.3, Wake(), ["mood half_open", "mood-0 half_open", "mood-0 #4: 5"]),
        ],
    ),
    # --- what counts ---
    "of a batch that fails the culprit alone": (
        moods(1, batch=4, consecutive_failures=2),
        [
            (0.0, ask(1), ["1 waits for mood-0", "mood-0 #1: 1"]),
            *((0.0, ask(i), [f"{i} waits for mood-0"]) for i in range(2, 6)),
            (0.1, bad("mood-0", 1), ["fail 1: engine_error", "mood-0 #2: 2 3 4 5"]),  # one in a row
            (0.2, bad("mood-0", 2), ["mood-0 #3: 2 3"]),  # somebody of the four
            (0.3, done("mood-0", 3), ["complete 2", "complete 3", "mood-0 #4: 4 5"]),  # none in a row
            (0.4, bad("mood-0", 4), ["mood-0 #5: 4"]),
            (0.5, bad("mood-0", 5), ["fail 4: engine_error", "mood-0 #6: 5"]),  # one
            (0.6, bad("mood-0", 6), ["fail 5: engine_error", "mood-0 open", "mood open"]),  # two
        ],
    ),
    "not what a client did, nor memory": (
        moods(1, consecutive_failures=1),
        [
            (0.0, ask(1), ["1 waits for mood-0", "mood-0 #1: 1"]),
            (0.1, bad("mood-0", 1, "too_long"), ["fail 1: too_long"]),
            (0.1, ask(2), ["2 waits for mood-0", "mood-0 #2: 2"]),
            (0.2, StepDone("mood-0", 2, (), ((2, "bad_token"),)), ["fail 2: bad_token"]),
            (0.2, ask(3), ["3 waits for mood-0", "mood-0 #3: 3"]),
            (0.3, bad("mood-0", 3, OUT_OF_MEMORY), ["fail 3: out_of_memory"]),
            (0.3, ask(4, timeout_s=0.2), ["4 waits for mood-0", "mood-0 #4: 4"]),
            (0.5, Wake(), ["fail 4: timeout"]),
            (0.6, done("mood-0", 4), []),
            (0.6, ask(5), ["5 waits for mood-0", "mood-0 #5: 5"]),
            (0.7, Cancel(5), []),
            (0.8, bad("mood-0", 5), []),  # nobody was there to fail
            (0.9, ask(6), ["6 waits for mood-0", "mood-0 #6: 6"]),
            (1.0, StepDone("mood-0", 6, (), ((6, "nan_output"),)), ["fail 6: nan_output", "mood-0 open", "mood open"]),
        ],
    ),
    "a replica that is lost counts once, whoever ran there": (
        {"chat": [1000], "chats": {"max_batch_size": 8}, "breakers": BreakerSpec(consecutive_failures=2)},
        [
            (0.0, chat(1), ["1 waits for chat-0", "chat-0 #1: 1+10!"]),
            *((0.0, chat(i), [f"{i} waits for chat-0"]) for i in (2, 3, 4)),
            (0.1, done("chat-0", 1), ["chat-0 #2: 2+10! 3+10! 4+10! =1"]),
            (0.2, done("chat-0", 2), ["chat-0 #3: =1 =2 =3 =4"]),
            (0.3, ReplicaDown("chat-0", returns=True), [f"fail {i}: replica_lost" for i in (1, 2, 3, 4)]),
            (0.4, ReplicaDown("chat-0", returns=True), []),  # it was down: one and the same
            (0.5, ReplicaUp("chat-0"), []),
            (0.6, chat(5), ["5 waits for chat-0", "chat-0 #4: 5+10!"]),
            (0.7, ReplicaDown("chat-0", returns=True), ["chat-0 open", "chat open", "5 waits for chat-0"]),  # until it is back
            (0.8, ReplicaUp("chat-0"), []),  # it is back, and left alone
            (5.7, Wake(), ["chat half_open", "chat-0 half_open", "chat-0 #5: 5+10!"]),
        ],
    ),
    "a replica that is lost with its probe": (
        moods(2),
        [
            *ONE_OF_TWO_IS_OPEN,
            (5.3, Wake(), ["mood-0 half_open", "6 waits for mood-0, no longer for mood-1", "mood-0 #6: 6"]),
            (5.4, ReplicaDown("mood-0", returns=True), ["mood-0 open", "6 waits for mood-1, no longer for mood-0"]),
            (5.5, ReplicaUp("mood-0"), []),
            (15.3, Wake(), []),
            (15.4, Wake(), ["mood-0 half_open", "6 waits for mood-0, no longer for mood-1", "mood-0 #7: 6"]),
        ],
    ),
    # --- the model as a whole ---
    "every replica fails: nobody is let in, and the one who is decides": (
        moods(2, consecutive_failures=4, open=5),
        [
            (0.0, ask(1), ["1 waits for mood-0", "mood-0 #1: 1"]),
            (0.0, ask(2), ["2 waits for mood-1", "mood-1 #2: 2"]),
            (0.0, ask(3), ["3 waits for mood-0"]),
            (0.0, ask(4), ["4 waits for mood-1"]),
            (0.0, ask(5), ["5 waits for mood-0"]),
            (0.1, bad("mood-0", 1), ["fail 1: engine_error", "mood-0 #3: 3"]),
            (0.1, bad("mood-1", 2), ["fail 2: engine_error", "mood-1 #4: 4"]),
            (0.2, bad("mood-0", 3), ["fail 3: engine_error", "mood-0 #5: 5"]),
            (0.3, bad("mood-1", 4), ["fail 4: engine_error", "mood open"]),  # four in a row, two of each
            (0.4, ask(6), ["reject 6: circuit_open, 4.9 s"]),
            (5.2, Wake(), []),
            (5.3, Wake(), ["mood half_open"]),
            (5.3, done("mood-0", 5), ["complete 5"]),  # it was let in before, and does not decide
            (5.4, ask(7), ["7 waits for mood-1", "mood-1 #6: 7"]),  # mood-0 took long
            (5.4, ask(8), ["reject 8: circuit_open, 1 s"]),
            (5.5, bad("mood-1", 6), ["fail 7: engine_error", "mood open"]),
            (5.6, ask(9), ["reject 9: circuit_open, 9.9 s"]),
            (15.5, Wake(), ["mood half_open"]),
            (15.6, ask(10), ["10 waits for mood-1", "mood-1 #7: 10"]),
            (15.7, done("mood-1", 7), ["complete 10", "mood closed"]),
            (15.8, ask(11), ["11 waits for mood-0", "mood-0 #8: 11"]),
            (15.8, ask(12), ["12 waits for mood-1", "mood-1 #9: 12"]),
        ],
    ),
    "what others make of it is not the probe's word": (
        moods(2, consecutive_failures=3, open=5),
        [
            (0.0, ask(1), ["1 waits for mood-0", "mood-0 #1: 1"]),
            (0.0, ask(2), ["2 waits for mood-1", "mood-1 #2: 2"]),
            (0.0, ask(3), ["3 waits for mood-0"]),
            (0.0, ask(4), ["4 waits for mood-1"]),
            (0.0, ask(5), ["5 waits for mood-0"]),
            (0.1, bad("mood-0", 1), ["fail 1: engine_error", "mood-0 #3: 3"]),
            (0.2, bad("mood-1", 2), ["fail 2: engine_error", "mood-1 #4: 4"]),
            (0.2, bad("mood-0", 3), ["fail 3: engine_error", "mood open", "mood-0 #5: 5"]),
            (5.2, Wake(), ["mood half_open"]),
            (5.3, ask(6), ["6 waits for mood-0"]),
            (5.4, done("mood-1", 4), ["complete 4", "6 waits for mood-1, no longer for mood-0", "mood-1 #6: 6"]),
            (5.5, ask(7), ["reject 7: circuit_open, 1 s"]),  # 4 has gone well, and 6 is not back
            (5.6, bad("mood-0", 5), ["fail 5: engine_error", "mood-0 open"]),  # its replica's, not the model's
            (5.7, ask(8), ["reject 8: circuit_open, 4.9 s"]),
            (5.8, done("mood-1", 6), ["complete 6", "mood closed"]),
        ],
    ),
    "a model's probe that is cancelled lets another through": (
        moods(1, consecutive_failures=1, open=5),
        [
            (0.0, ask(1), ["1 waits for mood-0", "mood-0 #1: 1"]),
            (0.1, bad("mood-0", 1), ["fail 1: engine_error", "mood-0 open", "mood open"]),
            (5.1, Wake(), ["mood half_open", "mood-0 half_open"]),
            (5.2, ask(2), ["2 waits for mood-0", "mood-0 #2: 2"]),
            (5.3, Cancel(2), []),
            (5.4, done("mood-0", 2), []),
            (5.5, ask(3), ["3 waits for mood-0", "mood-0 #3: 3"]),
            (5.6, bad("mood-0", 3, OUT_OF_MEMORY), ["fail 3: out_of_memory"]),  # nor does this say anything
            (5.7, ask(4, timeout_s=0.3), ["4 waits for mood-0", "mood-0 #4: 4"]),
            (6.0, Wake(), ["fail 4: timeout"]),
            (6.1, done("mood-0", 4), []),
            (6.2, ask(5), ["5 waits for mood-0", "mood-0 #5: 5"]),
            (6.3, done("mood-0", 5), ["complete 5", "mood-0 closed", "mood closed"]),
        ],
    ),
    "a model's probe that is lost with its replica is tried on another": (
        moods(2, consecutive_failures=2, open=5),
        [
            (0.0, ask(1), ["1 waits for mood-0", "mood-0 #1: 1"]),
            (0.0, ask(2), ["2 waits for mood-1", "mood-1 #2: 2"]),
            (0.1, bad("mood-0", 1), ["fail 1: engine_error"]),
            (0.1, bad("mood-1", 2), ["fail 2: engine_error", "mood open"]),
            (5.1, Wake(), ["mood half_open"]),
            (5.2, ask(3), ["3 waits for mood-0", "mood-0 #3: 3"]),
            (5.3, ReplicaDown("mood-0"), ["mood-0 open", "3 waits for mood-1, no longer for mood-0", "mood-1 #4: 3"]),
            (5.4, ask(4), ["reject 4: circuit_open, 1 s"]),
            (5.5, done("mood-1", 4), ["complete 3", "mood closed"]),
        ],
    ),
    "a model is tried when its own time has come, not its replica's": (
        moods(2, consecutive_failures=3, open=5),
        [
            (0.0, ask(1), ["1 waits for mood-0", "mood-0 #1: 1"]),
            (0.1, bad("mood-0", 1), ["fail 1: engine_error"]),
            (0.1, ask(2), ["2 waits for mood-0", "mood-0 #2: 2"]),
            (0.1, ask(3), ["3 waits for mood-1", "mood-1 #3: 3"]),
            (0.2, bad("mood-0", 2), ["fail 2: engine_error"]),
            (0.2, done("mood-1", 3), ["complete 3"]),
            (0.2, ask(4), ["4 waits for mood-0", "mood-0 #4: 4"]),
            (0.3, bad("mood-0", 4), ["fail 4: engine_error", "mood-0 open"]),
            (1.0, ask(5), ["5 waits for mood-1", "mood-1 #5: 5"]),
            (1.0, bad("mood-1", 5), ["fail 5: engine_error"]),
            (2.0, ask(6), ["6 waits for mood-1", "mood-1 #6: 6"]),
            (2.3, bad("mood-1", 6), ["fail 6: engine_error", "mood open"]),
            (3.3, ask(7), ["reject 7: circuit_open, 4 s"]),  # mood-0 is tried in two, and takes nobody then
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_table(name: str) -> None:
    given, table = TABLES[name]
    follow(started(deployment(**given)), table, assigned=True)


def test_the_timer_says_when_a_replica_is_tried() -> None:
    core = started(deployment(**moods(2)))
    # (now_s, event, the timer afterwards)
    rows: list[tuple[float, Event, float | None]] = [
        *((now_s, event, None) for now_s, event, _ in ONE_OF_TWO_IS_OPEN[:-1]),
        (0.3, bad("mood-0", 4), 5.3),
        (5.2, Wake(), 5.3),
        (5.3, Wake(), None),  # 6 finds out
        (5.4, bad("mood-0", 6), 15.4),
    ]
    for now_s, event, timer_s in rows:
        core.handle(event, now_s=now_s)
        assert core.next_timer_s() == (None if timer_s is None else pytest.approx(timer_s)), event


def test_and_when_a_model_is() -> None:
    core = started(deployment(**moods(2, consecutive_failures=2, open=5)))
    core.handle(ask(1), now_s=0.0)
    core.handle(ask(2), now_s=0.0)
    core.handle(bad("mood-0", 1), now_s=0.1)
    assert core.next_timer_s() is None
    assert [said(a) for a in core.handle(bad("mood-1", 2), now_s=0.2)] == ["fail 2: engine_error", "mood open"]
    assert core.next_timer_s() == 5.2


def test_a_trip_says_why() -> None:
    core = started(deployment(**moods(1)))
    trips = [
        said(action) + ": " + action.reason
        for now_s, event, _ in THE_ONLY_ONE_IS_OPEN
        for action in core.handle(event, now_s=now_s)
        if isinstance(action, Trip)
    ]
    assert trips == [f"{name} open: 3 failures in a row; open for 5 s" for name in ("mood-0", "mood")]


# --- slowness -----------------------------------------------------------------------------------------------------

DECODE_S = 0.0065


class Pair:
    """Decoders that each run one long request, step by step; chat-1 at the pace of its model."""

    def __init__(self, replicas: int = 2) -> None:
        spec = BreakerSpec(slow_factor=4, open=5)
        self.core = started(deployment(chat=[10_000] * replicas, chats={"max_batch_size": 4}, breakers=spec))
        self.now_s = 0.0
        self.steps: dict[str, RunStep] = {}
        self.said: list[str] = []
        for i in range(replicas):
            self.feed(chat(i, 10, 5000), 0.0)

    def feed(self, event: Event, after_s: float) -> list[str]:
        self.now_s += after_s
        actions = self.core.handle(event, now_s=self.now_s)
        self.core.check_invariants()
        self.steps.update({a.replica_id: a for a in actions if isinstance(a, RunStep)})
        words = [said(a) for a in actions if not isinstance(a, RunStep)]
        self.said += words
        return words

    def step(self, replica_id: str, after_s: float, *ended: int) -> list[str]:
        return self.feed(done(replica_id, self.steps.pop(replica_id).step_id, *ended), after_s)

    def round(self, slower: int) -> list[str]:
        """A step of chat-0, `slower` times as long as chat-1's. Gives what came of it."""
        for _ in range(slower if "chat-1" in self.steps else 0):
            self.step("chat-1", DECODE_S)
        return self.step("chat-0", 0.0 if "chat-1" in self.steps else slower * DECODE_S)


def test_one_that_is_slow_again_and_again_is_left_alone() -> None:
    pair = Pair()
    assert [pair.round(1) for _ in range(3)] == [[]] * 3
    for _ in range(SLOW_STEPS - 1):
        assert pair.round(20) == []
    assert pair.round(20) == ["chat-0 open"]
    assert pair.feed(chat(7), 0.0) == ["7 waits for chat-1"]  # who runs there is busy, and sound
    assert pair.round(20) == [], "what runs goes on"


def test_a_hiccup_is_none() -> None:
    pair = Pair()
    for _ in range(3):
        for _ in range(SLOW_STEPS - 1):
            pair.round(20)
        pair.round(1)  # not in a row
    assert not any("open" in words for words in pair.said)


def test_without_a_neighbour_nothing_is_slow() -> None:
    pair = Pair(replicas=1)
    for _ in range(3):
        pair.round(1)
    for _ in range(3 * SLOW_STEPS):
        pair.round(20)
    assert not any("open" in words for words in pair.said)


@pytest.mark.parametrize("how", ["down", "open"])
def test_nor_is_it_beside_one_that_is_not_sound(how: str) -> None:
    pair = Pair()
    pair.round(1)
    step_id = pair.steps.pop("chat-1").step_id
    pair.feed(bad("chat-1", step_id) if how == "open" else ReplicaDown("chat-1"), 0.0)
    while how == "open" and pair.core._replicas["chat-1"].breaker.state != "open":
        pair.feed(chat(100 + step_id), 0.0)
        step_id = pair.steps.pop("chat-1").step_id
        pair.feed(bad("chat-1", step_id), 0.0)
    pair.said.clear()
    for _ in range(3 * SLOW_STEPS):
        pair.round(20)
    assert not any("open" in words for words in pair.said)


def test_nor_is_what_all_of_them_are() -> None:
    """The card is slower than its model says: that is its pace."""
    pair = Pair()
    for _ in range(100):
        pair.step("chat-1", 20 * DECODE_S)
        pair.step("chat-0", 0.0)
    assert not any("open" in words for words in pair.said)


def test_a_slow_one_is_tried_and_its_pace_forgotten() -> None:
    """While it was slow, all went to the neighbour; when it is tried it is taken to be as fast as ever."""
    pair = Pair()
    while pair.round(20) != ["chat-0 open"]:
        pass
    assert pair.step("chat-0", 1.0, 0) == ["complete 0"]  # what ran there ends; it was open
    assert pair.feed(chat(7), 0.0) == ["7 waits for chat-1"]
    pair.step("chat-1", DECODE_S)
    assert pair.feed(Wake(), 5.0) == ["chat-0 half_open"]
    probe = pair.core.handle(chat(8), now_s=pair.now_s)
    assigns = [a for a in probe if isinstance(a, Assign) and a.replica_id == "chat-0"]
    assert len(assigns) == 1 and assigns[0].expected_s < DECODE_S / 2, (
        "of their last answer they know that it was short"
    )
    (step,) = [a for a in probe if isinstance(a, RunStep)]
    pair.steps[step.replica_id] = step
    assert pair.step("chat-0", DECODE_S, assigns[0].request_id) == [
        f"complete {assigns[0].request_id}",
        "chat-0 closed",
    ]


def test_a_slow_probe_has_failed() -> None:
    pair = Pair()
    while pair.round(20) != ["chat-0 open"]:
        pass
    pair.step("chat-0", 1.0, 0)
    pair.feed(Wake(), 5.0)
    pair.feed(chat(8), 0.0)
    assert pair.step("chat-0", 20 * DECODE_S) == ["chat-0 open"], "one step is enough"
    assert pair.core.next_timer_s() == pytest.approx(pair.now_s + 10), "twice as long"


def test_a_model_s_probe_on_a_slow_replica_is_an_answer_all_the_same() -> None:
    """Else nobody would ever be let in again: nobody but the probe closes the model's breaker."""
    core = started(deployment(**moods(2, consecutive_failures=3, slow_factor=4, open=5)))
    follow(
        core,
        [
            (0.0, ask(1), ["mood-0 #1: 1"]),
            (0.001, bad("mood-0", 1), ["fail 1: engine_error"]),
            (0.001, ask(2), ["mood-0 #2: 2"]),
            (0.002, bad("mood-0", 2), ["fail 2: engine_error"]),
            (0.002, ask(3), ["mood-0 #3: 3"]),
            (0.003, bad("mood-0", 3), ["fail 3: engine_error", "mood-0 open", "mood open"]),
            (5.003, Wake(), ["mood half_open", "mood-0 half_open"]),
            (5.1, ask(4), ["mood-0 #4: 4"]),  # the probe of both
            (5.2, done("mood-0", 4), ["mood-0 open", "complete 4", "mood closed"]),  # 100 ms instead of one
            (5.3, ask(5), ["mood-1 #5: 5"]),
        ],
    )


# --- what may be tried again --------------------------------------------------------------------------------------


def outage(requests_before: int, running: int) -> tuple[list[int], list[int]]:
    """Two replicas; so many requests have been answered, and so many are in the step of one that is lost. Gives those
    that wait for the other now, and those that failed."""
    rule = {"max_batch_size": running, "max_queue_size": 4096}
    core = started(deployment(mood=2, moods=rule, breakers=SPEC))
    core.handle(ReplicaDown("mood-1", returns=True), now_s=0.0)
    for i in range(requests_before):
        core.handle(Arrive(10_000 + i, "mood", 10), now_s=0.0)
        core.handle(done("mood-0", i + 1), now_s=0.0)
    for i in range(running + 1):  # the last one first, by itself
        core.handle(Arrive((i - 1) % (running + 1), "mood", 10), now_s=0.0)
    core.handle(done("mood-0", requests_before + 1), now_s=0.0)
    assert core.running("mood") == running
    core.handle(ReplicaUp("mood-1"), now_s=0.0)
    actions = core.handle(ReplicaDown("mood-0"), now_s=0.0)
    core.check_invariants()
    moved = [a.request_id for a in actions if isinstance(a, Assign)]
    failed = [a.request_id for a in actions if isinstance(a, Fail)]
    return moved, failed


def test_an_outage_is_not_made_worse_by_trying_again() -> None:
    moved, failed = outage(requests_before=0, running=64)
    let_in = 65  # and the one before
    assert len(moved) == RESERVE + let_in // REQUESTS_PER_RETRY
    assert (moved, failed) == (list(range(len(moved))), list(range(len(moved), 64))), "the first come are tried again"


def test_traffic_that_went_well_pays_for_more() -> None:
    moved, _ = outage(requests_before=100, running=64)
    assert len(moved) == RESERVE + (100 + 65) // REQUESTS_PER_RETRY


def test_what_has_not_started_moves_for_nothing() -> None:
    """It is no retry: the load is what it was."""
    rule = {"max_batch_size": 64, "max_batch_tokens": 16}
    core = started(deployment(chat=[10_000], chats=rule, breakers=SPEC))
    for i in range(50):
        core.handle(chat(i, prompt=16), now_s=0.0)
    core.handle(done("chat-0", 1), now_s=0.0)
    core.handle(Cancel(0), now_s=0.0)
    core.handle(done("chat-0", 2), now_s=0.0)
    assert (core.running("chat"), core.waiting("chat")) == (49, 0), "one prompt after the other, and all have a place"
    actions = core.handle(ReplicaDown("chat-0", returns=True), now_s=0.0)
    assert not any(isinstance(a, Fail) for a in actions)
    core.check_invariants()
    assert core.waiting("chat") == 49


def test_nor_does_what_waits() -> None:
    core = started(deployment(mood=2, moods={"max_batch_size": 1, "max_queue_size": 4096}, breakers=SPEC))
    for i in range(200):
        core.handle(ask(i), now_s=0.0)
    actions = core.handle(ReplicaDown("mood-0"), now_s=0.0)
    assert not any(isinstance(a, Fail) for a in actions)
    assert len([a for a in actions if isinstance(a, Assign)]) == 100
    assert isinstance(core, ServingCore) and core.waiting("mood") == 199
