"""Replicas come when there is much to do and go when there is not; nobody who waits is forgotten over it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from gpuplan.policy.core import ServingCore
from gpuplan.policy.vocabulary import (
    Arrive,
    Assign,
    Cancel,
    Decision,
    Drain,
    Event,
    Reject,
    ReplicaDown,
    ReplicaUp,
    Scale,
    StartReplica,
    StepDone,
    StopReplica,
    Swap,
    VersionAdded,
    VersionDropped,
    Wake,
)
from gpuplan.scenario import deployment as supply
from gpuplan.scenario.build import build
from gpuplan.scenario.demand import BreakerSpec, Scenario
from gpuplan.scenario.deployment import Deployment
from gpuplan.scenario.schedule import Schedule, ScheduledRequest
from gpuplan.sim.service_times import ServiceTimes
from gpuplan.sim.simulator import simulate
from tests.policy.conftest import done, follow, started

Table = list[tuple[float, Event, list[str]]]

QUICK = {"scale_up_window": 0, "stabilization_window": "3s", "cooldown": "1s", "scale_to_zero_after": "5s"}
"""Up at the first look that asks for it, down after three seconds."""
COLD_START_S = 5.0


def scenario(slices: int, models: dict[str, dict[str, Any]], **autoscale: Any) -> Scenario:
    """Small decoders, one request at a time on slices of 1g; of each model one replica to begin with. Looked at every
    second."""
    told = {
        "name": "scaled",
        "models": {name: {"emulate": "phi-2"} for name in models},
        "traffic": [{"name": n, "model": n, "arrivals": {"process": "constant", "rate": 1}} for n in models],
        "deployment": {
            "gpu": "a100-80gb",
            "mig": ["1g.10gb"] * slices,
            "replicas": [{"model": name, "slice": "1g.10gb"} for name in models],
            "batching": {name: {"max_batch_size": 1} for name in models},
            "autoscale": {
                "cold_start": COLD_START_S,
                "models": {name: {**QUICK, **rule} for name, rule in models.items()},
                **autoscale,
            },
        },
    }
    return build(told, Scenario)


def chats(least: int = 1, most: int = 2, **autoscale: Any) -> Deployment:
    rule = {"min_replicas": least, "max_replicas": most}
    return supply.resolve(scenario(most, {"chat": rule}, **autoscale))


def ask(request_id: int, model: str = "chat", timeout_s: float | None = None, prompt: int = 100) -> Arrive:
    """About twelve seconds of work."""
    return Arrive(request_id, model, prompt, 500, timeout_s=timeout_s)


def small(request_id: int, timeout_s: float | None = None) -> Arrive:
    """Hardly any work."""
    return Arrive(request_id, "chat", 10, 1, timeout_s=timeout_s)


def looks(first: int, last: int) -> Table:
    """Nothing comes of any of them."""
    return [(float(second), Wake(), []) for second in range(first, last + 1)]


def waiting(numbers: Iterable[int], at_s: float, replica_id: str = "chat-0", model: str = "chat") -> Table:
    return [(at_s, ask(i, model), [f"{i} waits for {replica_id}"]) for i in numbers]


def cancelled(numbers: Iterable[int], at_s: float) -> Table:
    return [(at_s, Cancel(i), []) for i in numbers]


MUCH_TO_DO: Table = [
    *looks(0, 0),
    (0.1, ask(1), ["1 waits for chat-0", "chat-0 #1: 1+100!"]),
    *waiting(range(2, 9), 0.1),
    (1.0, Wake(), ["scale chat to 2", "start chat-1"]),
    *looks(2, 5),
    (6.0, ReplicaUp("chat-1"), ["2 waits for chat-1, no longer for chat-0", "chat-1 #2: 2+100!"]),
]
"""Two replicas of two, each with a request, and six more that wait for chat-0."""

NOTHING_MORE_TO_DO: Table = [
    *MUCH_TO_DO,
    *cancelled(range(3, 9), 6.1),
    *looks(6, 9),
    (10.0, Wake(), ["scale chat to 1"]),  # chat-1: of two with as much to do the one that came last
]

NOBODY_THERE: Table = [
    *looks(0, 4),
    (5.0, Wake(), ["scale chat to 0", "stop chat-0"]),
    (5.1, ReplicaDown("chat-0", "scaled down"), []),
    *looks(6, 6),
]

TABLES: dict[str, tuple[Deployment, Table]] = {
    # --- up ---
    "load brings replicas, and they take their share": (
        chats(most=3),
        [
            *looks(0, 0),
            (0.1, ask(1), ["1 waits for chat-0", "chat-0 #1: 1+100!"]),
            *waiting(range(2, 9), 0.1),
            (1.0, Wake(), ["scale chat to 3", "start chat-1", "start chat-2"]),
            *looks(2, 5),  # they start: that is enough
            (5.9, ask(9), ["9 waits for chat-1"]),  # which is nearly there, and has nobody
            (6.0, ReplicaUp("chat-1"), ["chat-1 #2: 9+100!"]),
            (6.0, ReplicaUp("chat-2"), ["2 waits for chat-2, no longer for chat-0", "chat-2 #3: 2+100!"]),
            (6.1, done("chat-2", 3, 2), ["complete 2", "3 waits for chat-2, no longer for chat-0", "chat-2 #4: 3+100!"]),
        ],
    ),
    "no more than there are slices": (
        chats(most=2),
        [*MUCH_TO_DO, (6.5, ask(9), ["9 waits for chat-1"]), *looks(7, 9)],
    ),
    "one that nobody has asked for is not used": (
        chats(most=2),
        [
            (0.0, ReplicaUp("chat-1"), []),
            (0.1, ask(1), ["1 waits for chat-0", "chat-0 #1: 1+100!"]),
            (0.1, ask(2), ["2 waits for chat-0"]),
            (0.2, ReplicaDown("chat-1"), []),
        ],
    ),
    # --- down ---
    "a replica that goes ends what it runs": (
        chats(),
        [
            *NOTHING_MORE_TO_DO,
            (10.1, done("chat-1", 2), ["chat-1 #3: =2"]),  # on and on
            (10.2, small(10), ["10 waits for chat-0"]),  # nobody new
            *looks(11, 11),
            (11.1, done("chat-1", 3, 2), ["complete 2", "stop chat-1"]),  # although 10 waits for chat-0
            (11.2, small(11), ["11 waits for chat-0"]),
            (11.3, ReplicaDown("chat-1", "scaled down"), []),
        ],
    ),
    "one whose last request is cancelled goes, too": (
        chats(),
        [*NOTHING_MORE_TO_DO, (10.1, Cancel(2), []), (10.2, done("chat-1", 2), ["stop chat-1"])],
    ),
    "what waits for it waits for another first": (
        supply.resolve(scenario(2, {"chat": {"max_replicas": 2, "scale_down_at": 2}})),
        [
            *MUCH_TO_DO,
            *cancelled(range(3, 9), 6.1),
            *looks(6, 8),
            *looks(9, 9),
            (9.1, small(10), ["10 waits for chat-1"]),
            (9.1, small(11), ["11 waits for chat-0"]),
            (10.0, Wake(), ["scale chat to 1", "10 waits for chat-0, no longer for chat-1"]),
            (10.1, done("chat-1", 2, 2), ["complete 2", "stop chat-1"]),
            (10.2, done("chat-0", 1, 1), ["complete 1", "chat-0 #3: 10+10!"]),
        ],
    ),
    "of two the one with less to do goes, though it came first": (
        chats(),
        [
            *MUCH_TO_DO,
            *cancelled(range(3, 9), 6.1),
            *looks(6, 8),
            (8.5, done("chat-0", 1, 1), ["complete 1"]),
            *looks(9, 9),
            (10.0, Wake(), ["scale chat to 1", "stop chat-0"]),
        ],
    ),
    "an idle one goes at once, and is there for the next time": (
        chats(),
        [
            *MUCH_TO_DO,
            *cancelled(range(3, 9), 6.1),
            *looks(6, 8),
            (8.5, done("chat-1", 2, 2), ["complete 2"]),
            *looks(9, 9),
            (10.0, Wake(), ["scale chat to 1", "stop chat-1"]),
            (10.1, ReplicaDown("chat-1", "scaled down"), []),
            *waiting(range(10, 20), 10.2),
            (11.0, Wake(), ["scale chat to 2", "start chat-1"]),
            (16.0, ReplicaUp("chat-1"), ["10 waits for chat-1, no longer for chat-0", "chat-1 #3: 10+100!"]),
        ],
    ),
    "one that was told to stop stays when it is wanted again": (
        chats(),
        [
            *NOTHING_MORE_TO_DO,
            *looks(11, 11),
            *waiting(range(10, 20), 11.5),
            (12.0, Wake(), ["scale chat to 2"]),  # there is nothing to start
            (12.1, done("chat-1", 2, 2), ["complete 2", "10 waits for chat-1, no longer for chat-0", "chat-1 #3: 10+100!"]),
            (12.2, done("chat-0", 1, 1), ["complete 1", "chat-0 #4: 11+100!"]),
        ],
    ),
    "one that has been freed already has to be started again": (
        chats(),
        [
            *NOTHING_MORE_TO_DO,
            (10.1, done("chat-1", 2, 2), ["complete 2", "stop chat-1"]),
            *waiting(range(10, 20), 10.2),
            *looks(11, 11),  # it is being freed: no slice to start one on
            (11.5, ReplicaDown("chat-1", "scaled down"), []),
            (12.0, Wake(), ["scale chat to 2", "start chat-1"]),
        ],
    ),
    "one that crashes while it is to stop is as good as stopped": (
        chats(),
        [
            *NOTHING_MORE_TO_DO,
            (10.1, ReplicaDown("chat-1", "killed", returns=True), ["2 waits for chat-0, no longer for chat-1", "stop chat-1"]),
            (10.2, ReplicaDown("chat-1", "scaled down"), []),
            (10.3, done("chat-0", 1, 1), ["complete 1", "chat-0 #3: 2+100!"]),
        ],
    ),
    "going is no failure": (
        replace(chats(), breakers=BreakerSpec(consecutive_failures=1)),
        [
            *NOTHING_MORE_TO_DO,
            (10.1, done("chat-1", 2, 2), ["complete 2", "stop chat-1"]),
            (10.2, ReplicaDown("chat-1", "scaled down"), []),
            (10.3, ask(10), ["10 waits for chat-0"]),
            (10.4, ReplicaDown("chat-0", "killed", returns=True), ["chat-0 open", "chat open", "1 waits for chat-0"]),
        ],
    ),
    "while another starts the last one serves": (
        chats(cold_start=30),
        [
            *MUCH_TO_DO[:-5],
            *cancelled(range(2, 9), 1.1),
            (1.2, done("chat-0", 1, 1), ["complete 1"]),
            *looks(2, 12),  # one would do; but chat-1 is not there yet
            (12.1, ask(10), ["10 waits for chat-0", "chat-0 #2: 10+100!"]),
            (12.2, done("chat-0", 2, 10), ["complete 10"]),
            (31.0, ReplicaUp("chat-1"), []),
            (31.0, Wake(), ["scale chat to 1", "stop chat-1"]),
        ],
    ),
    # --- two models ---
    "two models and one free slice: who is first has it": (
        supply.resolve(scenario(3, {"chat": {"max_replicas": 2}, "news": {"max_replicas": 2}})),
        [
            *looks(0, 0),
            (0.1, ask(1), ["1 waits for chat-0", "chat-0 #1: 1+100!"]),
            *waiting(range(2, 9), 0.1),
            (0.1, ask(11, "news"), ["11 waits for news-0", "news-0 #2: 11+100!"]),
            *waiting(range(12, 19), 0.1, "news-0", "news"),
            (1.0, Wake(), ["scale chat to 2", "start chat-1"]),
            *looks(2, 5),
            (6.0, ReplicaUp("chat-1"), ["2 waits for chat-1, no longer for chat-0", "chat-1 #3: 2+100!"]),
            *cancelled(range(3, 9), 6.0),
            (6.1, done("chat-0", 1, 1), ["complete 1"]),
            (6.1, done("chat-1", 3, 2), ["complete 2"]),
            *looks(7, 9),
            (10.0, Wake(), ["scale chat to 1", "stop chat-1"]),
            *looks(11, 11),  # it is not free before it is freed
            (11.5, ReplicaDown("chat-1", "scaled down"), []),
            (12.0, Wake(), ["scale news to 2", "start news-1"]),
            (17.0, ReplicaUp("news-1"), ["12 waits for news-1, no longer for news-0", "news-1 #4: 12+100!"]),
        ],
    ),
    # --- none ---
    "whoever comes to nobody has one started, and waits for it": (
        chats(least=0),
        [
            *NOBODY_THERE,
            (6.5, ask(1), ["scale chat to 1", "start chat-0", "1 waits for chat-0"]),
            (6.6, ask(2), ["2 waits for chat-0"]),  # not another
            (11.5, ReplicaUp("chat-0"), ["chat-0 #1: 1+100!"]),
        ],
    ),
    "a cold start is part of the estimate": (
        chats(least=0),
        [
            *NOBODY_THERE,
            (6.5, small(1, timeout_s=COLD_START_S), ["scale chat to 1", "start chat-0", "reject 1: deadline, 1.03631 s"]),
            (9.5, small(2, timeout_s=COLD_START_S), ["2 waits for chat-0"]),  # in two seconds it is there
        ],
    ),
    "for whom none would be large enough none is started": (
        chats(least=0),
        [*NOBODY_THERE, (6.5, ask(1, prompt=10**8), ["reject 1: too_long, 0 s"])],
    ),
    "nor is what cannot be started promised": (
        supply.resolve(scenario(2, {"chat": {"min_replicas": 0, "max_replicas": 1}, "news": {"max_replicas": 1}})),
        [
            *NOBODY_THERE[:-2],
            (5.1, ask(1), ["reject 1: no_replica, 1 s"]),  # it is being freed
            (5.2, ReplicaDown("chat-0", "scaled down"), []),
            (5.3, ask(2), ["scale chat to 1", "start chat-0", "2 waits for chat-0"]),
        ],
    ),
    "one that has been started for nothing goes when it is there": (
        chats(least=0, cold_start=30),
        [
            *NOBODY_THERE,
            (6.5, small(1), ["scale chat to 1", "start chat-0", "1 waits for chat-0"]),
            (6.6, Cancel(1), []),
            *looks(7, 20),  # it cannot be stopped yet
            (36.5, ReplicaUp("chat-0"), []),
            (36.5, Wake(), ["scale chat to 0", "stop chat-0"]),
        ],
    ),
    # --- a start that fails ---
    "a start that fails": (
        chats(least=0, most=1),
        [
            *NOBODY_THERE,
            (6.5, ask(1), ["scale chat to 1", "start chat-0", "1 waits for chat-0"]),
            (6.6, ask(2), ["2 waits for chat-0"]),
            (8.0, ReplicaDown("chat-0", "cannot be loaded"), ["fail 1: no_replica", "fail 2: no_replica"]),
            (8.1, ask(3), ["reject 3: no_replica, 1 s"]),
            *looks(9, 9),  # it is still being tried
            (11.5, ReplicaUp("chat-0"), []),
            (11.6, ask(4), ["4 waits for chat-0", "chat-0 #1: 4+100!"]),
        ],
    ),
    "those who wait for a start that fails have another": (
        chats(),
        [
            *MUCH_TO_DO[:-5],
            (1.1, ask(9), ["9 waits for chat-1"]),
            (3.0, ReplicaDown("chat-1", "cannot be loaded"), ["9 waits for chat-0, no longer for chat-1"]),
            (6.0, ReplicaUp("chat-1"), ["2 waits for chat-1, no longer for chat-0", "chat-1 #2: 2+100!"]),
        ],
    ),
    # --- when nothing is to come or go ---
    "draining": (
        chats(),
        [
            *looks(0, 0),
            (0.1, ask(1), ["1 waits for chat-0", "chat-0 #1: 1+100!"]),
            *waiting(range(2, 9), 0.1),
            (0.2, Drain(), []),
            *looks(1, 9),
        ],
    ),
    "draining, while one goes": (
        chats(),
        [*NOTHING_MORE_TO_DO, (10.1, Drain(), []), (10.2, done("chat-1", 2, 2), ["complete 2", "stop chat-1"])],
    ),
    "while a version takes over from another": (
        chats(),
        [
            *looks(0, 0),
            (0.1, ask(1), ["1 waits for chat-0", "chat-0 #1: 1+100!"]),
            *waiting(range(2, 9), 0.1),
            (0.2, VersionAdded("chat-0#2", "chat-0"), []),
            *looks(1, 3),  # it is being loaded
            (3.5, Swap("chat", ("chat-0#2",), ("chat-0",)), [
                *(f"{i} waits for chat-0#2, no longer for chat-0" for i in range(2, 9)),
            ]),
            *looks(4, 5),  # the old one still runs
            (5.5, done("chat-0", 1, 1), ["complete 1", "unload chat-0"]),
            *looks(6, 6),
            (6.5, VersionDropped("chat-0"), ["chat-0#2 #2: 2+100!"]),  # now there is memory
            (7.0, Wake(), ["scale chat to 2", "start chat-1"]),  # who came meanwhile is not forgotten
            (12.0, ReplicaUp("chat-1"), ["3 waits for chat-1, no longer for chat-0#2", "chat-1 #3: 3+100!"]),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_table(name: str) -> None:
    deployment, table = TABLES[name]
    core = started(deployment)
    follow(core, table, assigned=True)
    assert_alone_on_its_slice(core)


def assert_alone_on_its_slice(core: ServingCore) -> None:
    used = [r.spec.slice.id for r in core._replicas.values() if r.phase not in ("standby", "version")]
    assert len(used) == len(set(used)), "no two models on one slice"


def test_before_all_others_one_goes_that_is_down() -> None:
    core = started(chats())
    follow(core, [*MUCH_TO_DO, *cancelled(range(3, 9), 6.1), *looks(6, 8)], assigned=True)
    follow(
        core,
        [
            (8.5, ReplicaDown("chat-0", "killed", returns=True), []),
            (8.6, done("chat-1", 2, 2), ["complete 2", "chat-1 #3: 1+100!"]),
            (8.7, done("chat-1", 3, 1), ["complete 1"]),
            *looks(9, 9),
            (10.0, Wake(), ["scale chat to 1", "stop chat-0"]),  # of two with nothing to do
        ],
    )


def test_a_replica_that_is_lost_with_a_probe_while_it_goes_is_tried_when_it_is_back() -> None:
    spec = BreakerSpec(consecutive_failures=1, open=1, slow_factor=1000)
    core = started(replace(chats(), breakers=spec))
    follow(core, [*MUCH_TO_DO, *cancelled(range(3, 9), 6.1)], assigned=True)
    follow(
        core,
        [
            (6.2, StepDone("chat-1", 2, (), ((2, "nan_output"),)), ["fail 2: nan_output", "chat-1 open", "chat open"]),
            (7.2, Wake(), ["chat half_open", "chat-1 half_open"]),
            (7.3, small(10), ["chat-1 #3: 10+10!"]),
            (8.2, Wake(), []),
            (9.2, Wake(), []),
            (10.2, Wake(), []),
            (11.2, Wake(), ["scale chat to 1"]),  # chat-1, with its probe
            (11.3, ReplicaDown("chat-1", "killed", returns=True), ["stop chat-1"]),
            (11.4, ReplicaDown("chat-1", "scaled down"), []),
        ],
    )
    assert core._replicas["chat-1"].breaker.allows()


def test_the_timer_says_when_to_look() -> None:
    core = started(chats(interval=2))
    # (now_s, event, the timer afterwards)
    rows: list[tuple[float, Event, float | None]] = [
        (0.0, Wake(), 2.0),
        (0.5, Wake(), 2.0),  # too early to look
        (2.0, Wake(), 4.0),
        (7.3, Wake(), 9.3),  # late: what was missed is not made up for
        (8.0, ask(1, timeout_s=60.0), 9.3),
        (9.3, Wake(), 11.3),
        (9.5, Drain(), 68.0),  # no more looks; the deadline
        (9.6, done("chat-0", 1, 1), None),
    ]
    for now_s, event, timer_s in rows:
        core.handle(event, now_s=now_s)
        assert core.next_timer_s() == (None if timer_s is None else pytest.approx(timer_s)), event
    assert (
        started(replace(chats(), autoscale=msgspec.structs.replace(chats().autoscale, models={}))).next_timer_s()
        is None
    )


def test_whoever_looks_on_sees_them_come_and_go() -> None:
    core = started(chats())
    seen: list[dict[str, int]] = []
    for now_s, event, _ in [*NOTHING_MORE_TO_DO, (10.1, done("chat-1", 2, 2), []), (10.2, ReplicaDown("chat-1"), [])]:
        core.handle(event, now_s=now_s)
        counts = {name: count for name, count in core.replicas("chat").items() if count}
        if not seen or seen[-1] != counts:
            seen.append(counts)
    assert seen == [
        {"ready": 1, "standby": 1},
        {"ready": 1, "starting": 1},
        {"ready": 2},
        {"ready": 1, "stopping": 1},
        {"ready": 1, "standby": 1},
    ]


def test_a_model_without_a_replica_is_ready_if_it_may_be() -> None:
    core = started(chats(least=0))
    follow(core, NOBODY_THERE)
    assert core.replicas("chat")["ready"] == 0 and core.ready()


def test_the_estimate_for_who_waits_for_a_start_holds_the_cold_start() -> None:
    core = started(chats(least=0))
    follow(core, NOBODY_THERE)
    _, _, assign = core.handle(ask(1), now_s=6.5)
    alone = started(chats()).handle(ask(1), now_s=6.5)[0]
    assert isinstance(assign, Assign) and isinstance(alone, Assign)
    assert assign.expected_s == pytest.approx(COLD_START_S + alone.expected_s)


# --- simulated ----------------------------------------------------------------------------------------------------


def burst(rows: list[tuple[float, str]]) -> Schedule:
    requests = tuple(ScheduledRequest(i, at_s, name, name, 100, 100) for i, (at_s, name) in enumerate(rows))
    return Schedule(requests, rows[-1][0], 0)


def simulated(demand: Scenario, schedule: Schedule) -> tuple[list[Decision], Any]:
    run = simulate(demand, supply.resolve(demand), schedule, ServiceTimes({}), keep_decisions=True)
    decoder = msgspec.json.Decoder(Decision)
    return [decoder.decode(line) for line in run.decisions], run


def test_a_burst_brings_replicas_and_its_end_takes_them() -> None:
    """And one late request: it comes to nobody, and brings one back."""
    demand = scenario(3, {"chat": {"min_replicas": 0, "max_replicas": 3}})
    log, run = simulated(demand, burst([*((0.1 + i / 100, "chat") for i in range(40)), (200.0, "chat")]))
    assert set(run.requests["status"]) == {"completed"}
    actions = [(d.at_s, a) for d in log for a in d.actions]
    wanted = [a.replicas for _, a in actions if isinstance(a, Scale)]
    assert max(wanted) == 3 and wanted[-1] == 1, "three for the burst, one for the last"
    assert 0 in wanted
    assert {a.replica_id for _, a in actions if isinstance(a, StartReplica)} == {"chat-0", "chat-1", "chat-2"}
    assert {a.replica_id for _, a in actions if isinstance(a, StopReplica)} == {"chat-0", "chat-1", "chat-2"}
    up_s = {d.event.replica_id: d.at_s for d in log if isinstance(d.event, ReplicaUp) if d.at_s < 100}
    starts = [(s, a.replica_id) for s, a in actions if isinstance(a, StartReplica) if s < 100]
    assert all(up_s[replica_id] == pytest.approx(at_s + COLD_START_S) for at_s, replica_id in starts)
    by_replica = run.requests.groupby("replica").size()
    assert by_replica.min() >= 5, "all three have done their share"
    last = run.requests.iloc[-1]
    assert last["first_token_s"] - last["scheduled_s"] > COLD_START_S
    assert_replays(demand, log)


def test_two_models_take_turns_on_the_slices_that_are_left() -> None:
    """Each in its own time has both; while both want them, each slice has one."""
    rule = {"max_replicas": 3}
    demand = scenario(4, {"chat": rule, "news": rule})
    rows = [(0.1 + i / 100, "chat") for i in range(60)] + [(60.0 + i / 100, "news") for i in range(60)]
    log, run = simulated(demand, burst(rows))
    assert set(run.requests["status"]) == {"completed"}
    started_ids = [a.replica_id for d in log for a in d.actions if isinstance(a, StartReplica)]
    assert set(started_ids) == {"chat-1", "chat-2", "news-1", "news-2"}
    core = ServingCore(supply.resolve(demand))
    for decision in log:
        assert core.handle(decision.event, now_s=decision.at_s) == decision.actions
        core.check_invariants()
        assert_alone_on_its_slice(core)


def test_a_request_that_nobody_can_serve_ends_the_simulation_all_the_same() -> None:
    demand = scenario(2, {"chat": {"min_replicas": 0, "max_replicas": 2}})
    rows = burst([(0.1, "chat"), (60.0, "chat")])
    long = replace(rows.requests[1], prompt_tokens=10**8)
    log, run = simulated(demand, replace(rows, requests=(rows.requests[0], long)))
    assert [a.reason for d in log for a in d.actions if isinstance(a, Reject)] == ["too_long"]
    assert list(run.requests["status"]) == ["completed", "error"]
    assert_replays(demand, log)


def assert_replays(demand: Scenario, log: list[Decision]) -> None:
    core = ServingCore(supply.resolve(demand))
    for decision in log:
        assert core.handle(decision.event, now_s=decision.at_s) == decision.actions
