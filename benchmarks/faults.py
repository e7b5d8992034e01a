"""What a fault costs, and how soon service is back: every fault in a simulated service of four replicas.

The service is a decoder (phi-2) on four 1g.10gb slices of an A100-80GB; a request counts as good when it is answered
within its deadline and its SLOs. They come for a minute, at a rate that the service bears easily. The fault comes after
20 s and goes after 20 more. Goodput is given before, meanwhile and after, with what was lost and how many seconds after
the fault's begin every window of 4 s has at least seven tenths of the goodput of before again (the arrivals' own noise
is near that).

    python benchmarks/faults.py [--seed 1]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from gpuplan.record.run import Run
from gpuplan.scenario import deployment, files
from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.schedule import Schedule, ScheduledRequest, build_schedule
from gpuplan.sim.service_times import ServiceTimes
from gpuplan.sim.simulator import simulate

RATE, FLOOD = 10.0, 10.0
BEGIN_S, END_S, DURATION_S = 20.0, 40.0, 60.0
WINDOW_S = 2.0
DEADLINE_MS, TPOT_MS = 6000.0, 60.0
FAULTS: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "one replica crashes, back after 20 s": [{"replica": "chat-0", "crash": {"back_after": 20.0}}],
    "one becomes 5 x slower": [{"replica": "chat-0", "for": 20.0, "slow": {"factor": 5.0}}],
    "one gives no numbers": [{"replica": "chat-0", "for": 20.0, "nan": {"share": 1.0}}],
    "one has no memory above batch 8": [{"replica": "chat-0", "for": 20.0, "out_of_memory": {"above_batch": 8}}],
    "one hangs": [{"replica": "chat-0", "hang": {}}],
    "all are gone for 20 s": [{"model": "chat", "crash": {"back_after": 20.0}}],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=1)
    seed = parser.parse_args().seed
    print(f"{'goodput, requests/s':38} {'before':>7} {'during':>7} {'after':>7} {'back s':>7}  lost")
    for name, told in FAULTS.items():
        scenario = service(seed, [{"at": BEGIN_S, **fault} for fault in told])
        row(name, run(scenario, build_schedule(scenario)))
    leaving = service(seed, [], abandon={"share": 0.5, "after": 1.0})
    row("half of the clients hang up after 1 s", run(leaving, build_schedule(leaving)))
    capacity = max(
        (goodput(run(service(seed, []), flooded(seed, factor, factor)), BEGIN_S, END_S), factor)
        for factor in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    )
    flood = run(service(seed, []), flooded(seed, capacity[1] * FLOOD, 1.0))
    row(f"a flood of {FLOOD:g} x what it bears", flood)
    during = goodput(flood, BEGIN_S + WINDOW_S, END_S)
    print(f"  the most it bears is {capacity[0]:.1f} good requests/s at {capacity[1] * RATE:g} asked for")
    print(f"  in the flood it gives {during:.1f}: {during / capacity[0]:.0%} of that")


def service(seed: int, faults: list[dict[str, Any]], **traffic: Any) -> Scenario:
    chat = {
        "name": "chat",
        "model": "chat",
        "arrivals": {"process": "poisson", "rate": RATE},
        "prompt_tokens": {"lognormal": {"p50": 100, "p95": 300}},
        "output_tokens": {"uniform": {"min": 40, "max": 80}},
        "slo": {"e2el_ms": {"p95": DEADLINE_MS}, "tpot_ms": {"p95": TPOT_MS}},
        **traffic,
    }
    told = {
        "name": "faults",
        "seed": seed,
        "duration": DURATION_S,
        "models": {"chat": {"emulate": "phi-2"}},
        "traffic": [chat],
        "deployment": {
            "gpu": "a100-80gb",
            "mig": ["1g.10gb"] * 4,
            "replicas": [{"model": "chat", "slice": "1g.10gb", "count": 4}],
            "batching": {"chat": {"max_batch_size": 32, "step_timeout": 1.0}},
            "admission": {"classes": {"chat": {"deadline": DEADLINE_MS / 1e3}}},
        },
        "faults": faults,
    }
    scenario = files.build(told, Scenario)
    files.check(scenario)
    return scenario


def flooded(seed: int, during: float, otherwise: float) -> Schedule:
    """The service's requests at `during` times the rate from BEGIN_S to END_S, and at `otherwise` times before and
    after."""
    parts = []
    for factor, begin_s, end_s in ((otherwise, 0.0, BEGIN_S), (during, BEGIN_S, END_S), (otherwise, END_S, DURATION_S)):
        drawn = build_schedule(service(seed, []), rate_scale=factor).requests
        parts += [r for r in drawn if begin_s <= r.scheduled_s < end_s]
    requests = tuple(
        ScheduledRequest(i, r.scheduled_s, r.traffic_class, r.model, r.prompt_tokens, r.output_tokens)
        for i, r in enumerate(parts)
    )
    return Schedule(requests, DURATION_S)


def run(scenario: Scenario, schedule: Schedule) -> Run:
    return simulate(scenario, deployment.resolve(scenario), schedule, ServiceTimes({}), keep_telemetry=False)


def good_at_s(done: Run) -> np.ndarray[Any, Any]:
    """When the good requests were asked for."""
    r = done.requests[done.requests["status"] == "completed"]
    e2el_ms = (r["done_s"] - r["scheduled_s"]) * 1e3
    tpot_ms = (r["done_s"] - r["first_token_s"]) * 1e3 / (r["tokens"] - 1)
    good = (e2el_ms <= DEADLINE_MS) & (tpot_ms <= TPOT_MS)
    return r[good]["scheduled_s"].to_numpy(dtype=float)


def goodput(done: Run, begin_s: float, end_s: float) -> float:
    at_s = good_at_s(done)
    return float(((at_s >= begin_s) & (at_s < end_s)).sum() / (end_s - begin_s))


def row(name: str, done: Run) -> None:
    before = goodput(done, WINDOW_S, BEGIN_S)
    begins = np.arange(BEGIN_S, DURATION_S - 2 * WINDOW_S, 0.5)
    low = [b for b in begins if goodput(done, b, b + 2 * WINDOW_S) < 0.7 * before]
    back = f"{max(low) - BEGIN_S + WINDOW_S:.1f}" if low else "0"
    spans = (before, goodput(done, BEGIN_S, END_S), goodput(done, END_S, DURATION_S - DEADLINE_MS / 1e3))
    lost = done.requests[done.requests["status"] != "completed"]
    unstarted = int((lost["started_s"].isna() & (lost["error"] == "replica_lost")).sum())
    kinds = ", ".join(f"{n} {kind}" for kind, n in lost["error"].value_counts().items()) or "nothing"
    told = f" ({unstarted} of them not started)" if unstarted else ""
    print(f"{name:38} {spans[0]:7.1f} {spans[1]:7.1f} {spans[2]:7.1f} {back:>7}  {kinds}{told}")


if __name__ == "__main__":
    main()
