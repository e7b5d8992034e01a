"""How much the choice of the replica matters: gpuplan's dispatcher beside round-robin, random and least-requests.

One model (Llama-3-8B) on an H100 that is cut into slices of different size, and the two hours of the Azure LLM
inference trace 2023, simulated with the roofline's step times. Each trace comes as it was recorded, faster, so that its
requests are a given share of what the layout can do: as many a second as it answers when all of them wait at once. The
others are what their names say: a request goes to one replica when it comes and stays there. Differences are those of
the choice alone, as arrivals, lengths, slices, batching and step times are the same.

    python benchmarks/dispatch.py --traces FOLDER [--load 0.8] [--requests 6000] [--layout 3g.40gb,2g.20gb,1g.20gb]

FOLDER has azure-llm-2023-code.csv and azure-llm-2023-conv.csv: columns arrived_at_s, prompt_tokens, output_tokens
(Azure Public Dataset; Patel et al., Splitwise, ISCA 2024).
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from gpuplan.policy.dispatch import Dispatcher
from gpuplan.policy.state import ModelState, ReplicaState, Sequence
from gpuplan.scenario import deployment, traces
from gpuplan.scenario.build import build
from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.schedule import Schedule, ScheduledRequest
from gpuplan.sim.service_times import ServiceTimes
from gpuplan.sim.simulator import simulate

TRACES = ("azure-llm-2023-code.csv", "azure-llm-2023-conv.csv")


class _Pushed:
    """A dispatcher that never moves what it has placed."""

    steals = False

    def __init__(self, pick: Callable[[list[ReplicaState]], ReplicaState]) -> None:
        self._pick = pick

    def chosen(self, model: ModelState, s: Sequence, *, now_s: float) -> ReplicaState | None:
        fit = [r for r in model.replicas if r.welcomes and r.could_hold(s)]
        return self._pick(fit) if fit else None


def round_robin() -> Dispatcher:
    turns = itertools.count()
    return _Pushed(lambda fit: fit[next(turns) % len(fit)])


def at_random() -> Dispatcher:
    return _Pushed(random.Random(0).choice)


def least_requests() -> Dispatcher:
    return _Pushed(lambda fit: min(fit, key=lambda r: (r.running + len(r.line), r.order)))


DISPATCHERS: dict[str, Callable[[], Dispatcher | None]] = {
    "round-robin": round_robin,
    "random": at_random,
    "least-requests": least_requests,
    "gpuplan": lambda: None,
}


class Figures(NamedTuple):
    """Of one run, in ms."""

    ttft_p50: float
    ttft_p95: float
    ttft_p99: float
    e2el_p95: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--load", type=float, default=0.8)
    parser.add_argument("--requests", type=int, default=6000)
    parser.add_argument("--layout", default="3g.40gb,2g.20gb,1g.20gb")
    options = parser.parse_args()
    scenario = scenario_of(options.layout.split(","))
    for name in TRACES:
        rows = list(itertools.islice(traces.read(options.traces / name), options.requests))
        capacity = capacity_per_s(scenario, rows)
        speed = options.load * capacity * rows[-1].arrived_at_s / len(rows)
        print(f"{name}: {len(rows)} requests on {options.layout}")
        print(f"  {capacity:.1f} a second when all of them wait at once; load {options.load:.0%} of that")
        print(f"  {'TTFT ms':16} {'p50':>8} {'p95':>8} {'p99':>8}   {'E2E p95':>8}")
        found: dict[str, Figures] = {}
        for told, make in DISPATCHERS.items():
            found[told] = figures(scenario, schedule(rows, speed), make())
            f = found[told]
            print(f"  {told:16} {f.ttft_p50:8.0f} {f.ttft_p95:8.0f} {f.ttft_p99:8.0f}   {f.e2el_p95:8.0f}")
        ours = found["gpuplan"]
        for told in DISPATCHERS:
            if told != "gpuplan":
                p50, p95, p99, e2el = (a / b for a, b in zip(ours, found[told], strict=True))
                print(f"  gpuplan / {told:14} p50 x {p50:.2f}, p95 x {p95:.2f}, p99 x {p99:.2f}, E2E p95 x {e2el:.2f}")


def scenario_of(layout: list[str]) -> Scenario:
    told: dict[str, Any] = {
        "name": "dispatch",
        "models": {"llm": {"emulate": "llama-3-8b"}},
        "deployment": {
            "gpu": "h100-80gb",
            "mig": layout,
            "replicas": [{"model": "llm", "slice": part} for part in layout],
            "batching": {"llm": {"max_batch_size": 32, "max_queue_size": 1_000_000}},
        },
    }
    return build(told, Scenario)


def schedule(rows: list[traces.TraceRow], speed: float) -> Schedule:
    """The rows as they came, `speed` times as fast; infinite: all at once."""
    requests = tuple(
        ScheduledRequest(i, row.arrived_at_s / speed, "llm", "llm", row.prompt_tokens, row.output_tokens)
        for i, row in enumerate(rows)
    )
    return Schedule(requests, rows[-1].arrived_at_s / speed)


def capacity_per_s(scenario: Scenario, rows: list[traces.TraceRow]) -> float:
    """Requests answered a second while enough of them wait: to the moment when nine of ten have been."""
    run = simulate(
        scenario, deployment.resolve(scenario), schedule(rows, float("inf")), ServiceTimes({}), keep_telemetry=False
    )
    done = np.sort(run.requests["done_s"].to_numpy(dtype=float))
    return 0.9 * len(done) / float(done[int(0.9 * len(done))])


def figures(scenario: Scenario, asked: Schedule, dispatcher: Dispatcher | None) -> Figures:
    run = simulate(
        scenario, deployment.resolve(scenario), asked, ServiceTimes({}), keep_telemetry=False, dispatcher=dispatcher
    )
    requests = run.requests
    if not (requests["status"] == "completed").all():
        raise SystemExit(f"not all were answered: {requests['error'].value_counts().to_dict()}")
    ttft = (requests["first_token_s"] - requests["scheduled_s"]).to_numpy(dtype=float) * 1e3
    e2el = (requests["done_s"] - requests["scheduled_s"]).to_numpy(dtype=float) * 1e3
    return Figures(*np.percentile(ttft, [50, 95, 99]), float(np.percentile(e2el, 95)))


if __name__ == "__main__":
    main()
