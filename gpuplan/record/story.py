"""One request's story: its row and the lines of the decision log that concern it, as facts in order of time.

Takes a row of `requests.parquet` and the lines of `decisions.jsonl`, gives a `Story`; `report.story` has words for it.
What its client saw (sending, first token, answer) comes from the row, what was decided from the log, both on the run's
clock. Without a log, or where the log has no arrival of it, the row alone speaks and a `Note` says why.

A log has a million lines and a request lives for few of them: lines before its arrival are only searched for its
client's id, and of those from there to its end only such are decoded as hold its number or its replica's name.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from gpuplan.errors import InputError
from gpuplan.policy.vocabulary import (
    Action,
    Arrive,
    Assign,
    Cancel,
    Complete,
    Decision,
    Event,
    Fail,
    Reject,
    ReplicaDown,
    RunStep,
    Scale,
    StartReplica,
    StepDone,
    StepFailed,
    Swap,
    Trip,
    VersionDropped,
    Wake,
)
from gpuplan.record.moments import (
    Answered,
    Arrived,
    Cause,
    Ended,
    FirstToken,
    LeftAlone,
    Moment,
    Note,
    Outcome,
    Part,
    ReplicaLost,
    RunsAgain,
    Scheduled,
    Starts,
    StepFails,
    Steps,
    Story,
    Waits,
)
from gpuplan.record.run import Run


def of_run(run: Run, request_id: int, *, folder: str) -> Story:
    """The story of a run's request. Raises InputError where there is none of that id, or the log cannot be read."""
    ids = run.requests["request_id"]
    found = run.requests[ids == request_id]
    if found.empty:
        allowed = f"{ids.min()} to {ids.max()}" if len(ids) else "none: the run has no requests"
        raise InputError(f"no such request in {folder}", key="REQUEST_ID", value=request_id, allowed=allowed)
    return tell({str(name): value for name, value in found.iloc[0].to_dict().items()}, run.decisions)


def tell(row: Mapping[str, Any], lines: Sequence[bytes]) -> Story:
    """The story of the request of a row of `requests.parquet`, by the lines of the run's decision log. Raises
    InputError for a line that is no decision."""
    known = {name: _known(value) for name, value in row.items()}
    first = _arrival(lines, str(known["request_id"]))
    moments = _by_the_row(known, has_log=bool(lines)) if first is None else _Teller(known, lines, first).told()
    return Story(
        int(known["request_id"]),
        known["traffic_class"] or "",
        known["model"] or "",
        int(known["prompt_tokens"] or 0),
        int(known["output_tokens"] or 0),
        (Scheduled(known["scheduled_s"], _less(known["sent_s"], known["scheduled_s"])), *moments),
    )


# --- by the row ---------------------------------------------------------------------------------------------------


def _by_the_row(row: Mapping[str, Any], *, has_log: bool) -> list[Moment]:
    moments: list[Moment] = [Note(None, "no_arrival" if has_log else "no_log")]
    if row["arrived_s"] is not None:
        moments.append(Arrived(row["arrived_s"]))
    if row["started_s"] is not None:
        prompt_tokens = int(row["prompt_tokens"] or 0)
        moments.append(Starts(row["started_s"], row["replica"] or "", None, None, prompt_tokens, None))
    if row["first_token_s"] is not None:
        moments.append(_first_token(row, None))
    return [*moments, _answered(row)]


def _first_token(row: Mapping[str, Any], server_s: float | None) -> FirstToken:
    """Where the client tells of none, the server must have."""
    seen_s: float | None = row["first_token_s"]
    if seen_s is None:
        assert server_s is not None, "somebody had it"
        return FirstToken(server_s, server_s, None)
    return FirstToken(seen_s, server_s, (seen_s - row["scheduled_s"]) * 1e3)


