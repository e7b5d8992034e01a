"""What goes wrong on one replica in the course of one run.

A `Script` is asked by whoever runs the replica's steps, live or simulated, so that both mean the same by a scenario's
`faults`. It knows no clock: times come in, as seconds since the first request arrived.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Collection, Iterable
from typing import NamedTuple

from gpuplan.scenario.demand import CrashFault, FaultKind, HangFault, NanFault, OutOfMemoryFault, SlowFault
from gpuplan.scenario.faults import NEVER, Fault

NAN_OUTPUT = "nan_output"
"""The reason of an answer that is not a number."""
CRASHED = "an injected crash"
"""The reason of a replica that a fault has taken."""


def never_back(replica_id: str) -> str:
    """The reason of a replica that cannot be loaded again."""
    return f"{CRASHED}: {replica_id} does not come back"


class Script:
    """What goes wrong on one replica in one run. Where two of a kind overlap, the worse holds. It keeps which hangs
    have come, and the dice of the answers that are not numbers."""

    def __init__(self, replica_id: str, faults: Iterable[Fault]) -> None:
        mine = sorted((f for f in faults if f.replica_id == replica_id), key=lambda f: f.at_s)
        self.faults = tuple(mine)
        self.crashes_s = [f.at_s for f in mine if isinstance(f.kind, CrashFault)]
        self._hangs = deque(_Hang(f.at_s, f.kind.back_after) for f in mine if isinstance(f.kind, HangFault))
        self._hung_until_s = float("-inf")
        seed = mine[0].seed if mine else 0
        self._dice = random.Random(f"{seed}/faults/{replica_id}")  # noqa: S311 - not for secrets

    def hang(self, now_s: float) -> float | None:
        """Whether the step that begins now is one that hangs: then, after how long the replica may be back. Each hang
        is told once."""
        if self._hangs and self._hangs[0].at_s <= now_s:
            return self._hangs.popleft().back_after_s
        return None

    def slow_factor(self, now_s: float) -> float:
        """How many times as long the step takes that begins now."""
        return max((k.factor for k in self._holding(now_s) if isinstance(k, SlowFault)), default=1.0)

    def out_of_memory(self, carried: int, now_s: float) -> bool:
        """Whether there is no memory for a step that begins now and carries so many requests."""
        return any(isinstance(k, OutOfMemoryFault) and carried > k.above_batch for k in self._holding(now_s))

    def not_numbers(self, request_ids: Collection[int], now_s: float) -> tuple[int, ...]:
        """Which of these requests, whose first token or one answer the step gives that begins now, get none."""
        share = max((k.share for k in self._holding(now_s) if isinstance(k, NanFault)), default=0.0)
        return tuple(i for i in request_ids if self._dice.random() < share) if share else ()

    def lost_to_hang(self, now_s: float, back_after_s: float) -> None:
        """A hang was noticed now, and the replica is lost."""
        self._hung_until_s = now_s + back_after_s

    def back_s(self, now_s: float) -> float:
        """From now on, when the replica may be loaded: now where it is not down, infinity where it never comes back. A
        crash of one that is down counts too."""
        back_s = max(now_s, self._hung_until_s)
        for fault in self.faults:
            if isinstance(fault.kind, CrashFault):
                after_s = NEVER if fault.kind.back_after is None else fault.kind.back_after
                if fault.at_s <= back_s < fault.at_s + after_s:
                    back_s = fault.at_s + after_s
        return back_s

    def notes(self, now_s: float) -> list[str]:
        """What has been injected until now."""
        return [fault.told() for fault in self.faults if fault.at_s <= now_s]

    def _holding(self, now_s: float) -> list[FaultKind]:
        return [fault.kind for fault in self.faults if fault.at_s <= now_s < fault.until_s]


class _Hang(NamedTuple):
    at_s: float
    back_after_s: float
