"""How far the simulator is from a live run of a scenario: the back-test, over several seeds.

Runs each scenario live on the built-in server (emulated engine or ONNX on the CPU, whatever it says), fits step times
on one half and predicts the other. Prints the error of every figure, and their median and worst.

    python benchmarks/backtest.py [scenario.yaml ...] [--seeds 3]
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import msgspec

from gpuplan.cli.common import run_async
from gpuplan.load.bench import BenchOptions, bench
from gpuplan.plan.calibrate import backtest
from gpuplan.scenario import deployment, files
from gpuplan.scenario.schedule import build_schedule

SCENARIOS = Path(__file__).parents[1] / "scenarios"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "scenarios", nargs="*", type=Path, default=[SCENARIOS / "quickstart.yaml", SCENARIOS / "onnx-cpu.yaml"]
    )
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    for file in options.scenarios:
        errors: dict[str, list[float]] = {}
        for seed in range(options.seeds):
            scenario = msgspec.structs.replace(files.load(file), seed=seed)
            run = run_async(bench(scenario, deployment.resolve(scenario), build_schedule(scenario), BenchOptions()))
            for figure, percent in (backtest(run) or {"error_percent": {}})["error_percent"].items():
                errors.setdefault(figure, []).append(percent)
        print(f"{file.name}, {options.seeds} seeds: predicted against measured, %")
        for figure, percents in errors.items():
            print(f"  {figure:45} " + " ".join(f"{p:+7.1f}" for p in percents))
        every = [abs(p) for percents in errors.values() for p in percents]
        if every:
            print(f"  median {statistics.median(every):.1f} %, worst {max(every):.1f} %")


if __name__ == "__main__":
    main()
