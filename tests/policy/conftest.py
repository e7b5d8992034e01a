"""Deployments by hand, and tables of (now_s, event, expected actions) to hold a core against."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gpuplan.hardware import mig
from gpuplan.hardware.catalog import gpu
from gpuplan.policy.core import ServingCore
from gpuplan.policy.vocabulary import (
    Action,
    Assign,
    Complete,
    Event,
    Fail,
    Prefill,
    Reject,
    ReplicaUp,
    RunStep,
    Scale,
    StartReplica,
    StepDone,
    StopReplica,
    Trip,
    Unload,
)
from gpuplan.scenario.demand import AutoscaleSpec, BatchingSpec, ModelSource
from gpuplan.scenario.deployment import Deployment, Replica, Slice

CARD = gpu("h100-80gb")


def deployment(
    *,
    mood: int = 0,
    chat: Sequence[int | None] = (),
    moods: dict[str, Any] | None = None,
    chats: dict[str, Any] | None = None,
    **more: Any,
) -> Deployment:
    """`mood` classifiers and one `chat` decoder for each KV limit in `chat`, with those batching rules and whatever
    `more` a Deployment has."""
    slices = tuple(Slice(i, mig.whole(CARD), 0) for i in range(mood + len(chat)))
    replicas = [Replica(f"mood-{i}", "mood", "classifier", slices[i], None) for i in range(mood)]
    replicas += [Replica(f"chat-{i}", "chat", "decoder", slices[mood + i], kv) for i, kv in enumerate(chat)]
    rules = {"mood": BatchingSpec(**(moods or {})), "chat": BatchingSpec(**(chats or {}))}
    models = {"mood": ModelSource(emulate="bert-base"), "chat": ModelSource(emulate="llama-3-8b")}
    used = {r.model for r in replicas}
    return Deployment(
        gpu=CARD,
        price_per_hour=1.0,
        layouts=(("whole",),) * len(slices),
        slices=slices,
        replicas=tuple(replicas),
        batching={name: rule for name, rule in rules.items() if name in used},
        autoscale=AutoscaleSpec(),
        models={name: source for name, source in models.items() if name in used},
        **more,
    )


def started(supply: Deployment) -> ServingCore:
    """A core whose replicas are all up."""
    core = ServingCore(supply)
    for replica in supply.replicas:
        assert core.handle(ReplicaUp(replica.id), now_s=0.0) == []
    return core


def said(action: Action) -> str:
    """An action in a word or two: `mood-0 #1: 1 2` runs requests 1 and 2, `3+40` prefills 40 tokens of 3 and more are
    to come, `3+40!` are its last, `=4` decodes one of 4."""
    match action:
        case RunStep(replica_id=replica_id, step_id=step_id, prefills=prefills, decodes=decodes):
            parts = [_prefill(p, replica_id) for p in prefills] + [f"={i}" for i in decodes]
            return f"{replica_id} #{step_id}: {' '.join(parts)}"
        case Complete(request_id=request_id):
            return f"complete {request_id}"
        case Reject(request_id=request_id, reason=reason, retry_after_s=retry_after_s):
            return f"reject {request_id}: {reason}, {retry_after_s:g} s"
        case Fail(request_id=request_id, reason=reason):
            return f"fail {request_id}: {reason}"
        case Unload(replica_id=replica_id):
            return f"unload {replica_id}"
        case Trip(name=name, state=state):
            return f"{name} {state}"
        case Scale(model=model, replicas=replicas):
            return f"scale {model} to {replicas}"
        case StartReplica(replica_id=replica_id):
            return f"start {replica_id}"
        case StopReplica(replica_id=replica_id):
            return f"stop {replica_id}"
        case Assign(request_id=request_id, replica_id=replica_id, taken_from=taken_from):
            return f"{request_id} waits for {replica_id}{f', no longer for {taken_from}' if taken_from else ''}"


def _prefill(prefill: Prefill, replica_id: str) -> str:
    if replica_id.startswith("mood"):
        return str(prefill.request_id)
    return f"{prefill.request_id}+{prefill.tokens}{'!' if prefill.last else ''}"


def done(replica_id: str, step_id: int, *ended: int) -> StepDone:
    return StepDone(replica_id, step_id, ended)


def follow(core: ServingCore, table: Iterable[tuple[float, Event, list[str]]], *, assigned: bool = False) -> None:
    """Every event gives the expected actions, and the core's invariants hold after each. With `assigned`, the table
    also says who waits for which replica."""
    for row, (now_s, event, expected) in enumerate(table):
        actions = [said(a) for a in core.handle(event, now_s=now_s) if assigned or not isinstance(a, Assign)]
        assert actions == expected, f"row {row}: {event} at {now_s} s"
        core.check_invariants()
