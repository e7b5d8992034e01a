"""The words between the core and whatever drives it: events go in, actions come out.

All are frozen structs that encode to JSON with a `type` tag, so the decision log is these very objects (msgspec's
structs are chosen over dataclasses because the core makes two or three of them a step). Requests are integers given
out by the driver; replicas are named as in the deployment.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from gpuplan.hardware.roofline import StepLoad

RejectReason = Literal[
    "queue_full",  # the model's queue, or all places of the server: it is overloaded
    "class_full",  # as many of its class wait as may
    "rate_limited",  # its class or its key has used up what it may ask for
    "deadline",  # by the estimate its answer would come too late
    "circuit_open",  # the model fails again and again
    "draining",
    "no_replica",
    "too_long",
]
BreakerState = Literal["closed", "open", "half_open"]
OUT_OF_MEMORY = "out_of_memory"
"""The reason of a step that its replica had no memory for: such a step is split, and smaller ones follow."""


class Word(Struct, frozen=True, tag_field="type", tag=True, omit_defaults=True):
    """An event or an action."""


# --- events -------------------------------------------------------------------------------------------------------


class Knock(Word, frozen=True):
    """A request is at the door, and nothing of it has been read but its head: it takes a place, or is refused. What
    comes of it is an `Arrive` or a `Cancel`."""

    request_id: int
    traffic_class: str = ""
    key: str = ""


class Arrive(Word, frozen=True):
    """A request has come. `output_tokens` is the most it may get; 0 for a model that answers in one step. `timeout_s`
    is how long its client waits for all of the answer, from here on. `key` names whose request it is, for rate limits.
    `spans` are the parts that its prompt begins with, where others begin with the same: a name and its tokens each.
    """

    request_id: int
    model: str
    prompt_tokens: int
    output_tokens: int = 0
    client_id: str = ""
    traffic_class: str = ""
    key: str = ""
    timeout_s: float | None = None
    spans: tuple[tuple[str, int], ...] = ()


class StepDone(Word, frozen=True):
    """A step has run. `ended` names sequences whose engine met an end of text before their limit, `failed` those that
    it has no answer for, and why; `late_s` is how much later than an emulated card would have the host ended it; it
    ran `steps` times in a row."""

    replica_id: str
    step_id: int
    ended: tuple[int, ...] = ()
    failed: tuple[tuple[int, str], ...] = ()
    late_s: float | None = None
    steps: int = 1


class StepFailed(Word, frozen=True):
    """A step has failed as a whole."""

    replica_id: str
    step_id: int
    reason: str


class Cancel(Word, frozen=True):
    """The client is gone or has waited long enough: the request's place is free again."""

    request_id: int


class ReplicaUp(Word, frozen=True):
    """A replica is loaded and warm: it may be given work. Replicas start down."""

    replica_id: str


class ReplicaDown(Word, frozen=True):
    """A replica is gone; what ran there is lost. When it `returns`, being started again, the queue waits for it."""

    replica_id: str
    reason: str = ""
    returns: bool = False


class VersionAdded(Word, frozen=True):
    """A new version is to be loaded in the place of a replica of the deployment: it is down, and takes memory there.
    When it `returns` soon, the queue waits for it."""

    replica_id: str
    place: str
    returns: bool = False


class Swap(Word, frozen=True):
    """The new versions, loaded and warm, take all that is not yet running from here on; the old ones finish what they
    have, and are unloaded."""

    model: str
    new: tuple[str, ...] = ()
    old: tuple[str, ...] = ()


class VersionDropped(Word, frozen=True):
    """A version is unloaded, or was never loaded: its memory is free."""

    replica_id: str


class Drain(Word, frozen=True):
    """No new requests from here on; those admitted finish."""


class Wake(Word, frozen=True):
    """The time that `next_timer_s` named has come."""


Event = (
    Knock
    | Arrive
    | StepDone
    | StepFailed
    | Cancel
    | ReplicaUp
    | ReplicaDown
    | VersionAdded
    | Swap
    | VersionDropped
    | Drain
    | Wake
)

# --- actions ------------------------------------------------------------------------------------------------------


class Reject(Word, frozen=True):
    """Refuse a request that has just arrived."""

    request_id: int
    reason: RejectReason
    retry_after_s: float = 0.0


class Assign(Word, frozen=True):
    """A request waits for this replica, `ahead` others before it, and should have its answer after `expected_s`.
    `taken_from` names the replica that it waited for until now. For the log: nothing is to be done."""

    request_id: int
    replica_id: str
    ahead: int
    expected_s: float
    taken_from: str = ""


class Prefill(Struct, frozen=True, array_like=True):
    """`tokens` more of a request's prompt; after the last of them its first token is there."""

    request_id: int
    tokens: int
    last: bool


class RunStep(Word, frozen=True):
    """Run one step on an idle replica: prefill these, decode one token for those. It may be run up to `steps` times in
    a row before its driver reports: nothing would be decided in between, unless a `Cut` comes."""

    replica_id: str
    step_id: int
    prefills: tuple[Prefill, ...]
    decodes: tuple[int, ...]
    load: StepLoad
    waiting: int
    steps: int = 1

    def answered(self) -> tuple[int, ...]:
        """The requests that get a token (or their one answer) when the step is done."""
        if not self.prefills:
            return self.decodes
        return (*self.decodes, *(p.request_id for p in self.prefills if p.last))


class Cut(Word, frozen=True):
    """Something is to be decided when the step that runs is over: do not run it again before reporting."""

    replica_id: str
    step_id: int


class Complete(Word, frozen=True):
    """The request has all it asked for."""

    request_id: int


class Fail(Word, frozen=True):
    """An admitted request is lost, and why."""

    request_id: int
    reason: str


class Unload(Word, frozen=True):
    """Nothing runs any more on a version that was taken over from: free it."""

    replica_id: str


class Trip(Word, frozen=True):
    """A circuit breaker has changed its state: of a replica, or of a model as a whole. For the log and for metrics."""

    name: str
    state: BreakerState
    reason: str


class Scale(Word, frozen=True):
    """So many replicas of the model are wanted from here on, and why. For the log and for metrics."""

    model: str
    replicas: int
    reason: str


class StartReplica(Word, frozen=True):
    """Load a replica that stands by; `ReplicaUp` follows when it serves."""

    replica_id: str


class StopReplica(Word, frozen=True):
    """Nothing runs on the replica any more and none is needed there: free it. It stands by from here on."""

    replica_id: str


Action = Assign | Reject | RunStep | Cut | Complete | Fail | Unload | Trip | Scale | StartReplica | StopReplica


class Decision(Struct, frozen=True):
    """One line of the decision log."""

    at_s: float
    event: Event
    actions: list[Action]
