"""Which replica is chosen, and what an idle one takes over."""

from __future__ import annotations

import pytest

from gpuplan.policy.vocabulary import Arrive, Assign, Event, ReplicaDown, ReplicaUp, RunStep, StepDone
from gpuplan.scenario import deployment as supply
from gpuplan.scenario.build import build
from gpuplan.scenario.demand import Scenario
from gpuplan.sim.service_times import ServiceTimes
from tests.policy.conftest import deployment, done, follow, started

Table = list[tuple[float, Event, list[str]]]


def ask(request_id: int, prompt: int, output: int) -> Arrive:
    return Arrive(request_id, "chat", prompt, output)


def uneven(max_batch_size: int = 1) -> supply.Deployment:
    """chat-0 on a slice of 3, chat-1 on a slice of 1: about a third as fast in prefill, half as fast in decode."""
    told = {
        "name": "uneven",
        "models": {"chat": {"emulate": "llama-3-8b"}},
        "deployment": {
            "gpu": "h100-80gb",
            "mig": ["3g.40gb", "1g.20gb"],
            "replicas": [{"model": "chat", "slice": "3g.40gb"}, {"model": "chat", "slice": "1g.20gb"}],
            "batching": {"chat": {"max_batch_size": max_batch_size, "max_queue_size": 8}},
        },
    }
    return supply.resolve(build(told, Scenario))


TABLES: dict[str, Table] = {
    "the faster one first, the slower rather than a long wait": [
        (0.0, ask(1, 1000, 500), ["1 waits for chat-0", "chat-0 #1: 1+1000!"]),
        (0.01, ask(2, 1000, 500), ["2 waits for chat-1", "chat-1 #2: 2+1000!"]),
        (0.02, ask(3, 1000, 500), ["3 waits for chat-0"]),  # both are busy: the faster one will be done sooner
    ],
    "a slow one is left idle while the fast one is nearly done": [
        (0.0, ask(1, 2000, 1), ["1 waits for chat-0", "chat-0 #1: 1+2000!"]),
        (0.08, ask(2, 2000, 1), ["2 waits for chat-0"]),  # 1 is due after 85 ms, and 2 takes 190 ms on chat-1
        (0.085, done("chat-0", 1), ["complete 1", "chat-0 #2: 2+2000!"]),
    ],
    "an idle one takes over what waits for one that is late": [
        (0.0, ask(1, 2000, 1), ["1 waits for chat-0", "chat-0 #1: 1+2000!"]),
        (0.08, ask(2, 2000, 1), ["2 waits for chat-0"]),
        (0.5, ReplicaUp("chat-1"), ["2 waits for chat-1, no longer for chat-0", "chat-1 #2: 2+2000!"]),
    ],
    "what has started is not moved": [
        (0.0, ask(1, 2000, 500), ["1 waits for chat-0", "chat-0 #1: 1+2000!"]),
        (60.0, ReplicaUp("chat-1"), []),
    ],
    "whoever waits for one that is lost waits for the other": [
        (0.0, ask(1, 100, 500), ["1 waits for chat-0", "chat-0 #1: 1+100!"]),
        (0.0, ask(2, 100, 500), ["2 waits for chat-1", "chat-1 #2: 2+100!"]),
        (0.0, ask(3, 100, 500), ["3 waits for chat-0"]),
        (0.1, done("chat-0", 1), ["chat-0 #3: =1"]),
        (0.2, ReplicaDown("chat-0"), ["fail 1: replica_lost", "3 waits for chat-1, no longer for chat-0"]),
    ],
}


@pytest.mark.parametrize("name", TABLES)
def test_table(name: str) -> None:
    follow(started(uneven()), TABLES[name], assigned=True)


def test_a_replica_that_has_become_slow_gets_less() -> None:
    core = started(deployment(mood=2, moods={"max_batch_size": 1, "max_queue_size": 100}))
    now_s, taken = 0.0, {"mood-0": 0, "mood-1": 0}
    due: dict[str, tuple[float, StepDone]] = {}
    for request_id in range(400):
        now_s += 0.004
        for replica_id in sorted(due, key=lambda r: due[r][0]):
            while replica_id in due and due[replica_id][0] <= now_s:
                at_s, event = due.pop(replica_id)
                run(core.handle(event, now_s=at_s), at_s, taken, due)
        run(core.handle(Arrive(request_id, "mood", 10), now_s=now_s), now_s, taken, due)
    assert taken["mood-0"] > 4 * taken["mood-1"] > 0, "mood-1 takes ten times as long"


def run(actions: list[object], now_s: float, taken: dict[str, int], due: dict[str, tuple[float, StepDone]]) -> None:
    for action in actions:
        if isinstance(action, RunStep):
            taken[action.replica_id] += 1
            seconds = 0.030 if action.replica_id == "mood-1" else 0.003
            due[action.replica_id] = (now_s + seconds, done(action.replica_id, action.step_id))


def test_of_many_two_are_looked_at() -> None:
    """With every other replica idle, a request may go to a busy one; but all get their share, and it replays."""
    cores = [started(deployment(mood=40, moods={"max_batch_size": 1, "max_queue_size": 1000})) for _ in range(2)]
    homes: list[list[str]] = [[], []]
    for core, found in zip(cores, homes, strict=True):
        for request_id in range(400):
            actions = core.handle(Arrive(request_id, "mood", 10), now_s=0.0)
            found += [a.replica_id for a in actions if isinstance(a, Assign)][-1:]
    assert homes[0] == homes[1]
    counts = [homes[0].count(f"mood-{i}") for i in range(40)]
    assert min(counts) >= 8 and max(counts) <= 12, "two choices keep them even"


def test_the_estimate_is_what_comes_of_it() -> None:
    """Alone on a replica, by the roofline: the estimate of a request is near what its steps should take in all."""
    core = started(uneven())
    assign = core.handle(ask(1, 1000, 200), now_s=0.0)[0]
    assert isinstance(assign, Assign)
    timer = ServiceTimes({}).timer(uneven(), uneven().replicas[0])
    actions, now_s = core.handle(StepDone("chat-0", 1), now_s=0.05), 0.05
    while steps := [a for a in actions if isinstance(a, RunStep)]:
        now_s += timer(steps[0].load)
        actions = core.handle(StepDone("chat-0", steps[0].step_id), now_s=now_s)
    assert assign.expected_s == pytest.approx(now_s, rel=0.15)


def test_core_never_refuses_while_a_replica_could_start_it() -> None:
    core = started(uneven())
    core.handle(ask(0, 2000, 1), now_s=0.0)
    for request_id in range(1, 9):
        core.handle(ask(request_id, 10, 1), now_s=0.048)
    assert core.in_flight == 9, "a queue of eight, and chat-1 took what is over"
