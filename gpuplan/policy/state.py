"""What the core remembers: sequences, replicas, and the line of those that wait for each. Changed only through
`core.ServingCore`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Literal

from gpuplan.policy.breaker import Breaker
from gpuplan.policy.concurrency import ConcurrencyLimit
from gpuplan.policy.cost import Outputs, Pace
from gpuplan.policy.kv_blocks import KvBlocks, Span
from gpuplan.policy.line import Line
from gpuplan.policy.rate_limits import RateLimiter
from gpuplan.policy.vocabulary import RunStep
from gpuplan.scenario.demand import BatchingSpec, ClassSpec
from gpuplan.scenario.deployment import Replica

Phase = Literal["serving", "standby", "starting", "stopping", "version"]
"""Where a replica is in its life, as the autoscaler sees it: a `version` is being loaded to take over from another."""
DRAIN_WINDOW = 64
"""Completions over which a drain rate is taken: long enough to smooth batches, short enough to follow load."""


class DrainRate:
    """How fast those that wait get their turn, by the last completions."""

    __slots__ = ("_times_s",)

    def __init__(self) -> None:
        self._times_s: deque[float] = deque(maxlen=DRAIN_WINDOW)

    def completed(self, now_s: float) -> None:
        self._times_s.append(now_s)

    def wait_s(self, waiting: int) -> float:
        """Seconds until so many have had their turn; 1 where no rate is known yet."""
        times_s = self._times_s
        if len(times_s) < 2 or times_s[-1] <= times_s[0]:
            return 1.0
        return waiting * (times_s[-1] - times_s[0]) / (len(times_s) - 1)


class ClassState:
    """A traffic class: its rules, how many of its requests wait (or are at the door), and how fast they complete."""

    __slots__ = ("deadline", "drain", "max_queue_size", "name", "priority", "spec", "waiting")

    def __init__(self, name: str, spec: ClassSpec) -> None:
        self.name = name
        self.spec = spec
        self.priority, self.deadline, self.max_queue_size = spec.priority, spec.deadline, spec.max_queue_size
        self.waiting = 0
        self.drain = DrainRate()


class Sequence:
    """One admitted request and how far it has come. `model` is its ModelState. It waits in the line of `home`, or runs
    on `replica`. `expected_tokens` is how many it will likely generate, `work_s` what it costs there, in seconds. A
    `probe` finds out whether its model works again. Of one that gave way, the tokens that were `sent` before are part
    of the prompt.
    """

    __slots__ = (
        "arrived_s",
        "cancelled",
        "deadline_s",
        "emitted",
        "expected_tokens",
        "home",
        "limiters",
        "losses",
        "model",
        "output_tokens",
        "prefilled",
        "priority",
        "probe",
        "prompt_tokens",
        "replica",
        "request_id",
        "sent",
        "spans",
        "ticket",
        "traffic",
        "work_s",
    )

    def __init__(
        self,
        request_id: int,
        model: ModelState,
        traffic: ClassState,
        prompt_tokens: int,
        output_tokens: int,
        arrived_s: float,
        *,
        deadline_s: float | None = None,
        spans: tuple[Span, ...] = (),
    ) -> None:
        self.request_id = request_id
        self.model = model
        self.traffic = traffic
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.arrived_s = arrived_s
        self.deadline_s = deadline_s
        self.spans = spans
        self.limiters: tuple[RateLimiter, ...] = ()
        self.priority = traffic.priority
        self.expected_tokens = model.outputs_of(traffic).expected(output_tokens)
        self.prefilled = 0
        self.emitted = self.sent = 0
        self.losses = 0
        self.cancelled = self.probe = False
        self.work_s = 0.0
        self.ticket = 0
        self.home: ReplicaState | None = None
        self.replica: ReplicaState | None = None

    @property
    def kv_tokens(self) -> int:
        """KV cache reserved for the whole of it: prompt and every token it may get."""
        return self.prompt_tokens + self.output_tokens


class ReplicaState:
    """A replica's sequences: those that wait for it, those whose prompt is being read, and those that get a token every
    step. `cancelled` counts those that leave when the running step is over.

    `place` holds the versions that are loaded where this one is, itself among them, and share its memory. One that is
    `retiring` has been taken over from: it finishes what it has. One that is down and `returning` is waited for; it
    should serve from `ready_s` on.

    `turns` are groups that run one after the other, the last one first, before everybody runs together again: the
    halves of a step that failed. `slow_steps` counts those in a row that took much longer than a neighbour's would.
    `answered` is how many requests its last step answered, at `answered_s`. The step that runs, from `step_began_s` on,
    should take `step_s` each time; `cut` when it is not to be run again.

    Where KV cache is kept in `blocks`, it is taken as contexts grow, and `kv_reserved` is what they hold; elsewhere it
    is reserved whole. Those who `gave_way` for lack of blocks hold none, and go on before anybody else starts.
    """

    __slots__ = (
        "_decoding_ids",
        "answered",
        "answered_s",
        "blocks",
        "breaker",
        "cancelled",
        "context_tokens",
        "cut",
        "decoding",
        "expected_tokens",
        "gave_way",
        "kv_reserved",
        "kv_tokens_max",
        "limit",
        "line",
        "order",
        "pace",
        "phase",
        "place",
        "prefilling",
        "prompts_left",
        "ready_s",
        "replica_id",
        "retiring",
        "returning",
        "schedules_ahead",
        "slow_steps",
        "spec",
        "step",
        "step_began_s",
        "step_s",
        "turns",
        "unloaded",
        "up",
    )

    def __init__(
        self,
        spec: Replica,
        order: int,
        *,
        place: list[ReplicaState],
        pace: Pace,
        line: Line,
        limit: ConcurrencyLimit,
        breaker: Breaker,
        phase: Phase,
        blocks: KvBlocks | None = None,
        schedules_ahead: bool = False,
    ) -> None:
        self.spec = spec
        self.replica_id, self.kv_tokens_max = spec.id, spec.kv_tokens_max
        self.order = order
        self.place = place
        place.append(self)
        self.pace = pace
        self.line = line
        self.limit = limit
        self.breaker = breaker
        self.phase = phase
        self.blocks = blocks
        self.schedules_ahead = schedules_ahead
        self.up = self.returning = self.retiring = self.unloaded = False
        self.ready_s = float("-inf")
        self.slow_steps = 0
        self.turns: list[list[Sequence]] = []
        self.step: RunStep | None = None
        self.step_began_s = float("-inf")
        self.step_s = 0.0
        self.cut = False
        self.answered = 0
        self.answered_s = float("-inf")
        self.prefilling: list[Sequence] = []
        self.decoding: list[Sequence] = []
        self._decoding_ids: tuple[int, ...] | None = ()  # None: they have changed
        self.gave_way: list[Sequence] = []
        self.kv_reserved = 0
        self.context_tokens = 0
        self.prompts_left = 0
        self.expected_tokens = 0.0
        self.cancelled = 0

    @property
    def running(self) -> int:
        return len(self.prefilling) + len(self.decoding)

    @property
    def idle(self) -> bool:
        return self.up and self.step is None

    @property
    def condition(self) -> Literal["ready", "starting", "stopping", "standby"]:
        """As whoever looks on sees it."""
        if self.phase == "standby":
            return "standby"
        return "stopping" if self.retiring else "ready" if self.up else "starting"

    @property
    def available(self) -> bool:
        """It takes sequences, now or soon."""
        return (self.up or self.returning) and not self.retiring

    @property
    def welcomes(self) -> bool:
        """Sequences may come and wait for it: of one whose breaker is half-open, only its probe."""
        if not self.available:
            return False
        breaker = self.breaker
        return breaker.state == "closed" or (breaker.allows() and not self.running and not len(self.line))

    def sequences(self) -> Iterator[Sequence]:
        yield from self.prefilling
        yield from self.decoding
        yield from self.gave_way

    def could_hold(self, sequence: Sequence) -> bool:
        """Its KV cache is large enough for the sequence, were it empty."""
        limit = self.kv_tokens_max
        return limit is None or sequence.kv_tokens <= limit

    def has_room_for(self, sequence: Sequence) -> bool:
        """A place in the batch and KV cache for all of it, so that it never runs out of memory; where KV cache is kept
        in blocks, for its prompt."""
        if not self.up or self.retiring or self.running >= self.limit.limit or not self.breaker.allows():
            return False
        if self.schedules_ahead and self.running and sequence.arrived_s > self.step_began_s:
            return False  # the step that follows was put together before it came
        if self.blocks is not None:
            return self._has_blocks_for(self.blocks, sequence)
        limit = self.kv_tokens_max
        if limit is None:
            return True
        if len(self.place) == 1:
            return self.kv_reserved + sequence.kv_tokens <= limit
        return sequence.kv_tokens <= self.kv_free()

    def _has_blocks_for(self, blocks: KvBlocks, sequence: Sequence) -> bool:
        """For its prompt, unless somebody who gave way goes first."""
        if self.gave_way or not self.could_hold(sequence):
            return False
        if len(self.place) > 1 and sequence.prompt_tokens > self.kv_free():
            return False
        return blocks.fits(sequence.request_id, sequence.spans, sequence.prompt_tokens)

    def kv_free(self) -> int:
        """Tokens of KV cache left in its place, beside what every version there holds and the weights of all but one.
        Only for a model with a limit."""
        assert self.kv_tokens_max is not None, "only where there is a limit"
        displaced = self.spec.weights_kv_tokens * (len(self.place) - 1)
        return self.kv_tokens_max - displaced - sum(r.kv_reserved for r in self.place)

    def wait(self, sequence: Sequence) -> None:
        """The sequence joins its line."""
        sequence.home = self
        sequence.traffic.waiting += 1
        sequence.model.waiting += 1
        self.line.push(sequence)

    def wait_no_longer(self, sequence: Sequence) -> None:
        """The sequence leaves its line."""
        sequence.home = None
        sequence.traffic.waiting -= 1
        sequence.model.waiting -= 1
        self.line.remove(sequence)

    def take(self, sequence: Sequence) -> None:
        """The sequence starts, out of its line."""
        self.wait_no_longer(sequence)
        sequence.replica = self
        self.start(sequence)
        self.expected_tokens += sequence.expected_tokens
        self.breaker.probe_sent()

    def start(self, sequence: Sequence) -> None:
        """Its prompt is read from here on."""
        self.prefilling.append(sequence)
        if self.blocks is None:
            self.kv_reserved += sequence.kv_tokens
        else:
            sequence.prefilled = self.blocks.admit(sequence.request_id, sequence.spans, sequence.prompt_tokens)
            self.count_blocks()
        self.prompts_left += sequence.prompt_tokens - sequence.prefilled

    def decode(self, sequence: Sequence) -> None:
        """Its prompt has been read: it gets a token every step from here on."""
        self.prefilling.remove(sequence)
        self.decoding.append(sequence)
        self._decoding_ids = None

    def decoding_ids(self) -> tuple[int, ...]:
        """The numbers of those that get a token every step, in order."""
        if self._decoding_ids is None:
            self._decoding_ids = tuple([s.request_id for s in self.decoding])
        return self._decoding_ids

    def stop(self, sequence: Sequence) -> None:
        """It runs no more: its place in the batch and its KV cache are free."""
        if sequence.emitted:
            self.decoding.remove(sequence)
            self._decoding_ids = None
            self.context_tokens -= sequence.prompt_tokens + sequence.emitted
        else:
            self.prefilling.remove(sequence)
            self.prompts_left -= sequence.prompt_tokens - sequence.prefilled
        if self.blocks is None:
            self.kv_reserved -= sequence.kv_tokens
        else:
            self.blocks.let_go(sequence.request_id)
            self.count_blocks()

    def count_blocks(self) -> None:
        """What is held is what is reserved."""
        assert self.blocks is not None, "only where there are blocks"
        self.kv_reserved = self.blocks.held * self.blocks.block_size

    def let_go(self, sequence: Sequence) -> None:
        """The sequence is over here: its place in the batch and its KV cache are free."""
        if sequence in self.gave_way:
            self.gave_way.remove(sequence)
        else:
            self.stop(sequence)
        self.expected_tokens -= sequence.expected_tokens


class ModelState:
    """A model's replicas in order of the deployment, how many requests wait for any of them, and what has been learned
    of its requests. `retiring` counts versions that are not unloaded yet."""

    __slots__ = (
        "batching",
        "breaker",
        "decoder",
        "drain",
        "max_batch_tokens",
        "max_queue_size",
        "name",
        "outputs",
        "replicas",
        "retiring",
        "waiting",
    )

    def __init__(
        self, name: str, decoder: bool, batching: BatchingSpec, replicas: list[ReplicaState], breaker: Breaker
    ) -> None:
        self.name = name
        self.decoder = decoder
        self.batching = batching
        self.max_queue_size, self.max_batch_tokens = batching.max_queue_size, batching.max_batch_tokens
        self.replicas = replicas
        self.breaker = breaker
        self.waiting = 0
        self.drain = DrainRate()
        self.retiring = 0
        self.outputs: dict[str, Outputs] = {}

    def outputs_of(self, traffic: ClassState) -> Outputs:
        """What is known of the lengths of the class's answers."""
        outputs = self.outputs.get(traffic.name)
        if outputs is None:
            outputs = self.outputs[traffic.name] = Outputs()
        return outputs
