"""Many simulations at once, on all cores of this machine or on a Ray cluster, with the same results as one by one.

`simulate_many` is for a list of candidates that is known beforehand. A search that chooses the next one by the last
keeps `Workers` open and asks them, from as many threads as it likes. Which worker simulates what changes no figure.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

from gpuplan.sim import candidate as one
from gpuplan.sim.candidate import Candidate, Outcome
from gpuplan.sim.processes import Processes
from gpuplan.sim.service_times import ServiceTimes

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
Item = TypeVar("Item")
Result = TypeVar("Result")


def simulate_many(
    candidates: Iterable[Candidate],
    service_times: ServiceTimes,
    *,
    workers: int | None = None,
    ray: str | None = None,
    on_done: Callable[[Outcome], None] = lambda _: None,
) -> list[Outcome]:
    """The outcome of each candidate, in order. `workers` is how many are simulated at once (left out: one on each core;
    1: in this process), `ray` a cluster's address to simulate them there. `on_done` hears of each when it is done.

    Candidates are taken one by one as workers come free. Raises RunError (or InputError) naming the first candidate
    that failed, and ends the others; so does Ctrl-C.
    """
    with Workers(workers, ray=ray) as hands:

        def simulated(candidate: Candidate) -> Outcome:
            return hands.simulate(candidate, service_times)

        return hands.each(simulated, candidates, on_done=on_done)


class _Line(Protocol):
    """Who does the work, elsewhere."""

    count: int

    def ask(self, name: str, work: bytes) -> bytes: ...

    def close(self) -> None: ...


class Workers:
    """Simulates candidates: in this process where there is one worker, otherwise in processes or on a Ray cluster.

    A context manager: at its end, and when anything is raised in it, all that still runs is ended.
    """

    def __init__(self, count: int | None = None, *, ray: str | None = None) -> None:
        count = count or cores()
        self._line: _Line | None = None
        if ray is not None:
            from gpuplan.sim.on_ray import Ray

            self._line = Ray(ray)
        elif count > 1:
            self._line = Processes(count)
        self.count = self._line.count if self._line else 1

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def warm(self) -> None:
        """Gets workers ready while there is something else to do."""
        if isinstance(self._line, Processes):
            self._line.warm()

    def close(self) -> None:
        """Ends what still runs; nothing can be simulated afterwards."""
        if self._line is not None:
            self._line.close()

    def simulate(self, candidate: Candidate, service_times: ServiceTimes) -> Outcome:
        """The candidate's outcome; waits for a worker, and for it."""
        if self._line is None:
            return one.simulate_one(candidate, service_times)
        return one.outcome(candidate.name, self._line.ask(candidate.name, one.encode(candidate, service_times)))

    def each(
        self,
        function: Callable[[Item], Result],
        items: Iterable[Item],
        *,
        on_done: Callable[[Result], None] = lambda _: None,
    ) -> list[Result]:
        """`function` of each item, in order of the items, in as many threads as there are workers: for functions that
        wait for simulations most of the time. What one raises ends all of them."""
        if self._line is None:
            return [_told(function(item), on_done) for item in items]
        results: dict[int, Result] = {}
        running: dict[Future[Result], int] = {}
        pool = ThreadPoolExecutor(self.count, thread_name_prefix="simulate")
        try:
            for place, item in enumerate(items):
                running[pool.submit(function, item)] = place
                if len(running) > self.count:  # one more than can run: no worker waits for the next item to be made
                    self._collect(running, results, on_done)
            while running:
                self._collect(running, results, on_done)
        except BaseException:
            self.close()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return [results[place] for place in sorted(results)]

    @staticmethod
    def _collect(
        running: dict[Future[Result], int], results: dict[int, Result], on_done: Callable[[Result], None]
    ) -> None:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            results[running.pop(future)] = _told(future.result(), on_done)


def cores() -> int:
    """How many of this machine's cores this process may use, by its affinity and by its container's limit."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(CPU_MAX)
    return max(min(count, math.ceil(quota)) if math.isfinite(quota) else count, 1)


def _quota(path: Path) -> float:
    """The CPUs that a control group allows (version 2: microseconds of each period); infinity where none is told."""
    try:
        quota, period = path.read_text(encoding="ascii").split()
        return float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):  # another system, or "max"
        return math.inf


def _told(result: Result, on_done: Callable[[Result], None]) -> Result:
    on_done(result)
    return result
