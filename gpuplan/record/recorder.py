"""Takes down what happens, row by row, in the columns of `run`.

Three sides write here: the driver of a core (`decided`), whoever saw the answers (`answered`), and telemetry
(`sampled`). Rows are kept in memory and become tables once, at the end. A server and its load generator are often
two processes: each keeps its own rows on the machine's monotonic clock, and `assemble` joins them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from gpuplan.policy.vocabulary import (
    Action,
    Arrive,
    Cancel,
    Complete,
    Decision,
    Event,
    Fail,
    Reject,
    RunStep,
    StepDone,
    StepFailed,
)
from gpuplan.record.run import BATCH_COLUMNS, REQUEST_COLUMNS, SERVED_COLUMNS, SERVER_VIEW, TELEMETRY_COLUMNS
from gpuplan.scenario.deployment import Deployment, place_of
from gpuplan.scenario.schedule import ScheduledRequest

if TYPE_CHECKING:
    import pandas as pd


class Answer(msgspec.Struct, kw_only=True):
    """One request as its client saw it: the first part of REQUEST_COLUMNS, by name."""

    request_id: int
    traffic_class: str
    model: str
    warmup: bool
    prompt_tokens: int
    output_tokens: int
    scheduled_s: float
    sent_s: float | None = None
    first_token_s: float | None = None
    done_s: float | None = None
    tokens: int = 0
    merged_tokens: int = 0
    gaps_ms: Sequence[float] = ()
    status: str = "completed"
    error: str | None = None
    message: str | None = None
    http_status: int | None = None

    @classmethod
    def to(cls, request: ScheduledRequest, *, warmup_s: float) -> Answer:
        """The answer to a scheduled request, to be filled in with what came back."""
        return cls(
            request_id=request.index,
            traffic_class=request.traffic_class,
            model=request.model,
            warmup=request.scheduled_s < warmup_s,
            prompt_tokens=request.prompt_tokens,
            output_tokens=request.output_tokens,
            scheduled_s=request.scheduled_s,
        )


class Served:
    """One request as the core saw it."""

    __slots__ = ("arrived_s", "client_id", "finished_s", "first_token_s", "outcome", "replica", "started_s", "token_s")

    def __init__(self, client_id: str, arrived_s: float) -> None:
        self.client_id = client_id
        self.arrived_s = arrived_s
        self.started_s: float | None = None
        self.first_token_s: float | None = None
        self.finished_s: float | None = None
        self.replica: str | None = None
        self.outcome = "running"
        self.token_s: list[float] = []


class Sample(NamedTuple):
    """One reading: TELEMETRY_COLUMNS in order. None is a reading that was not to be had, never zero."""

    time_s: float
    source: str
    gpu: str
    slice: str | None
    gpu_utilization: float | None = None
    memory_used_bytes: float | None = None
    memory_total_bytes: float | None = None
    power_w: float | None = None
    energy_j: float | None = None
    memory_utilization: float | None = None
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    temperature_c: float | None = None
    throttle_reasons: str | None = None
    pcie_rx_bytes_per_s: float | None = None
    pcie_tx_bytes_per_s: float | None = None
    processes: int | None = None


class ServerRows(NamedTuple):
    """What a server, or a simulation, knows of a run: its times count from the run's start."""

    served: pd.DataFrame
    batches: pd.DataFrame
    telemetry: pd.DataFrame
    decisions: tuple[bytes, ...]


class Tables(NamedTuple):
    """The three tables of a run."""

    requests: pd.DataFrame
    batches: pd.DataFrame
    telemetry: pd.DataFrame


