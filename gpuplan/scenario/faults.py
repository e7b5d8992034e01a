"""Faults that a scenario asks for: what goes wrong where, and when.

`resolve` turns the file's `faults` into one `Fault` for each replica that suffers it. `serve.faults` injects them into
a live server, `sim.faults` into a simulation; both ask a `script.Script`. Times are seconds since the first request
arrived: the one moment that a server and a simulation both know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gpuplan.errors import InputError
from gpuplan.scenario.demand import (
    CrashFault,
    FaultKind,
    FaultSpec,
    HangFault,
    NanFault,
    OutOfMemoryFault,
    SlowFault,
)

KINDS = ("crash", "hang", "slow", "nan", "out_of_memory")
"""What may go wrong, of which a fault is exactly one."""
NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class Fault:
    """`kind` goes wrong on the replica from `at_s` until `until_s`. `seed` is the scenario's."""

    replica_id: str
    at_s: float
    until_s: float
    kind: FaultKind
    seed: int = 0

    def told(self) -> str:
        """What a reader of the measurements must know."""
        span = "to the end" if self.until_s == NEVER else f"for {self.until_s - self.at_s:g} s"
        match self.kind:
            case CrashFault(back_after=None):
                what = "crash, never back"
            case CrashFault(back_after=back_after):
                what = f"crash, back after {back_after:g} s"
            case HangFault(back_after=back_after):
                what = "the next step hangs" + (f", back {back_after:g} s after it is noticed" if back_after else "")
            case SlowFault(factor=factor):
                what = f"steps take {factor:g} times as long, {span}"
            case NanFault(share=share):
                what = f"{share * 100:g} % of the answers are not numbers, {span}"
            case OutOfMemoryFault(above_batch=above_batch):
                what = f"no memory for steps of more than {above_batch}, {span}"
        return f"injected at {self.at_s:g} s: {what}"


def resolve(specs: Sequence[FaultSpec], replicas: Mapping[str, Sequence[str]], *, seed: int = 0) -> tuple[Fault, ...]:
    """A Fault for each replica that suffers one, in file order. `replicas` are the ids of each model's. Raises
    InputError for a replica or model that is not there."""
    known = [replica_id for ids in replicas.values() for replica_id in ids]
    found: list[Fault] = []
    for i, spec in enumerate(specs):
        if spec.replica is not None and spec.replica not in known:
            raise InputError(
                "no such replica", key=f"faults[{i}].replica", value=spec.replica, allowed=", ".join(known)
            )
        if spec.model is not None and not replicas.get(spec.model):
            served = ", ".join(model for model, ids in replicas.items() if ids)
            raise InputError("no replica serves it", key=f"faults[{i}].model", value=spec.model, allowed=served)
        hit = [spec.replica] if spec.replica is not None else replicas[spec.model or ""]
        kind = next(kind for name in KINDS if (kind := getattr(spec, name)) is not None)
        until_s = NEVER if spec.lasting is None else spec.at + spec.lasting
        found += [Fault(replica_id, spec.at, until_s, kind, seed) for replica_id in hit]
    return tuple(found)
