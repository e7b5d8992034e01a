"""Who is let in, who is told to come back and when, and whom nobody waits for any more."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuplan.policy.vocabulary import (
    Action,
    Arrive,
    Assign,
    Cancel,
    Complete,
    Drain,
    Event,
    Fail,
    Knock,
    Reject,
    ReplicaDown,
    RunStep,
    StepDone,
    StepFailed,
    Wake,
)
from gpuplan.scenario.demand import AdmissionSpec, ClassSpec, RateLimit
from tests.policy.conftest import deployment, done, follow, started

Table = list[tuple[float, Event, list[str]]]


def ask(request_id: int, traffic_class: str = "", key: str = "", timeout_s: float | None = None) -> Arrive:
    return Arrive(request_id, "mood", 10, 0, "", traffic_class, key, timeout_s)


def chat(request_id: int, prompt: int, output: int, traffic_class: str = "", key: str = "") -> Arrive:
    return Arrive(request_id, "chat", prompt, output, "", traffic_class, key)


def one_mood(queue: int = 100, **admission: Any) -> dict[str, Any]:
    """One request at a time, and a queue."""
    rule = {"max_batch_size": 1, "max_queue_size": queue}
    return {"mood": 1, "moods": rule, "admission": AdmissionSpec(**admission)}


def one_chat(**admission: Any) -> dict[str, Any]:
    return {"chat": [10_000], "chats": {"max_batch_size": 4}, "admission": AdmissionSpec(**admission)}


SLOWLY = RateLimit(requests_per_s=0.5, burst=4)
"""Two at once, and one more every two seconds."""
FEW_TOKENS = RateLimit(tokens_per_s=10, burst=10)
"""A hundred at once, and ten more every second."""

TABLES: dict[str, tuple[dict[str, Any], Table]] = {
    # --- the door ---
    "a place at the door is taken and given back": (
        one_mood(classes={"bulk": ClassSpec(max_queue_size=2)}),
        [
            (0.0, Knock(1, "bulk"), []),
            (0.0, Knock(2, "bulk"), []),
            (0.0, Knock(3, "bulk"), ["reject 3: class_full, 1 s"]),  # nobody of the class is in yet, but two are there
            (0.0, Knock(4, "else"), []),  # another class is another matter
            (0.1, Cancel(1), []),  # it never sent its prompt
            (0.1, Cancel(1), []),  # and goes but once
            (0.2, Knock(5, "bulk"), []),
            (0.2, Knock(6, "bulk"), ["reject 6: class_full, 1 s"]),
        ],
    ),
    "whoever knocked has its place when it comes": (
        one_mood(classes={"bulk": ClassSpec(max_queue_size=2)}),
        [
            (0.0, ask(1), ["mood-0 #1: 1"]),
            (0.0, Knock(2, "bulk"), []),
            (0.0, Knock(3, "bulk"), []),
            (0.1, ask(2, "bulk"), []),  # it is not asked again whether the class is full
            (0.1, Knock(4, "bulk"), ["reject 4: class_full, 1 s"]),  # one in the line and one at the door
            (0.1, ask(5, "bulk"), ["reject 5: class_full, 1 s"]),  # who does not knock is asked the same
            (0.2, ask(3, "bulk"), []),
            (0.3, done("mood-0", 1), ["complete 1", "mood-0 #2: 2"]),  # what runs does not wait
            (0.3, Knock(6, "bulk"), []),
        ],
    ),
    "the door has as many places as all queues": (
        {
            "mood": 1, "moods": {"max_queue_size": 1}, "chat": [100], "chats": {"max_queue_size": 2},
            "admission": AdmissionSpec(classes={"bulk": ClassSpec()}),
        },
        [
            (0.0, Knock(1), []),
            (0.0, Knock(2, "bulk"), []),
            (0.0, Knock(3, "else"), []),
            (0.0, Knock(4), ["reject 4: queue_full, 1 s"]),
            (0.1, ask(1), ["mood-0 #1: 1"]),  # in: its place at the door is free
            (0.1, Knock(5), []),
            (0.1, Knock(6), ["reject 6: queue_full, 1 s"]),
        ],
    ),
    "a refused knock leaves nothing": (
        one_mood(queue=3, classes={"bulk": ClassSpec(max_queue_size=1, rate_limit=SLOWLY)}),
        [
            (0.0, Knock(1, "bulk"), []),
            (0.0, Knock(2, "bulk"), ["reject 2: class_full, 1 s"]),
            (0.0, Cancel(2), []),  # not at the door
            (0.0, Knock(3, "bulk"), ["reject 3: class_full, 1 s"]),
            (0.1, Cancel(1), []),
            (0.1, Knock(4, "bulk"), []),  # the second of two that may go at once: 2 and 3 cost nothing
            (0.1, Cancel(4), []),
            (0.1, Knock(5, "bulk"), ["reject 5: rate_limited, 1.9 s"]),
            (0.1, Knock(6), []),
            (0.1, Knock(7), []),
            (0.1, Knock(8), []),  # three places, and none of them is held by 2, 3 or 5
            (0.1, Knock(9), ["reject 9: queue_full, 1 s"]),
        ],
    ),
    "draining": (
        one_mood(),
        [
            (0.0, Knock(1), []),
            (0.1, Drain(), []),
            (0.2, Knock(2), ["reject 2: draining, 1 s"]),
            (0.2, ask(1), ["reject 1: draining, 1 s"]),  # although it had a place
            (0.2, ask(3), ["reject 3: draining, 1 s"]),
        ],
    ),
    # --- full ---
    "a class that is full, and a queue": (
        one_mood(queue=3, classes={"bulk": ClassSpec(max_queue_size=1)}),
        [
            (0.0, ask(1), ["mood-0 #1: 1"]),
            (0.0, ask(2, "bulk"), []),
            (0.0, ask(3, "bulk"), ["reject 3: class_full, 1 s"]),  # its own doing: others may still come
            (0.0, ask(4), []),
            (0.0, ask(5), []),
            (0.0, ask(6), ["reject 6: queue_full, 1 s"]),  # the server's
            (0.0, ask(7, "bulk"), ["reject 7: class_full, 1 s"]),  # both are: the class is said
        ],
    ),
    "each is told how fast its own line moves": (
        one_mood(queue=3, classes={"bulk": ClassSpec(max_queue_size=1)}),
        [
            (0.0, ask(1, "bulk"), ["mood-0 #1: 1"]),
            (0.0, ask(2), []),
            (10.0, done("mood-0", 1), ["complete 1", "mood-0 #2: 2"]),
            (15.0, done("mood-0", 2), ["complete 2"]),
            (15.0, ask(3, "bulk"), ["mood-0 #3: 3"]),
            (20.0, done("mood-0", 3), ["complete 3"]),
            (20.0, ask(4, "bulk"), ["mood-0 #4: 4"]),
            (20.0, ask(5, "bulk"), []),
            (20.0, ask(6, "bulk"), ["reject 6: class_full, 10 s"]),  # one waits, one of its class every 10 s
            (20.0, ask(7), []),
            (20.0, ask(8), []),
            (20.0, ask(9), ["reject 9: queue_full, 15 s"]),  # three wait, one of all every 5 s
        ],
    ),
    "never as long as a replica could start it": (
        {"chat": [50, 1000], "chats": {"max_batch_size": 1, "max_queue_size": 2}},
        [
            (0.0, chat(1, 100, 10), ["chat-1 #1: 1+100!"]),
            (0.0, chat(2, 100, 10), []),  # too long for chat-0
            (0.0, chat(3, 100, 10), []),
            (0.0, chat(4, 100, 10), ["reject 4: queue_full, 1 s"]),
            (0.0, chat(5, 10, 10), ["chat-0 #2: 5+10!"]),  # the queue is full, and here is nothing to queue for
            (0.0, chat(6, 10, 10), ["reject 6: queue_full, 1 s"]),
        ],
    ),
    # --- rates ---
    "a class's requests": (
        one_mood(classes={"bulk": ClassSpec(rate_limit=SLOWLY)}),
        [
            (0.0, ask(1, "bulk"), ["mood-0 #1: 1"]),
            (0.0, ask(2, "bulk"), []),
            (0.0, ask(3, "bulk"), ["reject 3: rate_limited, 2 s"]),
            (0.0, ask(4), []),
            (1.5, ask(5, "bulk"), ["reject 5: rate_limited, 1 s"]),  # half a second, and a client is asked for one
            (2.0, ask(6, "bulk"), []),
            (2.0, ask(7, "bulk"), ["reject 7: rate_limited, 2 s"]),
        ],
    ),
    "nobody is asked for more than a minute": (
        one_mood(classes={"bulk": ClassSpec(rate_limit=RateLimit(requests_per_s=0.01, burst=100))}),
        [
            (0.0, ask(1, "bulk"), ["mood-0 #1: 1"]),
            (0.0, ask(2, "bulk"), ["reject 2: rate_limited, 60 s"]),  # it is 100
        ],
    ),
    "a knock and its arrival count once": (
        one_mood(classes={"bulk": ClassSpec(rate_limit=SLOWLY)}),
        [
            (0.0, Knock(1, "bulk"), []),
            (0.0, ask(1, "bulk"), ["mood-0 #1: 1"]),
            (0.0, Knock(2, "bulk"), []),
            (0.0, Knock(3, "bulk"), ["reject 3: rate_limited, 2 s"]),
            (0.0, ask(2, "bulk"), []),  # let in, as it was told
        ],
    ),
    "each key by itself": (
        one_mood(per_key=SLOWLY),
        [
            (0.0, ask(1, key="ann"), ["mood-0 #1: 1"]),
            (0.0, ask(2, key="ann"), []),
            (0.0, ask(3, key="ann"), ["reject 3: rate_limited, 2 s"]),
            (0.0, Knock(4, key="ben"), []),
            (0.0, Knock(5, key="ben"), []),
            (0.0, Knock(6, key="ben"), ["reject 6: rate_limited, 2 s"]),
            (0.0, ask(7), []),  # those without one are one
            (0.0, ask(8), []),
            (0.0, ask(9), ["reject 9: rate_limited, 2 s"]),
        ],
    ),
    "whom its key refuses costs its class nothing, and the other way": (
        one_mood(classes={"bulk": ClassSpec(rate_limit=SLOWLY)}, per_key=RateLimit(requests_per_s=0.25, burst=4)),
        [
            (0.0, ask(1, "bulk", "ann"), ["mood-0 #1: 1"]),
            (0.0, ask(2, "bulk", "ann"), ["reject 2: rate_limited, 4 s"]),  # her only one is used up
            (0.0, ask(3, "bulk", "ben"), []),  # the class had one more
            (0.0, ask(4, "bulk", "cat"), ["reject 4: rate_limited, 2 s"]),
            (0.0, ask(5, "else", "cat"), []),  # and she still had hers
            (0.0, ask(6, "bulk", "ann"), ["reject 6: rate_limited, 4 s"]),  # of two, the longer wait
        ],
    ),
    "a class's tokens, prompt and answer together": (
        one_chat(classes={"bulk": ClassSpec(rate_limit=FEW_TOKENS)}),
        [
            (0.0, chat(1, 50, 10, "bulk"), ["chat-0 #1: 1+50!"]),
            (0.0, chat(2, 50, 10, "bulk"), ["reject 2: rate_limited, 2 s"]),  # 40 are left
            (0.0, chat(3, 30, 10, "bulk"), []),
            (0.0, Knock(4, "bulk"), []),  # at the door nobody knows how many
            (0.0, chat(4, 10, 5, "bulk"), ["reject 4: rate_limited, 1.5 s"]),
            (2.0, chat(5, 10, 10, "bulk"), []),
        ],
    ),
    "each key's tokens": (
        one_chat(per_key=FEW_TOKENS),
        [
            (0.0, chat(1, 90, 10, key="ann"), ["chat-0 #1: 1+90!"]),
            (0.0, chat(2, 90, 10, key="ben"), []),
            (0.0, chat(3, 25, 5, key="ann"), ["reject 3: rate_limited, 3 s"]),
        ],
    ),
    "of its class's and its key's tokens the longer wait": (
        one_chat(classes={"bulk": ClassSpec(rate_limit=FEW_TOKENS)}, per_key=RateLimit(tokens_per_s=20, burst=5)),
        [
            (0.0, chat(1, 90, 10, "bulk", "ann"), ["chat-0 #1: 1+90!"]),
            (0.0, chat(2, 90, 10, "bulk", "ann"), ["reject 2: rate_limited, 10 s"]),  # she has hers again after 5 s
            (0.0, chat(3, 90, 10, "else", "ann"), ["reject 3: rate_limited, 5 s"]),
        ],
    ),
    "what is dearer than all that there is goes when all of it is there": (
        one_chat(classes={"bulk": ClassSpec(rate_limit=FEW_TOKENS)}),
        [
            (0.0, chat(1, 200, 100, "bulk"), ["chat-0 #1: 1+200!"]),  # 300 of 100
            (0.0, chat(2, 1, 1, "bulk"), ["reject 2: rate_limited, 20.2 s"]),  # the debt first
        ],
    ),
    "one that is refused has used none of its class's tokens": (
        {
            **one_chat(classes={"bulk": ClassSpec(rate_limit=FEW_TOKENS)}),
            "chats": {"max_batch_size": 1, "max_queue_size": 1},
        },
        [
            (0.0, chat(1, 100, 10), ["chat-0 #1: 1+100!"]),
            (0.0, chat(2, 100, 10), []),
            (0.0, chat(3, 80, 20, "bulk"), ["reject 3: queue_full, 1 s"]),
            (0.0, chat(4, 9000, 2000, "bulk"), ["reject 4: too_long, 0 s"]),  # nor has one that never fits
            (0.1, done("chat-0", 1, 1), ["complete 1", "chat-0 #2: 2+100!"]),
            (0.1, chat(5, 80, 20, "bulk"), []),
        ],
    ),
    # --- tokens that were not used are given back ---
    "an answer that ends early": (
        one_chat(classes={"bulk": ClassSpec(rate_limit=FEW_TOKENS)}),
        [
            (0.0, chat(1, 20, 80, "bulk"), ["chat-0 #1: 1+20!"]),
            (0.0, done("chat-0", 1), ["chat-0 #2: =1"]),
            (0.0, done("chat-0", 2, 1), ["complete 1"]),  # 22 used
            (0.0, chat(2, 78, 1, "bulk"), ["reject 2: rate_limited, 1 s"]),
            (0.0, chat(3, 77, 1, "bulk"), ["chat-0 #3: 3+77!"]),
        ],
    ),
    "an answer as long as it might be": (
        one_chat(classes={"bulk": ClassSpec(rate_limit=FEW_TOKENS)}),
        [
            (0.0, chat(1, 98, 2, "bulk"), ["chat-0 #1: 1+98!"]),
            (0.0, done("chat-0", 1), ["chat-0 #2: =1"]),
            (0.0, done("chat-0", 2), ["complete 1"]),
            (0.0, chat(2, 10, 10, "bulk"), ["reject 2: rate_limited, 2 s"]),  # none of it comes back
        ],
    ),
    "one answer is no token": (
        one_mood(classes={"bulk": ClassSpec(rate_limit=RateLimit(tokens_per_s=1, burst=10))}),
        [
            (0.0, ask(1, "bulk"), ["mood-0 #1: 1"]),
            (0.0, done("mood-0", 1), ["complete 1"]),
            (0.0, ask(2, "bulk"), ["reject 2: rate_limited, 10 s"]),  # ten of ten are used: not nine, nor eleven
        ],
    ),
    "cancelled in the line": (
        {**one_chat(per_key=FEW_TOKENS), "chats": {"max_batch_size": 1}},
        [
            (0.0, chat(1, 10, 10), ["chat-0 #1: 1+10!"]),
            (0.0, chat(2, 50, 50, key="ann"), []),
            (0.0, Cancel(2), []),
            (0.0, chat(3, 50, 50, key="ann"), []),  # all hundred are there again
        ],
    ),
    "cancelled while it runs": (
        one_chat(per_key=FEW_TOKENS),
        [
            (0.0, chat(1, 50, 50), ["chat-0 #1: 1+50!"]),
            (0.0, Cancel(1), []),
            (0.0, chat(2, 40, 8), ["reject 2: rate_limited, 4.8 s"]),  # its step is not over
            (0.0, done("chat-0", 1), []),
            (0.0, chat(3, 45, 5), ["reject 3: rate_limited, 1 s"]),  # 50 read and one written
            (0.0, chat(4, 45, 4), ["chat-0 #2: 4+45!"]),
        ],
    ),
    "failed": (
        one_chat(per_key=FEW_TOKENS),
        [
            (0.0, chat(1, 50, 50), ["chat-0 #1: 1+50!"]),
            (0.0, StepFailed("chat-0", 1, "engine_error"), ["fail 1: engine_error"]),
            (0.0, chat(2, 50, 50), ["chat-0 #2: 2+50!"]),  # nothing of it was used
            (0.0, done("chat-0", 2), ["chat-0 #3: =2"]),
            (0.0, StepFailed("chat-0", 3, "engine_error"), ["fail 2: engine_error"]),
            (0.0, chat(3, 25, 25), ["reject 3: rate_limited, 1 s"]),  # 51 of this were
            (0.0, chat(4, 25, 24), ["chat-0 #4: 4+25!"]),
        ],
    ),
    "lost, and given back once": (
        {"chat": [1000, 1000], "admission": AdmissionSpec(per_key=FEW_TOKENS)},
        [
            (0.0, chat(1, 50, 50), ["chat-0 #1: 1+50!"]),
            (0.0, ReplicaDown("chat-0"), ["chat-1 #2: 1+50!"]),
            (0.0, chat(2, 1, 1), ["reject 2: rate_limited, 1 s"]),  # it is still to be answered
            (0.0, ReplicaDown("chat-1"), ["fail 1: replica_lost"]),
        ],
    ),
    # --- whose turn it is ---
    "who is urgent goes first": (
        one_mood(classes={"now": ClassSpec(priority=0), "soon": ClassSpec(priority=1), "some day": ClassSpec(priority=2)}),
        [
            (0.0, ask(0), ["mood-0 #1: 0"]),
            (1.0, ask(1, "some day"), []),
            (2.0, ask(2, "soon"), []),
            (3.0, ask(3, "now"), []),
            (3.5, ask(4, "never heard of"), []),  # 0, where nothing else is said
            (4.0, done("mood-0", 1), ["complete 0", "mood-0 #2: 3"]),
            (4.0, done("mood-0", 2), ["complete 3", "mood-0 #3: 4"]),
            (4.0, done("mood-0", 3), ["complete 4", "mood-0 #4: 2"]),
            (4.0, done("mood-0", 4), ["complete 2", "mood-0 #5: 1"]),
        ],
    ),
    "who has waited long enough goes before the urgent": (
        one_mood(classes={"now": ClassSpec(priority=0), "some day": ClassSpec(priority=2)}, ageing=5.0),
        [
            (0.0, ask(0), ["mood-0 #1: 0"]),
            (1.0, ask(1, "some day"), []),
            (10.9, ask(2, "now"), []),
            (11.1, ask(3, "now"), []),
            (12.0, done("mood-0", 1), ["complete 0", "mood-0 #2: 2"]),
            (12.0, done("mood-0", 2), ["complete 2", "mood-0 #3: 1"]),  # ten seconds before 3: two priorities
            (12.0, done("mood-0", 3), ["complete 1", "mood-0 #4: 3"]),
        ],
    ),
    "of one priority the first deadline": (
        one_mood(classes={"slow": ClassSpec(deadline=9.0), "quick": ClassSpec(deadline=3.0)}),
        [
            (0.0, ask(0), ["mood-0 #1: 0"]),
            (1.0, ask(1), []),  # none: taken to be a minute
            (1.0, ask(2, "slow"), []),
            (2.0, ask(3, "quick"), []),
            (2.0, done("mood-0", 1), ["complete 0", "mood-0 #2: 3"]),
            (2.0, done("mood-0", 2), ["complete 3", "mood-0 #3: 2"]),
            (2.0, done("mood-0", 3), ["complete 2", "mood-0 #4: 1"]),
        ],
    ),
    # --- deadlines ---
    "passed while it waits": (
        one_mood(queue=2, classes={"quick": ClassSpec(deadline=2.0, max_queue_size=1)}),
        [
            (0.0, ask(0), ["mood-0 #1: 0"]),
            (0.5, ask(1, "quick"), []),
            (1.0, ask(2), []),
            (2.4, Wake(), []),  # a moment more
            (2.4, ask(3), ["reject 3: queue_full, 1 s"]),
            (2.5, Wake(), ["fail 1: timeout"]),
            (2.5, Cancel(1), []),  # its driver may say so, too
            (2.5, Wake(), []),  # once
            (2.5, Knock(4, "quick"), []),  # its class has a place
            (2.5, ask(5), []),  # and so has the line
            (2.5, ask(6), ["reject 6: queue_full, 1 s"]),
            (2.6, done("mood-0", 1), ["complete 0", "mood-0 #2: 2"]),
        ],
    ),
    "passed while it runs": (
        {**one_chat(classes={"quick": ClassSpec(deadline=2.0)}), "chats": {"max_batch_size": 2}},
        [
            (0.0, chat(1, 10, 10, "quick"), ["chat-0 #1: 1+10!"]),
            (0.0, chat(2, 10, 20), []),
            (0.1, done("chat-0", 1), ["chat-0 #2: 2+10! =1"]),
            (0.1, chat(3, 10, 20), []),  # two at a time
            (2.0, Wake(), ["fail 1: timeout"]),  # now, and not when its step is over
            (2.0, Cancel(1), []),
            (2.1, done("chat-0", 2), ["chat-0 #3: 3+10! =2"]),  # its place is free
        ],
    ),
    "what has ended has no deadline": (
        one_mood(classes={"quick": ClassSpec(deadline=2.0)}),
        [
            (0.0, ask(1, "quick"), ["mood-0 #1: 1"]),
            (0.0, ask(2, "quick"), []),
            (0.0, ask(3, "quick"), []),
            (1.0, Cancel(2), []),
            (1.0, done("mood-0", 1), ["complete 1", "mood-0 #2: 3"]),
            (1.5, Cancel(3), []),  # its step runs on
            (2.0, Wake(), []),
            (9.0, done("mood-0", 2), []),
            (9.0, Wake(), []),
        ],
    ),
    "the smaller one holds": (
        one_mood(classes={"quick": ClassSpec(deadline=2.0)}),
        [
            (0.0, ask(0), ["mood-0 #1: 0"]),
            (0.0, ask(1, "quick", timeout_s=1.0), []),
            (0.0, ask(2, "quick", timeout_s=3.0), []),
            (0.0, ask(3, timeout_s=4.0), []),
            (1.0, Wake(), ["fail 1: timeout"]),
            (2.0, Wake(), ["fail 2: timeout"]),
            (3.9, Wake(), []),
            (4.0, Wake(), ["fail 3: timeout"]),
        ],
    ),
    "a deadline counts from the arrival, wherever it waits": (
        {"mood": 2, "moods": {"max_batch_size": 1}, "admission": AdmissionSpec(classes={"quick": ClassSpec(deadline=2.0)})},
        [
            (0.0, ask(1), ["mood-0 #1: 1"]),
            (0.0, ask(2), ["mood-1 #2: 2"]),
            (0.0, ask(3, "quick"), []),
            (1.0, ReplicaDown("mood-0"), []),
            (2.0, Wake(), ["fail 3: timeout"]),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_table(name: str) -> None:
    given_, table = TABLES[name]
    follow(started(deployment(**given_)), table)


def test_a_request_that_is_refused_does_not_stay_at_the_door() -> None:
    core = started(deployment(**one_mood(queue=1, per_key=RateLimit(tokens_per_s=1, burst=10))))
    # (now_s, event, requests at the door afterwards)
    for now_s, event, count in [
        (0.0, ask(1, key="ann"), 0),
        (0.0, ask(2, key="ben"), 0),
        (0.0, Knock(3, key="ann"), 1),
        (0.0, ask(3, key="ann"), 0),  # rate_limited
        (0.0, Knock(4, key="cat"), 1),
        (0.0, ask(4, key="cat"), 0),  # queue_full
        (0.0, Knock(5, key="cat"), 1),
        (0.0, Drain(), 1),
        (0.0, ask(5, key="cat"), 0),  # draining
    ]:
        core.handle(event, now_s=now_s)
        assert core.at_the_door == count, event


def test_the_timer_names_the_deadline() -> None:
    core = started(deployment(**one_mood(classes={"quick": ClassSpec(deadline=2.0)})))
    # (now_s, event, the timer afterwards)
    for now_s, event, timer_s in [
        (0.0, ask(1, "quick"), 2.0),
        (0.5, ask(2, timeout_s=1.0), 1.5),  # the next, not the first
        (0.6, ask(3, "quick"), 1.5),
        (1.0, Cancel(2), 2.0),
        (1.2, done("mood-0", 1), 2.6),  # 1 is complete
        (1.3, ask(4), 2.6),  # none
        (2.6, Wake(), None),
    ]:
        core.handle(event, now_s=now_s)
        assert core.next_timer_s() == (None if timer_s is None else pytest.approx(timer_s)), event


def test_an_answer_that_would_come_too_late_is_not_begun() -> None:
    """By the estimate for the line as it is: the same request is let in when nobody is before it."""
    admission = AdmissionSpec(classes={"quick": ClassSpec(deadline=0.5)})
    core = started(deployment(chat=[1000], chats={"max_batch_size": 1}, admission=admission))
    expected_s = assigned(core.handle(chat(1, 100, 50, "quick"), now_s=0.0)).expected_s
    assert 0.25 < expected_s < 0.4, "once, but not twice, fits into the deadline"
    follow(core, [(0.0, chat(2, 100, 50, "quick"), ["reject 2: deadline, 1 s"])])
    follow(core, [(0.0, chat(3, 100, 50), [])])  # who has none may wait
    longer = core.handle(chat(4, 100, 600, "quick"), now_s=0.0)
    assert isinstance(longer[0], Reject)
    assert longer[0].retry_after_s > 3.0, "by so much it is too late"
    core.check_invariants()


def test_nobody_is_refused_for_an_estimate_that_is_none() -> None:
    """On a CPU nothing is known of a model until one of its steps has run."""
    core = started(replace(deployment(mood=1, moods={"max_batch_size": 1}), gpu=None))
    follow(
        core,
        [
            (0.0, ask(1, timeout_s=0.001), ["mood-0 #1: 1"]),
            (0.0, ask(2), []),
            (1.0, ask(5, timeout_s=0.9), []),  # nor does a step that is not over say anything
            (1.5, Cancel(5), []),
            (2.0, done("mood-0", 1), ["complete 1", "mood-0 #2: 2"]),  # late, and known from here on
            (
                2.0,
                ask(3, timeout_s=0.001),
                ["reject 3: deadline, 4.799 s"],
            ),  # two seconds for 2 and two for 3, and a fifth
            (2.0, ask(4, timeout_s=5.0), []),
        ],
    )


def test_classes_that_nobody_has_named_are_one() -> None:
    """They share what is learned of the lengths of answers, and a caller cannot make up states to remember."""
    core = started(deployment(**one_chat(classes={"named": ClassSpec()})))
    expected_s = []
    for i, name in enumerate(("x", "y", "", "named"), start=1):
        expected_s.append(assigned(core.handle(chat(i, 10, 100, name), now_s=float(i))).expected_s)
        core.handle(done("chat-0", i, i), now_s=i + 0.01)  # of a hundred tokens it took one
    first, second, third, named = expected_s
    assert second == pytest.approx(third, rel=0.1) and max(second, third) < first / 10
    assert named == pytest.approx(first, rel=0.3), "of this class nothing is known"
    assert set(core._gate._classes) == {"", "named"}


@pytest.mark.parametrize("how", ["completed", "failed", "cancelled", "timeout", "lost"])
def test_whatever_becomes_of_them_the_books_are_balanced(how: str) -> None:
    """A class's tokens are all there again but for those used, and nobody is left in any count."""
    classes = {"bulk": ClassSpec(rate_limit=FEW_TOKENS, deadline=5.0)}
    core = started(deployment(chat=[100], chats={"max_batch_size": 2}, admission=AdmissionSpec(classes=classes)))
    core.handle(chat(1, 10, 20, "bulk"), now_s=0.0)
    core.handle(chat(2, 10, 20, "bulk"), now_s=0.0)
    core.handle(chat(3, 10, 20, "bulk"), now_s=0.0)
    used = 11  # ten read, one written
    match how:
        case "completed":
            core.handle(done("chat-0", 1), now_s=0.0)
            core.handle(done("chat-0", 2, 1, 2), now_s=0.0)
            core.handle(done("chat-0", 3, 3), now_s=0.0)
            used = 12 + 11 + 11
        case "failed":
            core.handle(StepFailed("chat-0", 1, "engine_error"), now_s=0.0)
            core.handle(StepFailed("chat-0", 2, "engine_error"), now_s=0.0)
            core.handle(StepFailed("chat-0", 3, "engine_error"), now_s=0.0)
            core.handle(StepFailed("chat-0", 4, "engine_error"), now_s=0.0)
            used = 0
        case "cancelled":
            for i in (1, 2, 3):
                core.handle(Cancel(i), now_s=0.0)
            core.handle(done("chat-0", 1), now_s=0.0)
        case "timeout":
            core.handle(Wake(), now_s=5.0)
            core.handle(done("chat-0", 1), now_s=5.0)
        case "lost":
            core.handle(ReplicaDown("chat-0"), now_s=0.0)
            used = 0
    core.check_invariants()
    assert core.in_flight == core.at_the_door == core.waiting("chat") == core.running("chat") == 0
    assert core._gate._limiters["bulk"].tokens.wait_s(100, now_s=0.0) == pytest.approx(used / 10)
    assert all(traffic.waiting == 0 for traffic in core._gate._classes.values())


