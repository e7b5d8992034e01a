"""One simulation of many: what is asked for, and what became of it, as values that a process can be sent.

A `Candidate` is a scenario whose `deployment` is the one to be tried, with a seed. Candidates of one scenario and seed
meet common random numbers: the same requests of the same lengths at the same times, the same ways there and back, and
in each replica of the same name the same sequence of draws from the spread of its step times. (A deployment that runs
other steps gives those draws to other steps: there is nothing that two such steps have in common.) So the difference
between two candidates is far less noisy than either of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from gpuplan.errors import GpuplanError, InputError, RunError
from gpuplan.record import summary
from gpuplan.record.summary import Summary
from gpuplan.scenario.demand import DeploymentSpec, Scenario
from gpuplan.scenario.deployment import resolve
from gpuplan.scenario.schedule import Columns, Schedule, Spans, build_schedule
from gpuplan.sim.early_stop import BeyondDoubt, Stopped
from gpuplan.sim.service_times import ServiceTimes
from gpuplan.sim.simulator import simulate


class Candidate(msgspec.Struct, frozen=True):
    """A deployment to be tried: `scenario.deployment`. Without a `schedule` the scenario's own is built where it is
    simulated, with its rates multiplied by `rate_scale` and its traces replayed `speed` times as fast. With
    `early_stop` a simulation ends as soon as an SLO can no longer be met. Without `rows` there are no inter-token
    latencies; where an SLO is on them, rows are kept whatever is asked."""

    name: str
    scenario: Scenario
    seed: int
    schedule: Schedule | None = None
    rate_scale: float = 1.0
    speed: float = 1.0
    early_stop: bool = False
    rows: bool = False
    telemetry: bool = False


class Outcome(msgspec.Struct, frozen=True, tag=True):
    """What became of a candidate: its summary, or, of one that was stopped, why."""

    name: str
    seed: int
    summary: Summary | None
    stopped: Stopped | None = None

    @property
    def meets_slos(self) -> bool:
        return self.summary is not None and bool(self.summary["meets_slos"])


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A simulation that ended in an error: its exit code (None for an error that nobody foresaw) and its text."""

    exit_code: int | None
    message: str


class Work(msgspec.Struct, frozen=True):
    """All that one simulation needs; the schedule as the bytes of its columns."""

    candidate: Candidate
    service_times: ServiceTimes
    schedule: ScheduleBytes | None


class ScheduleBytes(msgspec.Struct, frozen=True):
    """A schedule's columns, as this machine's floats and integers."""

    kinds: tuple[tuple[str, str], ...]
    scheduled_s: bytes
    kind: bytes
    prompt_tokens: bytes
    output_tokens: bytes
    abandon_s: dict[int, float]
    spans: dict[int, Spans]
    duration_s: float
    clipped: int

    @classmethod
    def of(cls, schedule: Schedule) -> ScheduleBytes:
        columns = Columns.of(schedule.requests)
        arrays = {name: getattr(columns, name).tobytes() for name in _ARRAYS}
        return cls(
            columns.kinds,
            **arrays,
            abandon_s=columns.abandon_s,
            spans=columns.spans,
            duration_s=schedule.duration_s,
            clipped=schedule.clipped,
        )

    def schedule(self) -> Schedule:
        columns = Columns(self.kinds)
        for name in _ARRAYS:
            getattr(columns, name).frombytes(getattr(self, name))
        columns.abandon_s.update(self.abandon_s)
        columns.spans.update(self.spans)
        return Schedule(columns, self.duration_s, self.clipped)


_ARRAYS = ("scheduled_s", "kind", "prompt_tokens", "output_tokens")


def crossed(
    scenario: Scenario, deployments: Mapping[str, DeploymentSpec], seeds: Iterable[int], *, early_stop: bool = False
) -> Iterator[Candidate]:
    """Every deployment on every seed, all deployments of one seed with common random numbers."""
    seeds = list(seeds)
    for name, spec in deployments.items():
        for seed in seeds:
            asked = msgspec.structs.replace(scenario, deployment=spec, seed=seed)
            yield Candidate(f"{name}, seed {seed}", asked, seed, early_stop=early_stop)


def simulate_one(candidate: Candidate, service_times: ServiceTimes) -> Outcome:
    """Simulates a candidate here and now. Raises what `resolve` and `simulate` raise."""
    scenario = candidate.scenario
    schedule = candidate.schedule or build_schedule(scenario, rate_scale=candidate.rate_scale, speed=candidate.speed)
    between_tokens = any("itl_ms" in c.slo for c in scenario.traffic)
    try:
        run = simulate(
            scenario,
            resolve(scenario),
            schedule,
            service_times,
            seed=candidate.seed,
            keep_rows=candidate.rows or candidate.telemetry or between_tokens,
            keep_telemetry=candidate.telemetry,
            early_stop=candidate.early_stop,
        )
    except BeyondDoubt as end:
        return Outcome(candidate.name, candidate.seed, None, end.stopped)
    return Outcome(candidate.name, candidate.seed, summary.summarize(run))


def encode(candidate: Candidate, service_times: ServiceTimes) -> bytes:
    """The work as msgpack."""
    schedule = ScheduleBytes.of(candidate.schedule) if candidate.schedule is not None else None
    return _ENCODER.encode(Work(msgspec.structs.replace(candidate, schedule=None), service_times, schedule))


def answer(work: bytes) -> bytes:
    """`simulate_one` for another process or machine: from `encode`, for `outcome`. Raises nothing."""
    try:
        asked = _WORK.decode(work)
        schedule = asked.schedule.schedule() if asked.schedule is not None else None
        candidate = msgspec.structs.replace(asked.candidate, schedule=schedule)
        return _ENCODER.encode(simulate_one(candidate, asked.service_times))
    except GpuplanError as error:
        return _ENCODER.encode(Failed(error.exit_code, str(error)))
    except Exception as error:
        return _ENCODER.encode(Failed(None, f"{type(error).__name__}: {error}"))


def outcome(name: str, answered: bytes) -> Outcome:
    """What `answer` gave. Raises RunError, or InputError, naming the candidate, where that was an error."""
    told = _ANSWER.decode(answered)
    if isinstance(told, Outcome):
        return told
    if told.exit_code == InputError.exit_code:
        raise InputError(f"{name}: {told.message}")
    raise RunError(f"{name}: {told.message}")


def _plain(value: object) -> object:
    """A NumPy number as Python's."""
    item = getattr(value, "item", None)
    if item is None:
        raise NotImplementedError(f"cannot encode a {type(value).__name__}")
    return item()


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_plain)
_WORK = msgspec.msgpack.Decoder(Work)
_ANSWER = msgspec.msgpack.Decoder(Outcome | Failed)
