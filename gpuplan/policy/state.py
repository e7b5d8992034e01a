"""What the core remembers: sequences, replicas, and one queue per model. Changed only through `core.ServingCore`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from gpuplan.policy.vocabulary import RunStep
from gpuplan.scenario.demand import BatchingSpec
from gpuplan.scenario.deployment import Replica

DRAIN_WINDOW = 64
"""Completions over which a model's drain rate is taken: long enough to smooth batches, short enough to follow load."""


class Sequence:
    """One admitted request and how far it has come. `model` is its ModelState."""

    __slots__ = (
        "arrived_s",
        "cancelled",
        "emitted",
        "losses",
        "model",
        "output_tokens",
        "prefilled",
        "prompt_tokens",
        "replica",
        "request_id",
    )

    def __init__(
        self, request_id: int, model: ModelState, prompt_tokens: int, output_tokens: int, arrived_s: float
    ) -> None:
        self.request_id = request_id
        self.model = model
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.arrived_s = arrived_s
        self.prefilled = 0
        self.emitted = 0
        self.losses = 0
        self.cancelled = False
        self.replica: ReplicaState | None = None

    @property
    def kv_tokens(self) -> int:
        """KV cache reserved for the whole of it: prompt and every token it may get."""
        return self.prompt_tokens + self.output_tokens


class ReplicaState:
    """A replica's sequences: those whose prompt is still being read, and those that get a token every step. `cancelled`
    counts those that leave when the running step is over.

    `place` holds the versions that are loaded where this one is, itself among them, and share its memory. One that is
    `retiring` has been taken over from: it finishes what it has. One that is down and `returning` is waited for.

    `turns` are groups that run one after the other, the last one first, before everybody runs together again: the
    halves of a step that failed. `batch_limit` is how many may run in a step, lowered where memory was short, and
    `calm_steps` how many have gone well since.
    """

    __slots__ = (
        "batch_limit",
        "calm_steps",
        "cancelled",
        "context_tokens",
        "decoding",
        "kv_reserved",
        "order",
        "place",
        "prefilling",
        "retiring",
        "returning",
        "spec",
        "step",
        "turns",
        "unloaded",
        "up",
    )

    def __init__(self, spec: Replica, order: int, batch_limit: int, place: list[ReplicaState]) -> None:
        self.spec = spec
        self.order = order
        self.place = place
        place.append(self)
        self.retiring = False
        self.returning = False
        self.unloaded = False
        self.batch_limit = batch_limit
        self.calm_steps = 0
        self.turns: list[list[Sequence]] = []
        self.up = False
        self.step: RunStep | None = None
        self.prefilling: list[Sequence] = []
        self.decoding: list[Sequence] = []
        self.kv_reserved = 0
        self.context_tokens = 0
        self.cancelled = 0

    @property
    def running(self) -> int:
        return len(self.prefilling) + len(self.decoding)

    @property
    def idle(self) -> bool:
        return self.up and self.step is None

    def sequences(self) -> Iterator[Sequence]:
        yield from self.prefilling
        yield from self.decoding

    def could_hold(self, sequence: Sequence) -> bool:
        """Its KV cache is large enough for the sequence, were it empty."""
        limit = self.spec.kv_tokens_max
        return limit is None or sequence.kv_tokens <= limit

    @property
    def available(self) -> bool:
        """It takes sequences, now or soon."""
        return (self.up or self.returning) and not self.retiring

    def has_room_for(self, sequence: Sequence) -> bool:
        """A place in the batch and KV cache for all of it: an admitted sequence never runs out of memory."""
        if not self.up or self.retiring or self.running >= self.batch_limit:
            return False
        limit = self.spec.kv_tokens_max
        if limit is None:
            return True
        if len(self.place) == 1:
            return self.kv_reserved + sequence.kv_tokens <= limit
        return sequence.kv_tokens <= self.kv_free()

    def kv_free(self) -> int:
        """Tokens of KV cache left in its place, beside what every version there holds and the weights of all but one.
        Only for a model with a limit."""
        assert self.spec.kv_tokens_max is not None, "only where there is a limit"
        displaced = self.spec.weights_kv_tokens * (len(self.place) - 1)
        return self.spec.kv_tokens_max - displaced - sum(r.kv_reserved for r in self.place)

    def take(self, sequence: Sequence) -> None:
        sequence.replica = self
        self.prefilling.append(sequence)
        self.kv_reserved += sequence.kv_tokens


class ModelState:
    """A model's queue, its replicas in order of the deployment, and when its last requests completed. `answered` is how
    many requests its last step answered, at `answered_s`; `retiring` counts versions that are not unloaded yet."""

    __slots__ = (
        "answered",
        "answered_s",
        "batching",
        "completions",
        "decoder",
        "name",
        "queue",
        "replicas",
        "retiring",
    )

    def __init__(self, name: str, decoder: bool, batching: BatchingSpec, replicas: list[ReplicaState]) -> None:
        self.name = name
        self.decoder = decoder
        self.batching = batching
        self.replicas = replicas
        self.queue: deque[Sequence] = deque()
        self.completions: deque[float] = deque(maxlen=DRAIN_WINDOW)
        self.retiring = 0
        self.answered = 0
        self.answered_s = float("-inf")

    def drain_s(self) -> float:
        """Seconds that the queue needs to drain at the recent rate of completions; 1 where there is none yet."""
        if len(self.completions) < 2 or self.completions[-1] <= self.completions[0]:
            return 1.0
        rate = (len(self.completions) - 1) / (self.completions[-1] - self.completions[0])
        return len(self.queue) / rate
