"""Every decision, behind one door: `handle(event, *, now_s) -> list[Action]`.

Two rules keep it simple. It looks at nothing but its arguments: time comes in, so a live server and a simulation
that feed it the same events get the same actions. It does nothing: what must happen comes back as data, in the order
in which it should be done, and the driver reports what came of it as new events.

A driver calls `handle` for every event, and once more with `Wake` when `next_timer_s` comes.

A request's way: `admission` lets it in, `dispatch` chooses the replica for which it waits in a `line`, `batching` makes
steps of those that are there. `failures` says what a failure costs whom, `health` whom a failing replica is kept from,
`scaling` how many replicas there are.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from gpuplan.policy import admission, batching, dispatch, failures, health, paging
from gpuplan.policy.admission import Gate, refusal
from gpuplan.policy.breaker import Breaker
from gpuplan.policy.concurrency import ConcurrencyLimit
from gpuplan.policy.cost import pace_of
from gpuplan.policy.dispatch import Dispatcher
from gpuplan.policy.line import Line
from gpuplan.policy.retries import RetryBudget
from gpuplan.policy.scaling import Scaling
from gpuplan.policy.state import ModelState, Phase, ReplicaState, Sequence
from gpuplan.policy.vocabulary import (
    OUT_OF_MEMORY,
    Action,
    Arrive,
    Assign,
    BreakerState,
    Cancel,
    Complete,
    Cut,
    Drain,
    Event,
    Fail,
    Knock,
    Reject,
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
from gpuplan.scenario.deployment import Deployment, Replica, role
from gpuplan.scenario.faults import NEVER

RETURN_S = 1.0
"""How long a replica that was lost is first taken to be away: a guess, doubled by the time that it is late."""


class ServingCore:
    """The decisions for one deployment. Not thread-safe: one driver, one event at a time, time never backwards.

    A driver that can run a step several times in a row says how often at most (`steps_max`); what such steps tell of
    their replica's speed is heard when the last one is over. A `dispatcher` places requests otherwise than `dispatch`
    does, for comparisons.
    """

    def __init__(self, deployment: Deployment, *, dispatcher: Dispatcher | None = None, steps_max: int = 1) -> None:
        self._deployment = deployment
        self._dispatcher = dispatcher
        self._steps_max = steps_max
        self._models = {
            name: ModelState(
                name,
                role(source) == "decoder",
                deployment.batching[name],
                [],
                Breaker(name, deployment.breakers),
            )
            for name, source in deployment.models.items()
        }
        self._replicas: dict[str, ReplicaState] = {}
        self._model_of: dict[str, ModelState] = {}
        for order, spec in enumerate(deployment.replicas):
            self._add(spec, order, [], "serving")
        for order, spec in enumerate(deployment.standby, len(deployment.replicas)):
            self._add(spec, order, [], "standby")
        self._places = dict(self._replicas)
        self._gate = Gate(deployment)
        self._retries = RetryBudget()
        self._scaling = Scaling(deployment, self._models)
        self._sequences: dict[int, Sequence] = {}
        self._deadlines: list[tuple[float, int]] = []  # a heap; of as many, at most, that have ended meanwhile
        self._steps = 0
        self._draining = False
        self._now_s = float("-inf")
        self._doors: dict[type, Callable[[Any, list[Action]], ModelState | None]] = {  # for what comes seldom
            Knock: self._knock,
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
            self._wake(actions)
            for model in self._models.values():
                self._start_steps(model, actions)
        else:
            kind = type(event)
            if kind is StepDone:
                touched = self._step_done(event, actions)  # type: ignore[arg-type]
            elif kind is Arrive:
                touched = self._arrive(event, actions)  # type: ignore[arg-type]
            else:
                touched = self._doors[kind](event, actions)
            if touched is not None:
                self._start_steps(touched, actions)
                if touched.retiring:
                    self._unload(touched, actions)
        return actions

    def next_timer_s(self) -> float | None:
        """When to call `handle(Wake())` if nothing happens before: an idle replica's batch falls due, a deadline
        passes, a breaker is to be tried, or it is time to look whether replicas should come or go."""
        while self._deadlines and not self._awaits_deadline(self._deadlines[0][0], self._deadlines[0][1]):
            heapq.heappop(self._deadlines)
        first_s = self._deadlines[0][0] if self._deadlines else NEVER
        if self._scaling.next_look_s is not None and not self._draining:
            first_s = min(first_s, self._scaling.next_look_s)
        for model in self._models.values():
            if (due_s := model.breaker.due_s()) is not None:
                first_s = min(first_s, due_s)
            waits = model.waiting > 0 and not model.decoder
            for replica in model.replicas:
                if (due_s := replica.breaker.due_s()) is not None:
                    first_s = min(first_s, due_s)
                head = replica.line.head() if waits and replica.idle else None
                if head is not None and replica.has_room_for(head):
                    first_s = min(first_s, batching.batch_due_s(model, replica, head))
        return first_s if first_s < NEVER else None

    @property
    def at_the_door(self) -> int:
        """Requests of which only the head has been read."""
        return len(self._gate)

    @property
    def in_flight(self) -> int:
        """Requests admitted and not yet complete, failed or cancelled."""
        return len(self._sequences)

    def waiting(self, model: str) -> int:
        """Requests that wait for one of the model's replicas."""
        return self._models[model].waiting

    def running(self, model: str) -> int:
        """Requests on the model's replicas."""
        return sum(r.running for r in self._models[model].replicas)

    def replicas(self, model: str) -> dict[str, int]:
        """How many of its replicas are `ready`, `starting` (or being started again), `stopping` (they finish what they
        run) and on `standby`."""
        counts = {"ready": 0, "starting": 0, "stopping": 0, "standby": 0}
        for replica in self._models[model].replicas:
            counts[replica.condition] += 1
        return counts

    def kv_usage(self, model: str) -> float | None:
        """The share of its ready replicas' KV cache that is reserved; None for a model that has no limit."""
        replicas = [r for r in self._models[model].replicas if r.kv_tokens_max is not None]
        tokens_max = sum(r.kv_tokens_max or 0 for r in replicas if r.up)
        if not tokens_max:
            return 0.0 if replicas else None
        return sum(r.kv_reserved for r in replicas if r.up) / tokens_max

    def breakers(self) -> Iterator[tuple[str, BreakerState]]:
        """Every model's circuit breaker, and every replica's that there is now, by name."""
        for model in self._models.values():
            yield model.name, model.breaker.state
            for replica in model.replicas:
                yield replica.replica_id, replica.breaker.state

    def full(self, model: str) -> bool:
        """Nobody more would be let in: good to know before a prompt is counted. (An arrival is judged again.)"""
        state = self._models[model]
        return state.waiting >= state.max_queue_size and not any(True for _ in _free(state))

    def ready(self) -> bool:
        """Every model that has replicas has one that is up, or one that will be started for whoever asks for it, and
        new requests are taken."""
        served = [model for model in self._models.values() if model.replicas]
        return not self._draining and all(
            any(r.up and not r.retiring for r in model.replicas) or self._scaling.may_be_none(model.name)
            for model in served
        )

    def kv_free(self, replica_id: str) -> int | None:
        """Tokens of KV cache that are not reserved where this replica is; None where there is no limit."""
        replica = self._replicas[replica_id]
        return None if replica.kv_tokens_max is None else replica.kv_free()

    # --- requests -------------------------------------------------------------------------------------------------

    def _knock(self, event: Knock, actions: list[Action]) -> ModelState | None:
        if self._draining:
            actions.append(refusal(event.request_id, "draining", 0.0))
        elif (refused := self._gate.knock(event, self._now_s)) is not None:
            actions.append(refused)
        return None

    def _arrive(self, event: Arrive, actions: list[Action]) -> ModelState | None:
        model = self._models[event.model]
        if self._draining:
            self._gate.leave(event.request_id)
            actions.append(refusal(event.request_id, "draining", 0.0))
            return None
        traffic = self._gate.come_in(event, self._now_s)
        if isinstance(traffic, Reject):
            actions.append(traffic)
            return None
        patience_s, timeout_s = traffic.deadline, event.timeout_s
        if timeout_s is not None and (patience_s is None or timeout_s < patience_s):
            patience_s = timeout_s
        s = Sequence(
            event.request_id,
            model,
            traffic,
            event.prompt_tokens,
            event.output_tokens,
            self._now_s,
            deadline_s=None if patience_s is None else self._now_s + patience_s,
            spans=event.spans,
        )
        self._scaling.asked_for(s, self._now_s, actions)
        home = self._home(model, s)
        if isinstance(home, Reject):
            actions.append(home)
            return None
        expected_s = dispatch.expected(home, s, now_s=self._now_s).finish_s
        if patience_s is not None and home.pace.known and admission.MARGIN * expected_s > patience_s:
            actions.append(refusal(s.request_id, "deadline", admission.MARGIN * expected_s - patience_s))
            return None
        self._gate.charge(s, event.key, self._now_s)
        self._retries.deposit()
        if s.deadline_s is not None:
            heapq.heappush(self._deadlines, (s.deadline_s, s.request_id))
        if model.breaker.state == "half_open":
            model.breaker.probe_sent()
            s.probe = True
        self._sequences[event.request_id] = s
        self._assign(home, s, expected_s, actions)
        self._scaling.arrived(s)
        return model

    def _home(self, model: ModelState, s: Sequence) -> ReplicaState | Reject:
        """The replica that the new request is to wait for, or why none."""
        refused = admission.admit(model, s)
        if refused is not None:
            return refused
        if not model.breaker.allows():
            return health.circuit_open(model, s, self._now_s)
        if model.waiting >= model.max_queue_size:
            # Never while a replica has nothing to do and could start it at once.
            free = next((r for r in _free(model) if r.has_room_for(s)), None)
            return free or refusal(s.request_id, "queue_full", model.drain.wait_s(model.waiting))
        return self._chosen(model, s) or health.circuit_open(model, s, self._now_s)

    def _chosen(self, model: ModelState, s: Sequence) -> ReplicaState | None:
        if self._dispatcher is not None:
            return self._dispatcher.chosen(model, s, now_s=self._now_s)
        return dispatch.chosen(model, s, self._now_s)

    def _assign(
        self, replica: ReplicaState, s: Sequence, expected_s: float, actions: list[Action], taken_from: str = ""
    ) -> None:
        ahead = replica.line.ahead_of(s.priority).requests
        s.work_s = replica.pace.work_s(s.prompt_tokens, s.expected_tokens, max(replica.limit.limit / 2, 1.0))
        replica.wait(s)
        actions.append(Assign(s.request_id, replica.replica_id, ahead, expected_s, taken_from))

    def _move(self, replica: ReplicaState, waiting: Iterable[Sequence], actions: list[Action]) -> None:
        """Those who wait for this replica wait for another that welcomes them, or stay if this one comes back."""
        for s in sorted(waiting, key=lambda s: s.request_id):
            if replica.available and not any(r.welcomes and r.could_hold(s) for r in s.model.replicas):
                continue
            replica.wait_no_longer(s)
            self._place_again(s, replica, actions)

    def _place_again(self, s: Sequence, came_from: ReplicaState, actions: list[Action]) -> None:
        home = self._chosen(s.model, s)
        if home is None:  # nobody welcomes it: it waits for one that will be tried again
            home = next((r for r in s.model.replicas if r.available and r.could_hold(s)), None)
        if home is None:
            self._fail([s], "no_replica", actions)
            return
        taken_from = came_from.replica_id if came_from is not home else ""
        self._assign(home, s, dispatch.expected(home, s, now_s=self._now_s).finish_s, actions, taken_from)

    def _cancel(self, event: Cancel, actions: list[Action]) -> ModelState | None:
        s = self._sequences.get(event.request_id)
        if s is None:
            self._gate.leave(event.request_id)
            return None
        if s.cancelled:
            return None
        return self._abandon(s)

    def _abandon(self, s: Sequence) -> ModelState:
        """Nobody waits for it any more."""
        s.cancelled = True
        replica = s.replica
        if replica is None or replica.step is None:
            self._forget(s)
        else:  # the step that is running still names it: its place is free when that step is over
            replica.cancelled += 1
        return s.model

    # --- steps ----------------------------------------------------------------------------------------------------

    def _step_done(self, event: StepDone, actions: list[Action]) -> ModelState | None:
        ended_step = self._step_over(event)
        if ended_step is None:
            return None
        replica, step = ended_step
        model = self._model_of[event.replica_id]
        replica.answered, replica.answered_s = step.load.samples, self._now_s
        ran, steps = replica.decoding, event.steps
        if len(step.decodes) < len(ran):  # one group of several that take turns
            ran = [s for s in ran if s.request_id in step.decodes]
        for s in ran:
            s.emitted += steps
        replica.context_tokens += len(ran) * steps
        if step.prefills:
            self._prefilled(replica, step)
        health.step_done(model, replica, step, steps, self._now_s, actions)
        self._drop_cancelled(replica)
        for request_id, reason in event.failed:
            unanswered = self._sequences.get(request_id)
            if unanswered is not None:
                self._fail([unanswered], reason, actions)
        ended = event.ended
        finished = [s for s in replica.decoding if s.emitted >= s.output_tokens or (ended and s.request_id in ended)]
        for s in finished:
            self._forget(s)
            model.drain.completed(self._now_s)
            s.traffic.drain.completed(self._now_s)
            model.outputs_of(s.traffic).ended(s.emitted, s.output_tokens)
            actions.append(Complete(s.request_id))
            health.record(model, replica, True, self._now_s, actions, probe=s.probe)
        return model

    def _prefilled(self, replica: ReplicaState, step: RunStep) -> None:
        for prefill in step.prefills:
            s = self._sequences[prefill.request_id]
            s.prefilled += prefill.tokens
            replica.prompts_left -= prefill.tokens
            if prefill.last:
                s.emitted = 1
                replica.decode(s)
                replica.context_tokens += s.prompt_tokens + 1

    def _step_failed(self, event: StepFailed, actions: list[Action]) -> ModelState | None:
        ended_step = self._step_over(event)
        if ended_step is None:
            return None
        replica, step = ended_step
        self._drop_cancelled(replica)
        members = (*step.decodes, *(p.request_id for p in step.prefills))
        left = [s for i in members if (s := self._sequences.get(i))]
        if event.reason == OUT_OF_MEMORY:
            replica.limit.out_of_memory(len(members))
        if len(members) == 1:
            self._fail(left, event.reason, actions)
        else:
            failures.split(replica, left)
        return self._model_of[event.replica_id]

    def _step_over(self, event: StepDone | StepFailed) -> tuple[ReplicaState, RunStep] | None:
        """The replica, idle again, and the step that it ran; None for one of a replica that has gone down meanwhile."""
        replica = self._replicas.get(event.replica_id)
        if replica is None or replica.step is None or replica.step.step_id != event.step_id:
            return None
        step, replica.step = replica.step, None
        return replica, step

    # --- replicas -------------------------------------------------------------------------------------------------

    def _replica_up(self, event: ReplicaUp, actions: list[Action]) -> ModelState | None:
        replica = self._replicas[event.replica_id]
        if replica.phase == "standby":
            return None  # nobody has asked for it
        replica.up, replica.returning = True, False
        if replica.phase == "starting":
            replica.phase = "serving"
        return self._model_of[event.replica_id]

    def _replica_down(self, event: ReplicaDown, actions: list[Action]) -> ModelState | None:
        model, replica = self._model_of[event.replica_id], self._replicas[event.replica_id]
        if replica.phase == "standby":
            return None
        running, replica.step = replica.step, None
        was_up, replica.up, replica.returning = replica.up, False, event.returns
        replica.ready_s = self._now_s + RETURN_S
        if was_up and not replica.retiring:
            health.record(model, replica, False, self._now_s, actions)
        replica.breaker.probe_lost()  # of one that was to go anyway nobody is told what came of it
        self._scaling.gone(replica)
        self._drop_cancelled(replica)
        replica.turns.clear()
        suspects = {p.request_id for p in running.prefills} if running else ()
        waited = list(replica.line)
        for s in sorted(replica.sequences(), key=lambda s: s.request_id):
            s.losses += s.request_id in suspects
            started = s.prefilled > 0 or s.request_id in suspects
            if failures.may_try_elsewhere(model, s) and (not started or self._retries.withdraw()):
                replica.let_go(s)
                s.replica, s.prefilled = None, 0
                self._place_again(s, replica, actions)
            else:
                self._fail([s], "replica_lost", actions)
        if replica.blocks is not None:
            replica.blocks.forget()
        self._move(replica, waited, actions)
        return model

    def _version_added(self, event: VersionAdded, actions: list[Action]) -> ModelState | None:
        first = self._places[event.place]
        state = self._add(replace(first.spec, id=event.replica_id), first.order, first.place, "version")
        state.returning, state.ready_s = event.returns, self._now_s + RETURN_S
        self._model_of[event.place].replicas.sort(key=lambda r: r.order)
        return None

    def _swap(self, event: Swap, actions: list[Action]) -> ModelState | None:
        model = self._models[event.model]
        for replica_id in event.new:
            taking = self._replicas[replica_id]
            taking.up, taking.returning, taking.retiring, taking.unloaded = True, False, False, False
            taking.phase = "serving"
        for replica_id in event.old:
            leaving = self._replicas[replica_id]
            model.retiring += not leaving.retiring
            leaving.retiring, leaving.phase = True, "serving"
        for replica_id in event.old:
            leaving = self._replicas[replica_id]
            self._move(leaving, leaving.line, actions)
        return model

    def _version_dropped(self, event: VersionDropped, actions: list[Action]) -> ModelState | None:
        """Its model's place in the deployment stays known: another version may be loaded there."""
        model, replica = self._model_of[event.replica_id], self._replicas.pop(event.replica_id)
        model.replicas.remove(replica)
        replica.place.remove(replica)
        self._move(replica, replica.line, actions)
        return model

    def _unload(self, model: ModelState, actions: list[Action]) -> None:
        for replica in model.replicas:
            if replica.retiring and not replica.unloaded and replica.step is None and not replica.running:
                replica.unloaded = True
                model.retiring -= 1
                actions.append(self._scaling.stopped(replica) or Unload(replica.replica_id))

    def _add(self, spec: Replica, order: int, place: list[ReplicaState], phase: Phase) -> ReplicaState:
        model, rule = self._models[spec.model], self._deployment.batching[spec.model]
        state = ReplicaState(
            spec,
            order,
            place=place,
            pace=pace_of(self._deployment, spec),
            line=Line(self._deployment.admission.ageing),
            limit=ConcurrencyLimit(rule.max_batch_size, target_step_s=rule.step_time_target),
            breaker=Breaker(spec.id, self._deployment.breakers),
            phase=phase,
            blocks=paging.blocks_of(self._deployment, spec),
            schedules_ahead=model.decoder and self._deployment.engine.schedules_ahead,
        )
        self._replicas[spec.id], self._model_of[spec.id] = state, model
        model.replicas.append(state)
        return state

    def _drain(self, event: Drain, actions: list[Action]) -> ModelState | None:
        self._draining = True
        return None

    # --- time -----------------------------------------------------------------------------------------------------

    def _wake(self, actions: list[Action]) -> None:
        while self._deadlines and self._deadlines[0][0] <= self._now_s:
            deadline_s, request_id = heapq.heappop(self._deadlines)
            if self._awaits_deadline(deadline_s, request_id):
                actions.append(Fail(request_id, "timeout"))
                self._abandon(self._sequences[request_id])
        for model in self._models.values():
            health.wake(model, self._now_s, actions)
        if not self._draining:
            for replica in self._scaling.look(self._now_s, actions):
                self._move(replica, replica.line, actions)
        for model in self._models.values():
            if model.retiring:
                self._unload(model, actions)

    def _awaits_deadline(self, deadline_s: float, request_id: int) -> bool:
        s = self._sequences.get(request_id)
        return s is not None and s.deadline_s == deadline_s and not s.cancelled

    # --- between events -------------------------------------------------------------------------------------------

    def _start_steps(self, model: ModelState, actions: list[Action]) -> None:
        """Starts whatever can start: afterwards no idle replica has work that is due."""
        for replica in model.replicas:
            if replica.breaker.state == "open" and len(replica.line) and any(r.welcomes for r in model.replicas):
                self._move(replica, replica.line, actions)
        for replica in model.replicas:
            if replica.step is None and replica.up:
                if model.decoder:
                    self._start_iteration(model, replica, actions)
                else:
                    self._start_batch(model, replica, actions)
            elif replica.step is not None and replica.step.steps > 1 and not replica.cut:
                head = replica.line.head()
                if replica.cancelled or (head is not None and replica.has_room_for(head)):
                    replica.cut = True
                    actions.append(Cut(replica.replica_id, replica.step.step_id))

    def _start_iteration(self, model: ModelState, replica: ReplicaState, actions: list[Action]) -> None:
        if replica.blocks is not None:
            paging.make_room(replica)
        while (head := replica.line.head()) is not None and replica.has_room_for(head):
            replica.take(head)
        if model.waiting and head is None:
            self._steal(model, replica, actions)
        if replica.running:
            group = failures.next_turn(replica, self._sequences)
            in_a_row = self._steps_max if replica.blocks is None and not replica.schedules_ahead else 1
            step = batching.iteration(model, replica, self._steps + 1, group, in_a_row)
            self._start(replica, step, actions)

    def _start_batch(self, model: ModelState, replica: ReplicaState, actions: list[Action]) -> None:
        if replica.turns and (group := failures.next_turn(replica, self._sequences)):
            self._start(replica, batching.single_step(model, replica, self._steps + 1, group), actions)
            return
        head = replica.line.head()
        if head is None:
            if model.waiting:
                self._steal(model, replica, actions)
        elif self._now_s >= batching.batch_due_s(model, replica, head):
            while head is not None and replica.has_room_for(head) and not _suspected(replica, head):
                replica.take(head)
                head = replica.line.head()
        if replica.prefilling:
            step = batching.single_step(model, replica, self._steps + 1, replica.prefilling)
            self._start(replica, step, actions)

    def _steal(self, model: ModelState, replica: ReplicaState, actions: list[Action]) -> None:
        """Takes over what would be answered later where it waits, as long as there is room."""
        if self._dispatcher is not None and not self._dispatcher.steals:
            return
        while (s := dispatch.to_steal(model, replica, now_s=self._now_s)) is not None:
            if not model.decoder and _suspected(replica, s):
                return
            home = s.home
            assert home is not None, "what waits has a home"
            home.wait_no_longer(s)
            self._assign(
                replica, s, dispatch.expected(replica, s, now_s=self._now_s).finish_s, actions, home.replica_id
            )
            replica.take(s)

    def _start(self, replica: ReplicaState, step: RunStep, actions: list[Action]) -> None:
        self._steps = step.step_id
        replica.step = step
        replica.step_began_s, replica.step_s, replica.cut = self._now_s, replica.pace.step_s(step.load), False
        actions.append(step)

    def _fail(self, sequences: Iterable[Sequence], reason: str, actions: list[Action]) -> None:
        for s in sequences:
            replica = s.replica
            self._forget(s)
            actions.append(Fail(s.request_id, reason))
            if replica is None or reason in failures.NOT_THE_MODEL:
                health.probe_lost(s)
            else:
                health.record(s.model, replica, False, self._now_s, actions, probe=s.probe)

    def _drop_cancelled(self, replica: ReplicaState) -> None:
        if replica.cancelled:
            for s in [s for s in replica.sequences() if s.cancelled]:
                self._forget(s)
            replica.cancelled = 0

    def _forget(self, s: Sequence) -> None:
        """The sequence is over: its place is free, and what it did not use of its class's tokens is given back."""
        del self._sequences[s.request_id]
        if len(self._deadlines) > 2 * len(self._sequences) + 16:
            self._deadlines = [due for due in self._deadlines if self._awaits_deadline(*due)]
            heapq.heapify(self._deadlines)
        if s.replica is not None:
            s.replica.let_go(s)
        elif s.home is not None:
            s.home.wait_no_longer(s)
        for limiter in s.limiters:
            limiter.give_back(s.kv_tokens - s.prefilled - min(s.emitted, s.output_tokens))  # one answer is no token
        self._scaling.left(s)
        if s.cancelled:
            health.probe_lost(s)

    def check_invariants(self) -> None:
        """Raises AssertionError when the state contradicts itself. For tests and for a server's debug mode."""
        seen: list[Sequence] = []
        for model in self._models.values():
            line = [s for r in model.replicas for s in r.line]
            idle = sum(1 for r in _free(model))
            leaving = sum(r.retiring and not r.unloaded for r in model.replicas)
            assert leaving == model.retiring, "who is to go is counted"
            assert len(line) == model.waiting == sum(len(r.line) for r in model.replicas), "who waits is counted"
            assert model.waiting <= model.max_queue_size + idle, "queues are bounded"
            assert all(s.replica is None and s.emitted == 0 for s in line), "what waits has not started"
            seen += line
            for replica in model.replicas:
                mine = list(replica.sequences())
                seen += mine
                assert all(s.home is replica and replica.could_hold(s) for s in replica.line), (
                    "it waits where it can run"
                )
                assert replica.available or not len(replica.line), "nobody waits for a replica that does not come"
                assert replica.running <= model.batching.max_batch_size, "batches are bounded"
                if replica.blocks is None:
                    assert replica.kv_reserved == sum(s.kv_tokens for s in mine), "KV cache is accounted for"
                else:
                    replica.blocks.check()
                    assert replica.running or not replica.gave_way, "with all blocks free somebody goes on"
                    held = replica.blocks.held * replica.blocks.block_size
                    assert replica.kv_reserved == held, "blocks are accounted for"
                limit = replica.kv_tokens_max
                assert limit is None or replica.kv_reserved <= limit, "KV cache fits"
                context = sum(s.prompt_tokens + s.emitted for s in replica.decoding)
                assert replica.context_tokens == context, "contexts are accounted for"
                left = sum(s.prompt_tokens - s.prefilled for s in replica.prefilling)
                assert replica.prompts_left == left, "prompts are accounted for"
                assert replica.up or not mine, "nothing runs on a replica that is down"
                assert (replica.step is not None) or not mine, "no sequence sits on an idle replica"
                head = replica.line.head() if model.decoder and replica.idle else None
                assert head is None or not replica.has_room_for(head), "no idle replica leaves its own line waiting"
        assert {s.request_id for s in seen} == set(self._sequences), "every sequence is in one place"
        assert len(seen) == len(self._sequences), "and in one only"


def _free(model: ModelState) -> Iterator[ReplicaState]:
    """Replicas that would start at once what comes to them."""
    if model.decoder or not model.batching.max_queue_delay:
        yield from (r for r in model.replicas if r.idle and not len(r.line) and not r.running)


def _suspected(replica: ReplicaState, s: Sequence) -> bool:
    """Whether it, or who is on the replica already, has to run alone."""
    return bool(replica.prefilling and (s.losses or replica.prefilling[0].losses))
