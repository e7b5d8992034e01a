"""What a summary needs of a simulation, and no more: of each request its times and its end, 33 bytes, and of steps how
many there were of each size."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gpuplan.policy.vocabulary import (
    Action,
    Arrive,
    Cancel,
    Complete,
    Event,
    Fail,
    Reject,
    RunStep,
    StepDone,
    StepFailed,
)
from gpuplan.record.counts import StepCounts
from gpuplan.record.recorder import Tables, frame
from gpuplan.record.run import BATCH_COLUMNS, TELEMETRY_COLUMNS
from gpuplan.scenario.deployment import Deployment
from gpuplan.scenario.schedule import Columns
from gpuplan.sim.answers import status_of

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

NAN = float("nan")


class Tally:
    """Takes down the decisions about these requests. Steps that began before `since_s` do not count."""

    def __init__(self, deployment: Deployment, requests: Columns, *, since_s: float) -> None:
        self._requests, self._since_s = requests, since_s
        self._arrived_s, self._started_s, self._first_token_s, self._finished_s = (
            array("d", [NAN]) * len(requests) for _ in range(4)
        )
        self._outcome = array("B", [0]) * len(requests)
        self._outcomes = {"running": 0, "completed": 1, "cancelled": 2}  # and the reasons that come
        self._open: dict[str, tuple[RunStep, float]] = {}
        self.steps = {model: StepCounts() for model in deployment.models}
        self._steps = {r.id: self.steps[r.model] for r in deployment.every_replica()}

    def first_token_s(self, request_id: int) -> float:
        """When the request had its first token (or its one answer); not a number until then."""
        return self._first_token_s[request_id]

    def decided(self, event: Event, actions: list[Action], *, now_s: float) -> None:
        """An event was handled at `now_s` and these actions came of it."""
        kind = type(event)
        if kind is StepDone:
            self._step_over(event.replica_id, event.step_id, event.steps, now_s)  # type: ignore[union-attr]
        elif kind is Arrive:
            self._arrived_s[event.request_id] = now_s  # type: ignore[union-attr]
        elif kind is StepFailed:
            self._open.pop(event.replica_id, None)  # type: ignore[union-attr]
        elif kind is Cancel:
            self._ended(event.request_id, "cancelled", now_s)  # type: ignore[union-attr]
        for action in actions:
            kind_of_action = type(action)
            if kind_of_action is RunStep:
                self._step_begun(action, now_s)  # type: ignore[arg-type]
            elif kind_of_action is Complete:
                self._ended(action.request_id, "completed", now_s)  # type: ignore[union-attr]
            elif kind_of_action is Reject or kind_of_action is Fail:
                self._ended(action.request_id, action.reason, now_s)  # type: ignore[union-attr]

    def _step_begun(self, step: RunStep, now_s: float) -> None:
        self._open[step.replica_id] = (step, now_s)
        started_s = self._started_s
        for prefill in step.prefills:
            request_id = prefill.request_id
            before_s = started_s[request_id]
            if before_s != before_s:  # not a number yet
                started_s[request_id] = now_s

    def _step_over(self, replica_id: str, step_id: int, steps: int, now_s: float) -> None:
        step, began_s = self._open.pop(replica_id)
        first_token_s = self._first_token_s
        for prefill in step.prefills:
            if prefill.last and first_token_s[prefill.request_id] != first_token_s[prefill.request_id]:  # none yet
                first_token_s[prefill.request_id] = now_s
        if began_s >= self._since_s:
            self._steps[replica_id].add(len(step.prefills) + len(step.decodes), steps, now_s - began_s)

    def _ended(self, request_id: int, outcome: str, now_s: float) -> None:
        self._finished_s[request_id] = now_s
        self._outcome[request_id] = self._outcomes.setdefault(outcome, len(self._outcomes))

    def tables(self, downlinks_s: Sequence[float], warmup_s: float) -> Tables:
        """The requests as clients saw them; no steps, no telemetry."""
        import numpy as np
        import pandas as pd

        asked, kinds = self._requests, self._requests.kinds
        scheduled_s, output_tokens = np.asarray(asked.scheduled_s), np.asarray(asked.output_tokens)
        kind, outcome = np.asarray(asked.kind, dtype=np.intp), np.asarray(self._outcome, dtype=np.intp)
        ways_s = np.asarray(downlinks_s)
        ends = [status_of(name) for name in self._outcomes]
        streams = output_tokens > 0
        finished_s = np.asarray(self._finished_s)
        told = {
            "traffic_class": _named([name for name, _ in kinds], kind),
            "model": _named([model for _, model in kinds], kind),
            "warmup": scheduled_s < warmup_s,
            "scheduled_s": scheduled_s,
            "sent_s": scheduled_s,
            "first_token_s": np.where(streams, np.asarray(self._first_token_s) + ways_s, NAN),
            "done_s": finished_s + ways_s,
            "tokens": output_tokens,
            "merged_tokens": np.zeros(len(asked), dtype=np.int32),
            "status": _named([status for status, _ in ends], outcome),
            "error": _named([error for _, error in ends], outcome),
            "arrived_s": np.asarray(self._arrived_s),
            "started_s": np.asarray(self._started_s),
            "finished_s": finished_s,
        }
        return Tables(pd.DataFrame(told, copy=False), frame((), BATCH_COLUMNS), frame((), TELEMETRY_COLUMNS))


def _named(names: Sequence[str | None], codes: NDArray[np.intp]) -> pd.Categorical[str]:
    """The names that the codes count from 0; several may be one, and None is a null."""
    import numpy as np
    import pandas as pd

    distinct = sorted({name for name in names if name is not None})
    to = np.array([distinct.index(name) if name is not None else -1 for name in names], dtype=np.int8)
    return pd.Categorical.from_codes(to[codes], categories=pd.Index(distinct, dtype=object))
