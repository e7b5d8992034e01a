"""How many requests the simulator simulates a second on one core, interpreted and compiled, and in how much memory.

Workloads at about 70 % load, rows not kept: a classifier on one whole card, and on seven slices of it, where every
request is weighed against seven; and the arrivals and lengths of Azure's conversations, over and over, for a decoder on
three cards. Each is simulated by the package as it stands beside this file, and by a compiled copy of it, in turns.
`--lengths` shows how time and memory grow: from 10^4 requests to 10^7 of the first workload.

    python benchmarks/simulator.py [--requests 200000] [--repeat 3] [--lengths] [--trace azure-llm-2023-conv.csv]
                                   [--compiled FOLDER]

FOLDER holds a compiled copy (`python hatch_build.py FOLDER`); left out, one is made, which takes a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = os.environ.get("GPUPLAN_PACKAGE", str(ROOT))
sys.path.insert(0, PACKAGE)

LENGTHS = (10**4, 10**5, 10**6, 10**7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--lengths", action="store_true")
    parser.add_argument("--trace", type=Path, help="columns arrived_at_s, prompt_tokens, output_tokens")
    parser.add_argument("--compiled", type=Path, help="a folder with a compiled copy of the package")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.requests, options.trace)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        compiled = options.compiled or Path(scratch)
        if options.compiled is None:
            subprocess.run(
                [sys.executable, str(ROOT / "hatch_build.py"), scratch], check=True, stdout=subprocess.DEVNULL
            )
        packages = {"interpreted": ROOT, "compiled": compiled}
        names = [name for name in WORKLOADS if name != "conversations" or options.trace]
        print(f"{'requests/s':22} {'interpreted':>12} {'compiled':>12} {'ratio':>6}   bytes a request, load")
        for name in names:
            best: dict[str, dict[str, float]] = {}
            for _ in range(options.repeat):
                for package, folder in packages.items():
                    told = run(folder, name, options.requests, options.trace)
                    if told["per_s"] > best.get(package, told)["per_s"] or package not in best:
                        best[package] = told
            slow, fast = best["interpreted"], best["compiled"]
            ratio = fast["per_s"] / slow["per_s"]
            rest = f"{fast['bytes']:15.0f}, {fast['busy']:4.0%} busy, batches of {fast['batch']:.1f}"
            print(f"{name:22} {slow['per_s']:12,.0f} {fast['per_s']:12,.0f} {ratio:6.1f} {rest}")
        if options.lengths:
            print(f"\n{'requests':>12} {'s':>9} {'requests/s':>12} {'bytes a request':>16}   (compiled)")
            for length in LENGTHS:
                told = run(compiled, next(iter(WORKLOADS)), length, None)
                print(f"{length:12,} {told['seconds']:9.2f} {told['per_s']:12,.0f} {told['bytes']:16.0f}")


def run(package: Path, workload: str, requests: int, trace: Path | None) -> dict[str, float]:
    """`measure` in a process of its own, with the package of that folder."""
    command = [sys.executable, __file__, "--one", workload, "--requests", str(requests)]
    if trace is not None:
        command += ["--trace", str(trace)]
    done = subprocess.run(
        command, env={**os.environ, "GPUPLAN_PACKAGE": str(package)}, check=True, capture_output=True, text=True
    )
    told: dict[str, float] = json.loads(done.stdout)
    return told


def measure(workload: str, requests: int, trace: Path | None) -> dict[str, float]:
    import resource
    import time

    from gpuplan.record.summary import summarize
    from gpuplan.scenario import deployment
    from gpuplan.sim.service_times import ServiceTimes
    from gpuplan.sim.simulator import simulate

    def peak_bytes() -> int:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def simulated(count: int) -> tuple[float, Any]:
        scenario, schedule = WORKLOADS[workload](count, trace)
        supply = deployment.resolve(scenario)
        begun_bytes, begun_s = peak_bytes(), time.perf_counter()
        run = simulate(scenario, supply, schedule, ServiceTimes({}), keep_rows=False)
        seconds = time.perf_counter() - begun_s
        return seconds, (run, peak_bytes() - begun_bytes)

    simulated(min(requests, 5_000))  # imports, and caches of step times
    seconds, (run, grown_bytes) = simulated(requests)
    figures = summarize(run)
    (model,) = figures["models"].values()
    assert figures["overall"]["completed"] == requests, f"all are answered: {figures}"
    return {
        "seconds": seconds,
        "per_s": requests / seconds,
        "bytes": grown_bytes / requests,
        "busy": model["busy"],
        "batch": model["batch_size"]["mean"],
    }


def classifier(profiles: list[str], rate: float, requests: int) -> Any:
    import numpy as np

    from gpuplan.scenario.schedule import Schedule

    told = {
        "gpu": "a100-80gb",
        "mig": profiles,
        "replicas": [{"model": "m", "slice": profiles[0], "count": len(profiles)}],
        "batching": {"m": {"max_batch_size": 64, "max_queue_delay": "2ms"}},
    }
    rng = np.random.default_rng(1)
    at_s = np.cumsum(rng.exponential(1 / rate, requests))
    columns = _columns(at_s, rng.integers(20, 200, requests), np.zeros(requests))
    return _scenario("bert-base", told), Schedule(columns, float(at_s[-1]))


def conversations(requests: int, trace: Path | None) -> Any:
    import numpy as np

    from gpuplan.scenario import traces
    from gpuplan.scenario.schedule import Schedule

    assert trace is not None
    rows = list(traces.read(trace))
    again = -(-requests // len(rows))
    span_s = rows[-1].arrived_at_s + 1.0
    at_s = np.concatenate([np.array([r.arrived_at_s for r in rows]) + i * span_s for i in range(again)])[:requests]
    prompts = np.tile([r.prompt_tokens for r in rows], again)[:requests]
    outputs = np.tile([r.output_tokens for r in rows], again)[:requests]
    told = {
        "gpu": "h100-80gb",
        "mig": ["7g.80gb"],
        "count": 3,
        "replicas": [{"model": "m", "slice": "7g.80gb", "count": 3}],
        "batching": {"m": {"max_batch_size": 64, "max_queue_size": 10_000}},
    }
    at_s /= SPEED
    return _scenario("llama-3-8b", told), Schedule(_columns(at_s, prompts, outputs), float(at_s[-1]))


SPEED = 4.0
"""How much faster than it came the trace is replayed, so that three cards are at about 70 % of what they can do."""
WORKLOADS: dict[str, Callable[[int, Path | None], Any]] = {
    "classifier, one card": lambda requests, _: classifier(["7g.80gb"], 1500.0, requests),
    "classifier, 7 slices": lambda requests, _: classifier(["1g.10gb"] * 7, 2000.0, requests),
    "conversations": conversations,
}


def _columns(at_s: Any, prompts: Any, outputs: Any) -> Any:
    import numpy as np

    from gpuplan.scenario.schedule import Columns

    columns = Columns([("m", "m")])
    columns.scheduled_s = array("d", at_s.astype(np.float64).tobytes())
    columns.kind = array("H", bytes(2 * len(at_s)))
    columns.prompt_tokens = array("i", prompts.astype(np.int32).tobytes())
    columns.output_tokens = array("i", outputs.astype(np.int32).tobytes())
    return columns


def _scenario(model: str, deployment: dict[str, Any]) -> Any:
    from gpuplan.scenario.build import build
    from gpuplan.scenario.demand import Scenario

    told = {
        "name": "simulated",
        "models": {"m": {"emulate": model}},
        "traffic": [{"name": "m", "model": "m", "arrivals": {"process": "constant", "rate": 1}}],
        "deployment": deployment,
    }
    return build(told, Scenario)


if __name__ == "__main__":
    main()
