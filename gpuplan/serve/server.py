"""The first driver of the core: asyncio and the real clock.

`Server` feeds events to one `ServingCore`, does what its actions say, and hands every decision to its observers
(recorder, metrics, emulated cards). Everything happens on one event loop; engines run steps wherever they like and
come back to it. A request is a `Ticket`, from which its outputs are read.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from gpuplan.policy.core import ServingCore
from gpuplan.policy.vocabulary import (
    OUT_OF_MEMORY,
    Action,
    Arrive,
    Cancel,
    Complete,
    Drain,
    Event,
    Fail,
    Knock,
    Reject,
    RunStep,
    StartReplica,
    StepDone,
    StepFailed,
    StopReplica,
    Unload,
    Wake,
)
from gpuplan.scenario.deployment import Deployment, Replica, place_of
from gpuplan.serve.engines import Engine, EngineLost, OutOfMemory, Output, Prompt
from gpuplan.serve.fleet import Fleet


class Observer(Protocol):
    """Sees every decision after it was made."""

    def decided(self, event: Event, actions: list[Action], *, now_s: float) -> None: ...


class RequestRefused(Exception):
    """The core would not take the request."""

    def __init__(self, reason: str, retry_after_s: float) -> None:
        super().__init__(reason)
        self.reason, self.retry_after_s = reason, retry_after_s


class RequestFailed(Exception):
    """The request was taken and lost."""


class Caller:
    """Who asks: the traffic class and the name of the key, how long the answer may take (seconds), and the place that
    it has at the door."""

    __slots__ = ("key", "place", "timeout_s", "traffic_class")

    def __init__(self, traffic_class: str = "", key: str = "", timeout_s: float | None = None) -> None:
        self.traffic_class, self.key, self.timeout_s = traffic_class, key, timeout_s
        self.place: int | None = None


class Ticket:
    """One request's outputs, in order. Raises RequestRefused or RequestFailed instead of an output."""

    __slots__ = ("_items", "_reader", "prompt", "request_id")

    def __init__(self, request_id: int, prompt: Prompt) -> None:
        self.request_id, self.prompt = request_id, prompt
        self._items: deque[Output | Exception | None] = deque()
        self._reader: asyncio.Future[None] | None = None

    def put(self, item: Output | Exception | None) -> None:
        """An output, the exception that ends it, or None at its regular end."""
        self._items.append(item)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def check(self) -> None:
        """Raises what the next output would, if it is there already."""
        if self._items and isinstance(self._items[0], Exception):
            self._take()

    async def next(self) -> Output | None:
        """The next output, None at the end. One reader at a time."""
        while not self._items:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return self._take()

    def _take(self) -> Output | None:
        item = self._items.popleft()
        try:
            if isinstance(item, Exception):
                raise item
            return item
        finally:
            del item  # an exception knows the frames that it was raised in: were it known there, too, it would stay

    async def __aiter__(self) -> AsyncIterator[Output]:
        while (item := await self.next()) is not None:
            yield item