def assigned(actions: list[Action]) -> Assign:
    assert isinstance(actions[0], Assign)
    return actions[0]


# --- whatever happens ---------------------------------------------------------------------------------------------

CLASSES = {"a": ClassSpec(max_queue_size=2), "b": ClassSpec(priority=1, deadline=3.0)}
NAMES = st.sampled_from(["", "a", "b", "unknown"])
HAPPENINGS = st.lists(
    st.one_of(
        st.tuples(st.just("knock"), NAMES),
        st.tuples(st.just("arrive"), NAMES),
        st.tuples(st.just("come in"), st.integers(0, 9)),
        st.tuples(st.just("step"), st.booleans()),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
        st.tuples(st.just("wake"), st.just(0)),
        st.tuples(st.just("pass"), st.sampled_from([0.1, 2.0])),
    ),
    max_size=60,
)


class Books:
    """Keeps, by what goes in and comes out alone, who is at the door and who is in a line."""

    def __init__(self) -> None:
        rule = {"max_batch_size": 2, "max_queue_size": 3}
        self.core = started(deployment(mood=2, moods=rule, admission=AdmissionSpec(classes=CLASSES)))
        self.now_s = 0.0
        self.asked = 0
        self.door: dict[int, str] = {}
        self.line: dict[int, str] = {}
        self.steps: dict[str, RunStep] = {}

    def feed(self, event: Event) -> None:
        for action in self.core.handle(event, now_s=self.now_s):
            match action:
                case Reject(request_id=i) | Fail(request_id=i) | Complete(request_id=i):
                    self.door.pop(i, None)
                    self.line.pop(i, None)
                case RunStep():
                    self.steps[action.replica_id] = action
                    for prefill in action.prefills:
                        self.line.pop(prefill.request_id, None)
        self.core.check_invariants()
        named = [name if name in CLASSES else "" for name in (*self.door.values(), *self.line.values())]
        counts = Counter({t.name: t.waiting for t in self.core._gate._classes.values()})
        assert counts == Counter(named)
        assert len(self.door) == self.core.at_the_door

    def happen(self, what: str, which: Any) -> None:
        waiting = sorted({**self.door, **self.line})
        match what:
            case "knock" | "arrive":
                self.asked += 1
                (self.door if what == "knock" else self.line)[self.asked] = which
                self.feed(Knock(self.asked, which) if what == "knock" else ask(self.asked, which))
            case "come in" if self.door:
                request_id = sorted(self.door)[which % len(self.door)]
                self.line[request_id] = self.door.pop(request_id)
                self.feed(ask(request_id, self.line[request_id]))
            case "step" if self.steps:
                step = self.steps.pop(min(self.steps))
                self.feed(
                    StepDone(step.replica_id, step.step_id)
                    if which
                    else StepFailed(step.replica_id, step.step_id, "bad_token")
                )
            case "cancel" if waiting:
                request_id = waiting[which % len(waiting)]
                self.door.pop(request_id, None)
                self.line.pop(request_id, None)
                self.feed(Cancel(request_id))
            case "wake":
                self.feed(Wake())
            case "pass":
                self.now_s += which


@settings(deadline=None)
@given(HAPPENINGS)
def test_a_class_counts_those_at_the_door_and_in_the_lines(happenings: list[tuple[str, Any]]) -> None:
    books = Books()
    for what, which in happenings:
        books.happen(what, which)
    for request_id in list(books.door):
        del books.door[request_id]
        books.feed(Cancel(request_id))
    while books.steps:
        books.happen("step", True)
    assert books.core.in_flight == 0
    assert not books.line and all(t.waiting == 0 for t in books.core._gate._classes.values())