def _answered(row: Mapping[str, Any]) -> Answered:
    return Answered(
        row["done_s"],
        row["status"],
        row["error"] or "",
        row["message"] or "",
        None if row["http_status"] is None else int(row["http_status"]),
        int(row["tokens"] or 0),
        _less(row["done_s"], row["scheduled_s"]),
    )


def _known(value: Any) -> Any:
    """A cell of a table; None where it holds a null."""
    import pandas as pd

    return None if not hasattr(value, "__len__") and pd.isna(value) else value


def _less(later_s: float | None, earlier_s: float | None) -> float | None:
    return None if later_s is None or earlier_s is None else later_s - earlier_s


# --- by the log ---------------------------------------------------------------------------------------------------

_DECODER = msgspec.json.Decoder(Decision)


def _decoded(lines: Sequence[bytes], index: int) -> Decision:
    try:
        return _DECODER.decode(lines[index])
    except msgspec.DecodeError as error:
        raise InputError(f"not a decision: {error}", file="decisions.jsonl", line=index + 1) from None


def _arrival(lines: Sequence[bytes], client_id: str) -> int | None:
    """The line at which the request arrives; the last, as in its row, should a client use an id again."""
    quoted, found = msgspec.json.encode(client_id), None
    for index, line in enumerate(lines):
        if quoted in line:
            event = _decoded(lines, index).event
            if isinstance(event, Arrive) and event.client_id == client_id:
                found = index
    return found


class _Step:
    """A step of the request that is running; `told` where it is a moment of its own."""

    __slots__ = ("answers", "batch_size", "began_s", "members", "prefills", "step", "tokens", "told")

    def __init__(self, step: RunStep, request_id: int, began_s: float) -> None:
        self.step, self.began_s, self.told = step, began_s, False
        mine = [p for p in step.prefills if p.request_id == request_id]
        self.tokens = mine[0].tokens if mine else 0
        self.answers = request_id in step.answered()
        self.prefills = len(step.prefills) - len(mine)
        self.members = (*step.decodes, *(p.request_id for p in step.prefills))
        self.batch_size = len(self.members)


