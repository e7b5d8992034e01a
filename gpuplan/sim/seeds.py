"""One scenario on several seeds: a whole run of the first, the main figures of each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from gpuplan.record import intervals, summary
from gpuplan.record.intervals import SeedFigures
from gpuplan.record.run import Run
from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.deployment import resolve
from gpuplan.scenario.schedule import Schedule
from gpuplan.sim.candidate import Candidate, Outcome
from gpuplan.sim.loop import Observer
from gpuplan.sim.many import Workers
from gpuplan.sim.service_times import ServiceTimes
from gpuplan.sim.simulator import simulate

ROWS_MAX = 100_000
"""Requests of a run whose rows are kept: a gigabyte of memory, and some seconds. A longer run keeps only what its
figures need."""


def simulate_seeds(
    scenario: Scenario,
    schedule: Schedule,
    service_times: ServiceTimes,
    *,
    seeds: int = 1,
    rate_scale: float = 1.0,
    speed: float = 1.0,
    workers: int | None = None,
    ray: str | None = None,
    watching: Sequence[Observer] = (),
    on_seed: Callable[[int], None] = lambda _: None,
) -> tuple[Run, list[SeedFigures]]:
    """The run of the scenario's own seed, whose schedule this is, and the main figures of that and the `seeds - 1` next
    ones; none where there is one seed. The others are simulated meanwhile, in processes or on a Ray cluster. `watching`
    observes the run, `on_seed` hears how many of the others are done.
    """
    rows = len(schedule.requests) <= ROWS_MAX or any("itl_ms" in c.slo for c in scenario.traffic)
    candidates = [
        Candidate(
            f"seed {seed}", msgspec.structs.replace(scenario, seed=seed), seed, rate_scale=rate_scale, speed=speed
        )
        for seed in range(scenario.seed + 1, scenario.seed + seeds)
    ]
    done: list[Outcome] = []
    lock = threading.Lock()

    def told(outcome: Outcome) -> None:
        with lock:
            done.append(outcome)
            on_seed(len(done))

    with Workers(min(workers, seeds) if workers else None, ray=ray) as hands, ThreadPoolExecutor(1) as aside:
        others = aside.submit(
            hands.each, lambda c: hands.simulate(c, service_times), candidates if hands.count > 1 else [], on_done=told
        )
        try:
            run = simulate(
                scenario,
                resolve(scenario),
                schedule,
                service_times,
                seed=scenario.seed,
                keep_decisions=rows,
                keep_telemetry=rows,
                keep_rows=rows,
                rate_scale=rate_scale,
                speed=speed,
                watching=watching,
            )
            outcomes = others.result()
        except BaseException:
            hands.close()
            raise
        if hands.count == 1:
            outcomes = hands.each(lambda c: hands.simulate(c, service_times), candidates, on_done=told)
    if not rows:
        run.meta.notes.append(
            f"{len(schedule.requests):,} requests: no rows were kept, and no inter-token latencies; figures are of all"
        )
    if seeds == 1:
        return run, []
    summaries = [summary.summarize(run), *(o.summary for o in outcomes)]
    return run, [
        intervals.main_figures(scenario.seed + i, figures) for i, figures in enumerate(summaries) if figures is not None
    ]
