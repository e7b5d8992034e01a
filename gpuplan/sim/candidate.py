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
from gpuplan.scenario.schedule import Schedule, build_schedule
from gpuplan.sim.early_stop import BeyondDoubt, EarlyStop, Stopped
from gpuplan.sim.service_times import ServiceTimes
from gpuplan.sim.simulator import simulate


class Candidate(msgspec.Struct, frozen=True):
    """A deployment to be tried: `scenario.deployment`. Without a `schedule` the scenario's own is built where it is
    simulated, with its rates multiplied by `rate_scale` and its traces replayed `speed` times as fast. With
    `early_stop` a simulation ends as soon as an SLO can no longer be met."""

    name: str
    scenario: Scenario
    seed: int
    schedule: Schedule | None = None
    rate_scale: float = 1.0
    speed: float = 1.0
    early_stop: bool = False
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
    """All that one simulation needs."""

    candidate: Candidate
    service_times: ServiceTimes


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
    stop = EarlyStop(scenario, schedule, downlink_s=min(service_times.downlink_s)) if candidate.early_stop else None
    try:
        run = simulate(
            scenario,
            resolve(scenario),
            schedule,
            service_times,
            seed=candidate.seed,
            keep_telemetry=candidate.telemetry,
            watch=stop.seen if stop else None,
        )
    except BeyondDoubt as end:
        return Outcome(candidate.name, candidate.seed, None, end.stopped)
    return Outcome(candidate.name, candidate.seed, summary.summarize(run))


def encode(candidate: Candidate, service_times: ServiceTimes) -> bytes:
    """The work as msgpack."""
    return _ENCODER.encode(Work(candidate, service_times))


def answer(work: bytes) -> bytes:
    """`simulate_one` for another process or machine: from `encode`, for `outcome`. Raises nothing."""
    try:
        asked = _WORK.decode(work)
        return _ENCODER.encode(simulate_one(asked.candidate, asked.service_times))
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