class Recorder:
    """Rows of one run. `keep_tokens` keeps each token's time (a simulation has no client to see them);
    `keep_decisions` keeps the log that a core can be replayed from."""

    def __init__(self, deployment: Deployment, *, keep_tokens: bool = False, keep_decisions: bool = True) -> None:
        self._slices = {r.id: (r.model, r.slice.id) for r in deployment.every_replica()}
        self._keep_tokens = keep_tokens
        self._keep_decisions = keep_decisions
        self._encoder = msgspec.json.Encoder()
        self._open: dict[str, tuple[RunStep, float]] = {}
        self._batches: list[tuple[Any, ...]] = []
        self._answers: list[Answer] = []
        self._samples: list[Sample] = []
        self.served: dict[int, Served] = {}
        self.decisions: list[bytes] = []

    def decided(self, event: Event, actions: list[Action], *, now_s: float) -> None:
        """An event was handled at `now_s` and these actions came of it."""
        if self._keep_decisions:
            self.decisions.append(self._encoder.encode(Decision(now_s, event, actions)))
        kind = type(event)
        if kind is StepDone or kind is StepFailed:
            self._step_over(event, now_s)  # type: ignore[arg-type]
        elif kind is Arrive:
            self.served[event.request_id] = Served(event.client_id, now_s)  # type: ignore[union-attr]
        elif kind is Cancel and event.request_id in self.served:  # type: ignore[union-attr]
            self._ended(event.request_id, "cancelled", now_s)  # type: ignore[union-attr]
        for action in actions:
            match action:
                case RunStep():
                    self._step_begun(action, now_s)
                case Complete(request_id=request_id):
                    self._ended(request_id, "completed", now_s)
                case Reject(request_id=request_id, reason=reason):
                    self._ended(request_id, reason, now_s)
                case Fail(request_id=request_id, reason=reason):
                    self._ended(request_id, reason, now_s)

    def answered(self, answer: Answer) -> None:
        """A client has all it will get of this request."""
        self._answers.append(answer)

    def sampled(self, samples: Iterable[Sample]) -> None:
        """Telemetry was read."""
        self._samples.extend(samples)

    def server_rows(self, *, start_s: float = 0.0) -> ServerRows:
        """All that was decided and sampled, its times counted from `start_s`."""
        served = [(s.client_id, s.replica, s.arrived_s, s.started_s, s.finished_s) for s in self.served.values()]
        return ServerRows(
            frame(served, SERVED_COLUMNS, start_s),
            frame(self._batches, BATCH_COLUMNS, start_s),
            frame(self._samples, TELEMETRY_COLUMNS, start_s),
            tuple(self.decisions),
        )

    def tables(self) -> Tables:
        """The tables of a run whose answers and decisions were taken down here, on one clock that began at 0."""
        return assemble(self._answers, self.server_rows())

    # --- the driver's side ----------------------------------------------------------------------------------------

    def _step_begun(self, step: RunStep, now_s: float) -> None:
        self._open[step.replica_id] = (step, now_s)
        for prefill in step.prefills:
            served = self.served[prefill.request_id]
            if served.started_s is None:
                served.started_s = now_s
            served.replica = step.replica_id

    def _step_over(self, event: StepDone | StepFailed, now_s: float) -> None:
        step, started_s = self._open.get(event.replica_id, (None, 0.0))
        if step is None or step.step_id != event.step_id:
            return  # a late word of a step that was lost with its replica
        del self._open[event.replica_id]
        failed = type(event) is StepFailed
        load = step.load
        model, part = self._slices[place_of(step.replica_id)]
        batch_size = len(step.prefills) + len(step.decodes)
        self._batches.append(
            (
                step.step_id,
                model,
                step.replica_id,
                part,
                started_s,
                now_s,
                batch_size,
                load.prefill_tokens,
                load.attended_pairs,
                load.decodes,
                load.context_tokens,
                load.samples,
                step.waiting,
                failed,
                None if failed or event.late_s is None else event.late_s * 1e3,  # type: ignore[union-attr]
            )
        )
        if failed:
            return
        if self._keep_tokens:
            for request_id in step.answered():
                self.served[request_id].token_s.append(now_s)
        for prefill in step.prefills:
            served = self.served[prefill.request_id]
            if prefill.last and served.first_token_s is None:  # one that gave way is read again
                served.first_token_s = now_s

    def _ended(self, request_id: int, outcome: str, now_s: float) -> None:
        served = self.served.get(request_id)
        if served is None:
            return  # refused at the door: nothing of it was read
        served.finished_s = now_s
        served.outcome = outcome


def assemble(answers: Sequence[Answer], server: ServerRows | None) -> Tables:
    """The tables of a run: what clients saw, joined by request id with what the server told, if it told anything."""
    told = server.served if server is not None else frame((), SERVED_COLUMNS)
    view = {client_id: rest for client_id, *rest in told.itertuples(index=False)}
    unknown = (None,) * len(SERVER_VIEW)
    requests = [(*msgspec.structs.astuple(a), *view.get(str(a.request_id), unknown)) for a in answers]
    return Tables(
        frame(requests, REQUEST_COLUMNS),
        server.batches if server is not None else frame((), BATCH_COLUMNS),
        server.telemetry if server is not None else frame((), TELEMETRY_COLUMNS),
    )


def frame(rows: Sequence[tuple[Any, ...]], columns: dict[str, str], start_s: float = 0.0) -> pd.DataFrame:
    """Rows as a table with exactly these columns and types; columns of seconds are counted from `start_s`."""
    import pandas as pd

    names = list(columns)
    data = dict(zip(names, zip(*rows, strict=True), strict=True)) if rows else dict.fromkeys(names, ())
    kinds = {"int64": "Int64", "float64": "float64", "bool": "bool", "string": "object", "list": "object"}
    table = pd.DataFrame({name: pd.Series(list(data[name]), dtype=kinds[columns[name]]) for name in names})
    return shifted(table, start_s)


def shifted(table: pd.DataFrame, start_s: float) -> pd.DataFrame:
    """The table with every column of seconds (`*_s`, but for rates, `*_per_s`) counted from `start_s`."""
    if start_s:
        for name in table.columns:
            if name.endswith("_s") and not name.endswith("_per_s"):
                table[name] = table[name] - start_s
    return table
