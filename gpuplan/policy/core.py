"""Every decision, behind one door: `handle(event, *, now_s) -> list[Action]`.

Two rules keep it simple. It looks at nothing but its arguments: time comes in, so a live server and a simulation
that feed it the same events get the same actions. It does nothing: what must happen comes back as data, in the order
in which it should be done, and the driver reports what came of it as new events.

A driver calls `handle` for every event, and once more with `Wake` when `next_timer_s` comes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gpuplan.policy import admission, batching, dispatch, failures
from gpuplan.policy.state import ModelState, ReplicaState, Sequence
from gpuplan.policy.vocabulary import (
    OUT_OF_MEMORY,
    Action,
    Arrive,
    Cancel,
    Complete,
    Drain,
    Event,
    Fail,
    ReplicaDown,
    ReplicaUp,
    RunStep,
    StepDone,
    StepFailed,
    Swap,
    Unload,
    VersionAdded,
    VersionDropped,
    Wake,
)
from gpuplan.scenario.deployment import Deployment, role


class ServingCore:
    """The decisions for one deployment. Not thread-safe: one driver, one event at a time, time never backwards."""

    def __init__(self, deployment: Deployment) -> None:
        self._replicas = {
            r.id: ReplicaState(r, order, deployment.batching[r.model].max_batch_size, [])
            for order, r in enumerate(deployment.replicas)
        }
        self._places = dict(self._replicas)
        self._models = {
            name: ModelState(
                name,
                role(source) == "decoder",
                deployment.batching[name],
                [r for r in self._replicas.values() if r.spec.model == name],
            )
            for name, source in deployment.models.items()
        }
        self._sequences: dict[int, Sequence] = {}
        self._model_of = {r.spec.id: self._models[r.spec.model] for r in self._replicas.values()}
        self._steps = 0
        self._draining = False
        self._now_s = float("-inf")
        self._doors: dict[type, Callable[[Any, list[Action]], ModelState | None]] = {
            Arrive: self._arrive,
            StepDone: self._step_done,
            StepFailed: self._step_failed,
            Cancel: self._cancel,
            ReplicaUp: self._replica_up,
            ReplicaDown: self._replica_down,
            VersionAdded: self._version_added,
            Swap: self._swap,
            VersionDropped: self._version_dropped,
            Drain: self._drain,
        }

    def handle(self, event: Event, *, now_s: float) -> list[Action]:
        """What to do about `event`, which happened at `now_s` (seconds on the driver's clock)."""
        self._now_s = max(self._now_s, now_s)
        actions: list[Action] = []
        if type(event) is Wake:
            for model in self._models.values():
                self._start_steps(model, actions)
        else:
            touched = self._doors[type(event)](event, actions)
            if touched is not None:
                self._start_steps(touched, actions)
                if touched.retiring:
                    self._unload(touched, actions)
        return actions

    def next_timer_s(self) -> float | None:
        """When to call `handle(Wake())` if nothing happens before: an idle replica's batch falls due."""
        due = [
            batching.batch_due_s(model)
            for model in self._models.values()
            if model.queue and not model.decoder and any(r.idle and not r.retiring for r in model.replicas)
        ]
        return min(due, default=None)

    @property
    def in_flight(self) -> int:
        """Requests admitted and not yet complete, failed or cancelled."""
        return len(self._sequences)

    def waiting(self, model: str) -> int:
        """Requests in the model's queue."""
        return len(self._models[model].queue)

    def running(self, model: str) -> int:
        """Requests on the model's replicas."""
        return sum(r.running for r in self._models[model].replicas)

    def ready(self) -> bool:
        """Every model that has replicas has one that is up, and new requests are taken."""
        served = [model.replicas for model in self._models.values() if model.replicas]
        return not self._draining and all(any(r.up and not r.retiring for r in replicas) for replicas in served)

    def kv_free(self, replica_id: str) -> int | None:
        """Tokens of KV cache that are not reserved where this replica is; None where there is no limit."""
        replica = self._replicas[replica_id]
        return None if replica.spec.kv_tokens_max is None else replica.kv_free()

    # --- events ---------------------------------------------------------------------------------------------------

    def _arrive(self, event: Arrive, actions: list[Action]) -> ModelState | None:
        model = self._models[event.model]
        sequence = Sequence(event.request_id, model, event.prompt_tokens, event.output_tokens, self._now_s)
        refusal = admission.admit(model, sequence, draining=self._draining)
        if refusal is not None:
            actions.append(refusal)
            return None
        self._sequences[event.request_id] = sequence
        model.queue.append(sequence)
        return model

    def _step_done(self, event: StepDone, actions: list[Action]) -> ModelState | None:
        replica = self._replicas.get(event.replica_id)
        step = replica.step if replica else None
        if replica is None or step is None or step.step_id != event.step_id:
            return None  # a step of a replica that has gone down meanwhile
        model, replica.step = self._model_of[event.replica_id], None
        model.answered, model.answered_s = step.load.samples, self._now_s
        ran = replica.decoding
        if len(step.decodes) < len(ran):  # one group of several that take turns
            ran = [s for s in ran if s.request_id in step.decodes]
        for s in ran:
            s.emitted += 1
        replica.context_tokens += len(ran)
        if replica.batch_limit < model.batching.max_batch_size:
            failures.gone_well(replica)
        if step.prefills:
            self._prefilled(replica, step)
        self._drop_cancelled(replica)
        for request_id, reason in event.failed:
            unanswered = self._sequences.get(request_id)
            if unanswered is not None:
                self._fail([unanswered], reason, actions)
        ended = event.ended
        finished = [s for s in replica.decoding if s.emitted >= s.output_tokens or (ended and s.request_id in ended)]
        for s in finished:
            self._forget(s)
            model.completions.append(self._now_s)
            actions.append(Complete(s.request_id))
        return model

    def _prefilled(self, replica: ReplicaState, step: RunStep) -> None:
        for prefill in step.prefills:
            s = self._sequences[prefill.request_id]
            s.prefilled += prefill.tokens
            if prefill.last:
                s.emitted = 1
                replica.prefilling.remove(s)
                replica.decoding.append(s)
                replica.context_tokens += s.prompt_tokens + 1

    def _step_failed(self, event: StepFailed, actions: list[Action]) -> ModelState | None:
        replica = self._replicas.get(event.replica_id)
        step = replica.step if replica else None
        if replica is None or step is None or step.step_id != event.step_id:
            return None
        replica.step = None
        self._drop_cancelled(replica)
        members = (*step.decodes, *(p.request_id for p in step.prefills))
        left = [s for i in members if (s := self._sequences.get(i))]
        if event.reason == OUT_OF_MEMORY:
            failures.lower_limit(replica, len(members))
        if len(members) == 1:
            self._fail(left, event.reason, actions)
        else:
            failures.split(replica, left)
        return self._model_of[event.replica_id]

    def _cancel(self, event: Cancel, actions: list[Action]) -> ModelState | None:
        s = self._sequences.get(event.request_id)
        if s is None:
            return None
        s.cancelled = True
        replica = s.replica
        if replica is None:
            s.model.queue.remove(s)
            del self._sequences[s.request_id]
        elif replica.step is None:
            self._forget(s)
        else:  # the step that is running still names it: its place is free when that step is over
            replica.cancelled += 1
        return s.model

    def _replica_up(self, event: ReplicaUp, actions: list[Action]) -> ModelState | None:
        replica = self._replicas[event.replica_id]
        replica.up, replica.returning = True, False
        return self._model_of[event.replica_id]

    def _replica_down(self, event: ReplicaDown, actions: list[Action]) -> ModelState | None:
        model, replica = self._model_of[event.replica_id], self._replicas[event.replica_id]
        running, replica.step = replica.step, None
        replica.up, replica.returning = False, event.returns
        self._drop_cancelled(replica)
        replica.turns.clear()
        suspects = {p.request_id for p in running.prefills} if running else ()
        for s in sorted(replica.sequences(), key=lambda s: s.request_id, reverse=True):
            s.losses += s.request_id in suspects
            if failures.may_try_elsewhere(model, s):
                self._leave(replica, s)
                s.replica, s.prefilled = None, 0
                model.queue.appendleft(s)
            else:
                self._fail([s], "replica_lost", actions)
        self._fail_homeless(model, actions)
        return model

    def _version_added(self, event: VersionAdded, actions: list[Action]) -> ModelState | None:
        first, model = self._places[event.place], self._model_of[event.place]
        spec = replace(first.spec, id=event.replica_id)
        state = ReplicaState(spec, first.order, model.batching.max_batch_size, first.place)
        state.returning = event.returns
        self._replicas[event.replica_id] = state
        self._model_of[event.replica_id] = model
        model.replicas.append(state)
        model.replicas.sort(key=lambda r: r.order)
        return None

    def _swap(self, event: Swap, actions: list[Action]) -> ModelState | None:
        model = self._models[event.model]
        for replica_id in event.new:
            taking = self._replicas[replica_id]
            taking.up, taking.returning, taking.retiring, taking.unloaded = True, False, False, False
        for replica_id in event.old:
            self._replicas[replica_id].retiring = True
            model.retiring += 1
        return model

    def _version_dropped(self, event: VersionDropped, actions: list[Action]) -> ModelState | None:
        """Its model's place in the deployment stays known: another version may be loaded there."""
        model, replica = self._model_of[event.replica_id], self._replicas.pop(event.replica_id)
        model.replicas.remove(replica)
        replica.place.remove(replica)
        self._fail_homeless(model, actions)
        return model

    def _unload(self, model: ModelState, actions: list[Action]) -> None:
        for replica in model.replicas:
            if replica.retiring and not replica.unloaded and replica.step is None and not replica.running:
                replica.unloaded = True
                model.retiring -= 1
                actions.append(Unload(replica.spec.id))

    def _fail_homeless(self, model: ModelState, actions: list[Action]) -> None:
        """What fits no replica that is left would wait for ever, and block those behind it."""
        homeless = [s for s in model.queue if not admission.fits_somewhere(model, s)]
        for s in homeless:
            model.queue.remove(s)
        self._fail(homeless, "no_replica", actions)

    def _drain(self, event: Drain, actions: list[Action]) -> ModelState | None:
        self._draining = True
        return None

    # --- between events -------------------------------------------------------------------------------------------

    def _start_steps(self, model: ModelState, actions: list[Action]) -> None:
        """Starts whatever can start: afterwards no idle replica has work that is due."""
        if model.decoder:
            self._join(model)
            for replica in model.replicas:
                if replica.idle and replica.running:
                    group = failures.next_turn(replica, self._sequences)
                    self._start(replica, batching.iteration(model, replica, self._steps + 1, group), actions)
            return
        for replica in model.replicas:
            if replica.turns and replica.idle and (group := failures.next_turn(replica, self._sequences)):
                self._start(replica, batching.single_step(model, replica, self._steps + 1, group), actions)
        while model.queue and self._now_s >= batching.batch_due_s(model):
            chosen = dispatch.least_loaded(model, model.queue[0])
            if chosen is None or not chosen.idle:
                return
            chosen.take(model.queue.popleft())
            while model.queue and chosen.running < chosen.batch_limit and not _suspected(model, chosen):
                chosen.take(model.queue.popleft())
            self._start(chosen, batching.single_step(model, chosen, self._steps + 1, chosen.prefilling), actions)

    def _join(self, model: ModelState) -> None:
        while model.queue:
            replica = dispatch.least_loaded(model, model.queue[0])
            if replica is None or not replica.idle:
                return
            replica.take(model.queue.popleft())

    def _start(self, replica: ReplicaState, step: RunStep, actions: list[Action]) -> None:
        self._steps = step.step_id
        replica.step = step
        actions.append(step)

    def _fail(self, sequences: list[Sequence], reason: str, actions: list[Action]) -> None:
        for s in sequences:
            self._forget(s)
            actions.append(Fail(s.request_id, reason))

    def _drop_cancelled(self, replica: ReplicaState) -> None:
        if replica.cancelled:
            for s in [s for s in replica.sequences() if s.cancelled]:
                self._forget(s)
            replica.cancelled = 0

    def _forget(self, s: Sequence) -> None:
        """The sequence is over: its place in the batch and its KV cache are free."""
        del self._sequences[s.request_id]
        if s.replica is not None:
            self._leave(s.replica, s)

    def _leave(self, replica: ReplicaState, s: Sequence) -> None:
        if s.emitted:
            replica.decoding.remove(s)
            replica.context_tokens -= s.prompt_tokens + s.emitted
        else:
            replica.prefilling.remove(s)
        replica.kv_reserved -= s.kv_tokens

    def check_invariants(self) -> None:
        """Raises AssertionError when the state contradicts itself. For tests and for a server's debug mode."""
        seen: list[Sequence] = []
        for model in self._models.values():
            assert len(model.queue) <= model.batching.max_queue_size, "queues are bounded"
            assert all(s.replica is None and s.emitted == 0 for s in model.queue), "what waits has not started"
            seen += model.queue
            for replica in model.replicas:
                mine = list(replica.sequences())
                seen += mine
                assert replica.running <= model.batching.max_batch_size, "batches are bounded"
                assert replica.kv_reserved == sum(s.kv_tokens for s in mine), "KV cache is accounted for"
                limit = replica.spec.kv_tokens_max
                assert limit is None or replica.kv_reserved <= limit, "KV cache fits"
                context = sum(s.prompt_tokens + s.emitted for s in replica.decoding)
                assert replica.context_tokens == context, "contexts are accounted for"
                assert replica.up or not mine, "nothing runs on a replica that is down"
                assert (replica.step is not None) or not mine, "no sequence sits on an idle replica"
            if model.queue and model.decoder:
                chosen = dispatch.least_loaded(model, model.queue[0])
                assert chosen is None or not chosen.idle, "no idle replica leaves work waiting"
        assert {s.request_id for s in seen} == set(self._sequences), "every sequence is in one place"
        assert len(seen) == len(self._sequences), "and in one only"


def _suspected(model: ModelState, replica: ReplicaState) -> bool:
    """Whether the next of the queue, or who is on the replica already, has to run alone."""
    return bool(model.queue[0].losses or replica.prefilling[0].losses)
