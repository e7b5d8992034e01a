"""The core with KV cache in blocks: what is cached is not read again, who gives way, and steps put together ahead."""

from __future__ import annotations

from typing import Any

import pytest

from gpuplan.policy.vocabulary import Action, Arrive, Event, ReplicaDown, ReplicaUp, RunStep, StepDone
from gpuplan.scenario.engine import Engine
from tests.policy.conftest import deployment, done, follow, started

Table = list[tuple[float, Event, list[str]]]
A = (("a", 8),)


def engine(**changes: Any) -> Engine:
    """Blocks of four tokens, and steps that whoever came meanwhile joins at once."""
    return Engine(**{"name": "vllm", "block_size": 4, "prefix_caching": True, **changes})


def ask(request_id: int, prompt: int, output: int, spans: tuple[tuple[str, int], ...] = ()) -> Arrive:
    return Arrive(request_id, "chat", prompt, output, spans=spans)


TABLES: dict[str, tuple[int, Engine, Table]] = {
    "a beginning that is there is not read again": (
        40,
        engine(),
        [
            (0.0, ask(1, 10, 2, A), ["chat-0 #1: 1+10!"]),
            (0.1, done("chat-0", 1), ["chat-0 #2: =1"]),
            (0.1, ask(2, 10, 1, A), []),
            (0.2, done("chat-0", 2), ["complete 1", "chat-0 #3: 2+2!"]),  # nobody holds it now, and it is kept
            (0.3, done("chat-0", 3), ["complete 2"]),
        ],
    ),
    "unless nothing is kept": (
        40,
        engine(prefix_caching=False),
        [
            (0.0, ask(1, 10, 1, A), ["chat-0 #1: 1+10!"]),
            (0.1, done("chat-0", 1), ["complete 1"]),
            (0.2, ask(2, 10, 1, A), ["chat-0 #2: 2+10!"]),
        ],
    ),
    "a replica that is loaded anew has nothing": (
        40,
        engine(),
        [
            (0.0, ask(1, 10, 1, A), ["chat-0 #1: 1+10!"]),
            (0.1, done("chat-0", 1), ["complete 1"]),
            (0.2, ReplicaDown("chat-0", returns=True), []),
            (0.3, ReplicaUp("chat-0"), []),
            (0.4, ask(2, 10, 1, A), ["chat-0 #2: 2+10!"]),
        ],
    ),
    "only the prompt is reserved": (
        12,
        engine(),
        [
            (0.0, ask(1, 4, 8), ["chat-0 #1: 1+4!"]),  # by and by all three blocks
            (0.0, ask(2, 8, 1), []),
            (0.1, done("chat-0", 1), ["chat-0 #2: =1"]),  # one block of its own, one more: two are not left
            (0.2, done("chat-0", 2), ["chat-0 #3: =1"]),
        ],
    ),
    "whoever was admitted last gives way and is read again with what it has": (
        16,
        engine(),
        [
            (0.0, ask(1, 6, 9), ["chat-0 #1: 1+6!"]),
            (0.0, ask(2, 6, 9), []),
            (0.1, done("chat-0", 1), ["chat-0 #2: 2+6! =1"]),  # four blocks, all taken
            (0.2, done("chat-0", 2), ["chat-0 #3: =1 =2"]),
            (0.3, done("chat-0", 3), ["chat-0 #4: =1"]),  # 1 needs a third: 2 gives way, with two tokens of nine
            (0.4, done("chat-0", 4), ["chat-0 #5: =1"]),  # 2 would need three blocks: one is left
            (0.5, done("chat-0", 5), ["chat-0 #6: =1"]),
            (0.6, done("chat-0", 6), ["chat-0 #7: =1"]),
            (0.7, done("chat-0", 7), ["chat-0 #8: =1"]),
            (0.8, done("chat-0", 8), ["chat-0 #9: =1"]),
            (0.9, done("chat-0", 9), ["complete 1", "chat-0 #10: 2+8!"]),  # its first block was taken meanwhile
            *[(1.0 + i / 10, done("chat-0", 10 + i), [f"chat-0 #{11 + i}: =2"]) for i in range(6)],
            (1.6, done("chat-0", 16), ["complete 2"]),  # nine tokens in all
        ],
    ),
    "steps are put together ahead": (
        400,
        engine(schedules_ahead=True),
        [
            (0.0, ask(1, 8, 9), ["chat-0 #1: 1+8!"]),  # nothing runs: at once
            (0.1, ask(2, 8, 9), []),
            (0.2, done("chat-0", 1), ["chat-0 #2: =1"]),  # put together when 1 began
            (0.3, ask(3, 8, 9), []),
            (0.4, done("chat-0", 2), ["chat-0 #3: 2+8! =1"]),  # put together at 0.2
            (0.5, done("chat-0", 3), ["chat-0 #4: 3+8! =1 =2"]),
        ],
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_table(name: str) -> None:
    kv_tokens, how, table = TABLES[name]
    follow(started(deployment(chat=[kv_tokens], chats={"max_batch_tokens": 64}, engine=how)), table)


def test_everybody_gets_all_of_their_tokens_however_often_they_give_way() -> None:
    core = started(deployment(chat=[40], chats={"max_batch_tokens": 16}, engine=engine(schedules_ahead=True)))
    wanted = {i: 3 + 2 * i for i in range(12)}
    got: dict[int, int] = dict.fromkeys(wanted, 0)
    actions: list[Action] = []
    for i, output in wanted.items():
        actions += core.handle(ask(i, 5 + i % 3, output, (("a", 4),)), now_s=0.0)
    now_s, read_again = 0.0, 0
    while steps := [action for action in actions if isinstance(action, RunStep)]:
        now_s += 0.01
        (step,) = steps
        read_again += sum(got[p.request_id] > 0 for p in step.prefills)
        for request_id in step.answered():
            got[request_id] += 1
        actions = core.handle(StepDone("chat-0", step.step_id), now_s=now_s)
        core.check_invariants()
    assert got == wanted and read_again
    assert core.in_flight == 0 and core.kv_usage("chat") == 0