class _Teller:
    """Goes through the log from a request's arrival to its end. `_buckets` are the seconds of each part of its time
    until `_since_s`, and what passes from there on belongs to `_phase`."""

    def __init__(self, row: Mapping[str, Any], lines: Sequence[bytes], first: int) -> None:
        arrival = _decoded(lines, first).event
        assert isinstance(arrival, Arrive), "it was looked for"
        self._row, self._lines, self._first, self._arrival = row, lines, first, arrival
        self._id = arrival.request_id
        self._at = ""  # the replica that it waits for or runs on
        self._open: set[str] = set()  # breakers
        self._index = first
        self._step: _Step | None = None
        self._started = self._again = False
        self._tokens = self._sat_out = 0
        self._well: list[tuple[_Step, float]] = []  # steps since something else was told, and when they ended
        self._decoder = arrival.output_tokens > 0
        self._phase = "waiting"
        self._since_s = 0.0
        self._buckets = dict.fromkeys(("waiting", "prompt", "decoding", "lost"), 0.0)
        self._client_ids: dict[int, str] = {}  # by the core's numbers, of those that arrive before line `_named_to`
        self._named_to = 0
        self._moments: list[Moment] = []
        self._ended = False

    def told(self) -> list[Moment]:
        number = str(self._id).encode()
        name = b"\n"  # in no line
        for index in range(self._first, len(self._lines)):
            line = self._lines[index]
            if number in line or name in line:
                self._index = index
                decision = _decoded(self._lines, index)
                self._event(decision.event, decision.at_s)
                for action in decision.actions:
                    if not self._ended:
                        self._action(action, decision)
                if self._ended:
                    break
                name = msgspec.json.encode(self._at) if self._at else name
        if not self._ended:
            self._tell_steps()
            self._moments += [Note(None, "no_end"), _answered(self._row)]
        return self._moments

    def _event(self, event: Event, now_s: float) -> None:
        match event:
            case Arrive(request_id=self._id):
                self._since_s = now_s
                self._moments.append(Arrived(now_s))
            case Cancel(request_id=self._id):
                self._end(now_s, "cancelled", "")
            case StepDone() if self._is_mine(event):
                self._step_done(event, now_s)
            case StepFailed() if self._is_mine(event):
                self._step_failed(event, now_s)
            case ReplicaDown() if event.replica_id == self._at:
                self._replica_down(event, now_s)

    def _action(self, action: Action, decision: Decision) -> None:
        now_s = decision.at_s
        match action:
            case Assign(request_id=self._id):
                self._assigned(action, self._cause(action, decision), now_s)
            case RunStep(replica_id=replica_id) if replica_id == self._at:
                self._step_begun(action, now_s)
            case Complete(request_id=self._id):
                self._end(now_s, "completed", "")
            case Reject(request_id=self._id):
                self._end(now_s, "refused", action.reason, action.retry_after_s)
            case Fail(request_id=self._id):
                self._end(now_s, "failed", action.reason)
            case Trip(name=name, state=state, reason=reason):
                (self._open.add if state == "open" else self._open.discard)(name)
                if state == "open" and name == self._at:
                    self._moments.append(LeftAlone(now_s, name, reason))

    def _assigned(self, action: Assign, cause: Cause, now_s: float) -> None:
        taken_from, last = action.taken_from, self._moments[-1]
        if cause == "lost" and isinstance(last, Waits) and (last.at_s, last.cause) == (now_s, cause):
            # Whoever ran on a lost replica is placed again, and once more with all that wait for it.
            self._moments.pop()
            taken_from = taken_from or last.taken_from
        self._at = action.replica_id
        self._moments.append(Waits(now_s, self._at, action.ahead, action.expected_s, taken_from, cause))

    def _cause(self, assigned: Assign, decision: Decision) -> Cause:
        event, actions = decision.event, decision.actions
        if isinstance(event, Arrive) and event.request_id == self._id:
            return "arrival"
        if isinstance(event, ReplicaDown) and event.replica_id == self._at:
            return "lost"
        if (isinstance(event, Swap) and self._at in event.old) or (
            isinstance(event, VersionDropped) and event.replica_id == self._at
        ):
            return "swapped"
        if self._at in self._open:
            return "left_alone"
        kinds = {type(action) for action in actions[: actions.index(assigned)]}
        if isinstance(event, Wake) and Scale in kinds and StartReplica not in kinds:
            return "stopped"
        return "stolen"

    # --- steps ----------------------------------------------------------------------------------------------------

    def _is_mine(self, event: StepDone | StepFailed) -> bool:
        step = self._step.step if self._step else None
        return step is not None and (step.replica_id, step.step_id) == (event.replica_id, event.step_id)

    def _step_begun(self, step: RunStep, now_s: float) -> None:
        mine = _Step(step, self._id, now_s)
        if self._id not in mine.members:
            self._sat_out += self._started
            return
        self._step = mine
        if self._again:
            self._moments.append(RunsAgain(now_s, step.replica_id, step.step_id, self._others(mine)))
            mine.told = True
        elif not self._started:
            self._passed(now_s, "prompt")
            self._started = True
            tokens = self._arrival.prompt_tokens
            self._moments.append(Starts(now_s, step.replica_id, step.step_id, mine.tokens, tokens, mine.batch_size))
            mine.told = True

    def _step_done(self, event: StepDone, now_s: float) -> None:
        mine, self._step, self._again = self._step, None, False
        assert mine is not None, "it is mine"
        if any(request_id == self._id for request_id, _ in event.failed):
            return  # what became of it follows
        if not mine.told:
            self._well.append((mine, now_s))
        if not mine.answers:
            return
        self._tokens += self._decoder
        if self._decoder and self._tokens == 1:
            self._passed(now_s, "decoding")
            self._tell_steps()
            self._moments.append(_first_token(self._row, now_s))

    def _step_failed(self, event: StepFailed, now_s: float) -> None:
        mine, self._step = self._step, None
        assert mine is not None, "it is mine"
        phase = self._phase
        self._passed(mine.began_s, "lost")
        self._passed(now_s, phase)
        self._tell_steps()
        took_s = now_s - mine.began_s
        self._moments.append(
            StepFails(now_s, event.replica_id, event.step_id, event.reason, took_s, self._others(mine))
        )
        self._again = True

    def _replica_down(self, event: ReplicaDown, now_s: float) -> None:
        self._tell_steps()
        step_id = self._step.step.step_id if self._step else None
        self._moments.append(
            ReplicaLost(now_s, event.replica_id, event.reason, event.returns, self._started, step_id, self._tokens)
        )
        self._passed(now_s, "waiting" if not self._tokens else self._phase)
        if self._started and not self._tokens:  # all of it has to be done again
            self._buckets["lost"] += self._buckets["prompt"]
            self._buckets["prompt"] = 0.0
        self._step, self._started, self._again, self._sat_out = None, False, False, 0

    def _others(self, mine: _Step) -> tuple[str, ...]:
        """Its step's other members, by the ids that clients gave; the core's number in brackets where one gave none."""
        for index in range(self._named_to, self._index + 1):
            if b'"Arrive"' in self._lines[index]:
                event = _decoded(self._lines, index).event
                if isinstance(event, Arrive):
                    self._client_ids[event.request_id] = event.client_id
        self._named_to = self._index + 1
        return tuple(self._client_ids.get(i) or f"[{i}]" for i in mine.members if i != self._id)

    def _tell_steps(self) -> None:
        """What went well since something else was told becomes one moment."""
        well, sat_out = self._well, self._sat_out
        if not well:
            return
        self._well, self._sat_out = [], 0
        sizes = [mine.batch_size for mine, _ in well]
        seconds = [done_s - mine.began_s for mine, done_s in well]
        longest_s, longest = max(zip(seconds, (mine for mine, _ in well), strict=True), key=lambda pair: pair[0])
        self._moments.append(
            Steps(
                well[0][0].began_s,
                "prompt" if well[0][0].tokens else "decode",
                well[0][0].step.replica_id,
                len(well),
                min(sizes),
                max(sizes),
                statistics.median(sizes),
                statistics.fmean(seconds),
                longest_s,
                longest.step.step_id,
                longest.prefills,
                sat_out,
            )
        )

    # --- its time -------------------------------------------------------------------------------------------------

    def _passed(self, now_s: float, phase: str) -> None:
        """The time until now belongs to the phase that ends, what comes to `phase`."""
        self._buckets[self._phase] += now_s - self._since_s
        self._since_s, self._phase = now_s, phase

    def _end(self, now_s: float, outcome: Outcome, reason: str, retry_after_s: float = 0.0) -> None:
        self._ended = True
        self._passed(now_s, self._phase)
        self._tell_steps()
        row = self._row
        done_s = row["done_s"]
        seen = outcome == "completed" and row["status"] == "completed" and done_s is not None and done_s >= now_s
        end_s = done_s if seen else now_s
        total_s = end_s - row["scheduled_s"]
        parts = {"on_the_way": total_s - sum(self._buckets.values()), **self._buckets}
        if not self._decoder:
            parts = {"running" if name == "prompt" else name: seconds for name, seconds in parts.items()}
        told = tuple(
            Part(name, seconds, seconds / total_s if total_s > 0 else 0.0)  # type: ignore[arg-type]
            for name, seconds in parts.items()
            if abs(seconds) > 1e-9
        )
        self._moments.append(Ended(end_s, outcome, reason, retry_after_s, total_s, told))
        if not seen:
            self._moments.append(_answered(row))