class Server:
    """A deployment that serves. `start` loads the engines, `submit` takes requests, `drain` and `close` end it."""

    def __init__(
        self, deployment: Deployment, engines: Mapping[str, Engine], observers: Sequence[Observer] = ()
    ) -> None:
        self.deployment = deployment
        self.core = ServingCore(deployment)
        self.fleet = Fleet(deployment, engines, self._feed)
        self._observers = observers
        self._tickets: dict[int, Ticket] = {}
        self._homes: dict[int, str] = {}  # requests whose engine keeps something between steps
        self._over: dict[str, list[int]] = {}  # by replica that runs a step: requests that ended meanwhile
        self._decoders = {r.id for r in deployment.every_replica() if r.role == "decoder"}
        self._steps: set[asyncio.Task[None]] = set()
        self._next_id = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due_s: float | None = None
        self._empty = asyncio.Event()
        self._empty.set()

    async def start(self) -> None:
        """Loads every engine."""
        await self.fleet.start()

    def tokenize(self, model: str, text: str) -> Prompt:
        """The prompt as the model's engine counts it."""
        return Prompt(text, self.fleet.engine_of(model).tokenize(text))

    def vocabulary_size(self, model: str) -> int | None:
        """One more than the largest token id that the model knows, where that is known."""
        return self.fleet.engine_of(model).vocabulary_size

    def knock(self, caller: Caller) -> None:
        """Asks for a place for a request of which only the head is there. Raises RequestRefused. The first `submit` of
        this caller takes the place; otherwise it has to `leave`."""
        self._next_id += 1
        for action in self._feed(Knock(self._next_id, caller.traffic_class, caller.key)):
            if isinstance(action, Reject):
                raise RequestRefused(action.reason, action.retry_after_s)
        caller.place = self._next_id

    def refuse_if_full(self, model: str, caller: Caller, client_id: str) -> None:
        """Raises RequestRefused where the core would refuse any request: no prompt is counted in vain."""
        if self.core.full(model):
            refused = self.submit(model, Prompt("", ()), output_tokens=0, client_id=client_id, caller=caller)
            refused.check()

    def leave(self, caller: Caller) -> None:
        """Nothing came of the caller's knock, or all of it has been submitted."""
        if caller.place is not None:
            self._feed(Cancel(caller.place))
            caller.place = None

    def submit(
        self, model: str, prompt: Prompt, *, output_tokens: int, client_id: str = "", caller: Caller | None = None
    ) -> Ticket:
        """Gives the request to the core; what comes of it is read from the ticket."""
        caller = caller or Caller()
        if caller.place is None:
            self._next_id += 1
            request_id = self._next_id
        else:
            request_id, caller.place = caller.place, None
        ticket = self._tickets[request_id] = Ticket(request_id, prompt)
        self._empty.clear()
        tokens = len(prompt.token_ids)
        who = (client_id, caller.traffic_class, caller.key, caller.timeout_s)
        self._feed(Arrive(request_id, model, tokens, output_tokens, *who))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """The client is gone. Does nothing when the request has ended already."""
        if ticket.request_id in self._tickets:
            self._end(ticket.request_id, None)
            self._feed(Cancel(ticket.request_id))

    async def swap(self, model: str, make: Callable[[Replica], Engine], *, beside: bool = True) -> None:
        """Puts new versions of a model into the places of those that serve it: see `Fleet.swap`."""
        await self.fleet.swap(model, make, has_room=self._has_room, beside=beside)

    def _has_room(self, replica_id: str) -> bool:
        free = self.core.kv_free(replica_id)
        return free is None or free > 0

    async def drain(self, timeout_s: float) -> bool:
        """Takes no new requests and waits for those that run; False when some still run after `timeout_s`."""
        self._feed(Drain())
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Ends what still runs and frees the engines."""
        if self._timer:
            self._timer.cancel()
        for request_id in list(self._tickets):
            self._end(request_id, RequestFailed("the server has stopped"))
        for step in self._steps:
            step.cancel()
        await asyncio.gather(*self._steps, return_exceptions=True)
        await self.fleet.close()

    # --- events in, actions out -----------------------------------------------------------------------------------

    def _feed(self, event: Event, now_s: float | None = None) -> list[Action]:
        now_s = time.monotonic() if now_s is None else now_s
        actions = self.core.handle(event, now_s=now_s)
        for observer in self._observers:
            observer.decided(event, actions, now_s=now_s)
        for action in actions:
            match action:
                case RunStep():
                    prompts = {p.request_id: self._tickets[p.request_id].prompt for p in action.prefills}
                    if place_of(action.replica_id) in self._decoders:
                        self._homes.update(dict.fromkeys(prompts, action.replica_id))
                    self._over[action.replica_id] = []
                    # Called here, so that a worker has its step before the answers to the last one are written.
                    running = self.fleet.engines[action.replica_id].run(action, prompts, asked_s=now_s)
                    task = asyncio.get_running_loop().create_task(self._finish(action, running))
                    self._steps.add(task)
                    task.add_done_callback(self._steps.discard)
                case Complete(request_id=request_id):
                    self._end(request_id, None)
                case Reject(request_id=request_id, reason=reason, retry_after_s=retry_after_s):
                    self._end(request_id, RequestRefused(reason, retry_after_s))
                case Fail(request_id=request_id, reason=reason):
                    self._end(request_id, RequestFailed(reason))
                case Unload(replica_id=replica_id):
                    self.fleet.nothing_runs_on(replica_id)
                case StartReplica(replica_id=replica_id):
                    self.fleet.start_replica(replica_id)
                case StopReplica(replica_id=replica_id):
                    self.fleet.stop_replica(replica_id)
        self._arm()
        return actions

    async def _finish(self, step: RunStep, running: Awaitable[Mapping[int, Output]]) -> None:
        engine = self.fleet.engines[step.replica_id]
        try:
            outputs = await running
            answers = [(request_id, outputs[request_id]) for request_id in step.answered()]
        except EngineLost:  # the fleet tells the core
            self._over.pop(step.replica_id, None)
            return
        except Exception as error:  # an engine may fail in any way; its requests must hear of it
            reason = OUT_OF_MEMORY if isinstance(error, OutOfMemory) else f"engine_error: {type(error).__name__}"
            self._step_over(step.replica_id)
            self._feed(StepFailed(step.replica_id, step.step_id, reason))
            return
        self._step_over(step.replica_id)
        ended, failed = [], []
        for request_id, output in answers:
            if output.error:
                failed.append((request_id, output.error))
                continue
            if output.end:
                ended.append(request_id)
            if (ticket := self._tickets.get(request_id)) is not None:
                ticket.put(output)
        self._feed(StepDone(step.replica_id, step.step_id, tuple(ended), tuple(failed), engine.late_s))

    def _end(self, request_id: int, last: Exception | None) -> None:
        ticket = self._tickets.pop(request_id, None)
        if ticket is not None:
            ticket.put(last)
        home = self._homes.pop(request_id, None)
        if home is not None and home in self.fleet.engines:
            # A step that was decided before may name the request, and must not reach the engine after its release.
            over = self._over.get(home)
            if over is None:
                self.fleet.engines[home].release((request_id,))
            else:
                over.append(request_id)
        if not self._tickets:
            self._empty.set()

    def _step_over(self, replica_id: str) -> None:
        if over := self._over.pop(replica_id, None):
            self.fleet.engines[replica_id].release(over)

    def _arm(self) -> None:
        """Sets the timer that the core asks for. It fires with the later of deadline and clock, so that waking a hair
        early cannot spin."""
        due_s = self.core.next_timer_s()
        if due_s == self._timer_due_s:
            return
        if self._timer:
            self._timer.cancel()
        self._timer_due_s, self._timer = due_s, None
        if due_s is not None:
            delay_s = max(due_s - time.monotonic(), 0.0)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._wake, due_s)

    def _wake(self, due_s: float) -> None:
        self._timer, self._timer_due_s = None, None
        self._feed(Wake(), max(due_s, time.monotonic()))
