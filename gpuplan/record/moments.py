"""What a request's story is made of: facts with their times, in seconds on the run's clock. `story` finds them,
`report.story` has words for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

Cause = Literal["arrival", "stolen", "lost", "swapped", "stopped", "left_alone"]
"""Why it waits where it does: it has come; another replica had room sooner; its replica went down, was swapped for a
newer version, was told to stop, or failed too often."""
Outcome = Literal["completed", "refused", "failed", "cancelled"]
Missing = Literal["no_log", "no_arrival", "no_end"]


@dataclass(frozen=True, slots=True)
class Scheduled:
    """When the schedule wanted it, and how much later its bytes left (None: they never did)."""

    kind: ClassVar[str] = "scheduled"
    at_s: float
    sent_after_s: float | None


@dataclass(frozen=True, slots=True)
class Note:
    """What the story cannot tell, and why."""

    kind: ClassVar[str] = "note"
    at_s: float | None
    missing: Missing


@dataclass(frozen=True, slots=True)
class Arrived:
    """The core has it."""

    kind: ClassVar[str] = "arrived"
    at_s: float


@dataclass(frozen=True, slots=True)
class Waits:
    """It waits for a replica. `taken_from` is where it waited or ran until now, empty where that is the same."""

    kind: ClassVar[str] = "waits"
    at_s: float
    replica: str
    ahead: int
    expected_s: float
    taken_from: str
    cause: Cause


@dataclass(frozen=True, slots=True)
class Starts:
    """Its first step on a replica, which reads `tokens` of its prompt. From the row alone all but when and where is
    None."""

    kind: ClassVar[str] = "starts"
    at_s: float
    replica: str
    step_id: int | None
    tokens: int | None
    prompt_tokens: int
    batch_size: int | None


@dataclass(frozen=True, slots=True)
class Steps:
    """Steps in a row that went well: of its prompt, or one token each. `longest_prefills` is how many prompts of others
    the longest read; `sat_out` counts the replica's steps meanwhile that went without it."""

    kind: ClassVar[str] = "steps"
    at_s: float
    phase: Literal["prompt", "decode"]
    replica: str
    steps: int
    batch_size_min: int
    batch_size_max: int
    batch_size_median: float
    mean_s: float
    longest_s: float
    longest_step_id: int
    longest_prefills: int
    sat_out: int


@dataclass(frozen=True, slots=True)
class StepFails:
    """A step that it was in failed as a whole. `others` are the client's ids of those with it: with any, all run again
    in halves."""

    kind: ClassVar[str] = "step_failed"
    at_s: float
    replica: str
    step_id: int
    reason: str
    took_s: float
    others: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunsAgain:
    """The step that takes the place of the failed one, for the half that it is in."""

    kind: ClassVar[str] = "runs_again"
    at_s: float
    replica: str
    step_id: int
    others: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReplicaLost:
    """The replica that it waited for, or ran on, went down: with `step_id`, in the middle of a step of it."""

    kind: ClassVar[str] = "replica_lost"
    at_s: float
    replica: str
    reason: str
    returns: bool
    started: bool
    step_id: int | None
    tokens: int


@dataclass(frozen=True, slots=True)
class LeftAlone:
    """Its replica's breaker opened: nothing new starts there for a while."""

    kind: ClassVar[str] = "left_alone"
    at_s: float
    replica: str
    reason: str


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Its client has the first token, or the server had it (`server_s`) where no client tells."""

    kind: ClassVar[str] = "first_token"
    at_s: float
    server_s: float | None
    ttft_ms: float | None


@dataclass(frozen=True, slots=True)
class Part:
    """Where its time went. `lost` are steps that failed and what was lost with a replica, `on_the_way` is all outside
    the core: sending, the network, parsing."""

    name: Literal["on_the_way", "waiting", "prompt", "decoding", "running", "lost"]
    seconds: float
    share: float


@dataclass(frozen=True, slots=True)
class Ended:
    """How it ended by the log: `reason` as in the vocabulary. `total_s` counts from the schedule, its parts add up to
    it."""

    kind: ClassVar[str] = "ended"
    at_s: float
    outcome: Outcome
    reason: str
    retry_after_s: float
    total_s: float
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Answered:
    """What its client got, where the log does not say it already. `total_s` counts from the schedule."""

    kind: ClassVar[str] = "answered"
    at_s: float | None
    status: str
    error: str
    message: str
    http_status: int | None
    tokens: int
    total_s: float | None


Moment = (
    Scheduled
    | Note
    | Arrived
    | Waits
    | Starts
    | Steps
    | StepFails
    | RunsAgain
    | ReplicaLost
    | LeftAlone
    | FirstToken
    | Ended
    | Answered
)


@dataclass(frozen=True, slots=True)
class Story:
    """A request and what became of it."""

    request_id: int
    traffic_class: str
    model: str
    prompt_tokens: int
    output_tokens: int
    moments: tuple[Moment, ...]
