"""Who is let in.

In two looks, so that a burst is refused before anything of it is parsed. At the door only a request's head is known,
its traffic class and its key. It takes a place there, of which there are as many as all queues have together, or is
refused: as many of its class wait as may, or its class or key asks too often. Once its prompt has been counted: a
draining core takes nobody; nor does a class or a key that has used up its tokens, a model without a replica or with an
open breaker, and a full queue; what fits no replica's KV cache never will; and nobody is let wait for an answer that by
the estimate comes after its deadline.

A client that is refused for what it did itself (`class_full`, `rate_limited`) and one that meets an overloaded server
are told apart. Both hear when to come back: by how fast the queue drains, or when the bucket has filled again.
"""

from __future__ import annotations

from gpuplan.policy.rate_limits import KeyedLimiters, RateLimiter
from gpuplan.policy.state import ClassState, ModelState, Sequence
from gpuplan.policy.vocabulary import Arrive, Knock, Reject, RejectReason
from gpuplan.scenario.demand import ClassSpec
from gpuplan.scenario.deployment import Deployment

# Bounds on Retry-After: under a second a client would hammer; OpenAI's client gives up above 120 s.
RETRY_AFTER_S_MIN = 1.0
RETRY_AFTER_S_MAX = 60.0

MARGIN = 1.2
"""An answer is promised only where so many times its estimate is left: one that is begun and cut off at its deadline
costs as much as one that is good. In `benchmarks/faults.py`, a flood of ten times the capacity, goodput was 87 % of the
best that the service gives with 1, and 124 % with 1.2 (more than all: short answers are let in more easily)."""


class Gate:
    """The door, and what each class and each key may still ask for."""

    def __init__(self, deployment: Deployment) -> None:
        spec = deployment.admission
        names = {"", *deployment.traffic_classes, *spec.classes}
        self._classes = {name: ClassState(name, spec.classes.get(name, ClassSpec())) for name in names}
        self._limiters = {n: RateLimiter(c.rate_limit) for n, c in spec.classes.items() if c.rate_limit}
        self._keys = KeyedLimiters(spec.per_key) if spec.per_key else None
        self._places = sum(rule.max_queue_size for rule in deployment.batching.values())
        self._door: dict[int, ClassState] = {}

    def __len__(self) -> int:
        """Requests at the door."""
        return len(self._door)

    def knock(self, event: Knock, now_s: float) -> Reject | None:
        """Gives the request a place at the door, or refuses it."""
        traffic = self._traffic(event.traffic_class)
        if len(self._door) >= self._places:
            return refusal(event.request_id, "queue_full", RETRY_AFTER_S_MIN)
        refused = self._ask(event, traffic, now_s)
        if refused is None:
            self._door[event.request_id] = traffic
            traffic.waiting += 1
        return refused

    def leave(self, request_id: int) -> bool:
        """A request goes away from the door; False when it was not there."""
        traffic = self._door.pop(request_id, None)
        if traffic is None:
            return False
        traffic.waiting -= 1
        return True

    def come_in(self, event: Arrive, now_s: float) -> ClassState | Reject:
        """The request's class, or why it is refused. What comes without a knock is asked here as it would have been
        at the door."""
        traffic = self._traffic(event.traffic_class)
        if not self.leave(event.request_id) and (refused := self._ask(event, traffic, now_s)):
            return refused
        tokens, wait_s = event.prompt_tokens + event.output_tokens, 0.0
        for limiter in self._limits(traffic, event.key):
            wait_s = max(wait_s, limiter.tokens.wait_s(tokens, now_s=now_s))
        return refusal(event.request_id, "rate_limited", wait_s) if wait_s else traffic

    def charge(self, s: Sequence, key: str, now_s: float) -> None:
        """The request is let in: its prompt and all that it may get are taken from what its class and key have."""
        s.limiters = self._limits(s.traffic, key)
        for limiter in s.limiters:
            limiter.tokens.take(s.kv_tokens, now_s=now_s)

    def _ask(self, event: Knock | Arrive, traffic: ClassState, now_s: float) -> Reject | None:
        """What the head alone decides; a request that may go is counted."""
        most = traffic.max_queue_size
        if most is not None and traffic.waiting >= most:
            return refusal(event.request_id, "class_full", traffic.drain.wait_s(traffic.waiting))
        limiters, wait_s = self._limits(traffic, event.key), 0.0
        for limiter in limiters:
            wait_s = max(wait_s, limiter.requests.wait_s(1, now_s=now_s))
        if wait_s:
            return refusal(event.request_id, "rate_limited", wait_s)
        for limiter in limiters:
            limiter.requests.take(1, now_s=now_s)
        return None

    def _traffic(self, name: str) -> ClassState:
        """Classes that nobody has named in the file are one."""
        return self._classes.get(name) or self._classes[""]

    def _limits(self, traffic: ClassState, key: str) -> tuple[RateLimiter, ...]:
        of_class = self._limiters.get(traffic.name)
        if self._keys is None:
            return (of_class,) if of_class else ()
        of_key = self._keys.of(key)
        return (of_class, of_key) if of_class else (of_key,)


def admit(model: ModelState, s: Sequence) -> Reject | None:
    """None, or the refusal, by what the model's replicas could take."""
    if fits_somewhere(model, s):
        return None
    # For good, or only while those that could hold it are not there.
    if any(replica.could_hold(s) for replica in model.replicas) or not model.replicas:
        return refusal(s.request_id, "no_replica", RETRY_AFTER_S_MIN)
    return Reject(s.request_id, "too_long")


def refusal(request_id: int, reason: RejectReason, retry_after_s: float) -> Reject:
    """A refusal that a client may try again after."""
    return Reject(request_id, reason, min(max(retry_after_s, RETRY_AFTER_S_MIN), RETRY_AFTER_S_MAX))


def fits_somewhere(model: ModelState, s: Sequence) -> bool:
    """Some replica that is up, or soon will be, has KV cache for all of the sequence, once it is empty."""
    return any(replica.available and replica.could_hold(s) for replica in model.replicas)
