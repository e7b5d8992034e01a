"""A service of `benchmarks/faults.py` run live: `gpuplan serve` in a process of its own, with emulated replicas, on
loopback, and the load generator in this one.

`measured` is a run against a server that also tells what it saw. `watched` is one against a server that keeps no
record, so that its memory is that of serving, and may stop that process for a while (SIGSTOP, then SIGCONT). Linux
only: memory is read in /proc.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from gpuplan.cli.common import run_async
from gpuplan.load.bench import BenchOptions, Progress, bench
from gpuplan.record.run import Run
from gpuplan.scenario import deployment, files
from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.schedule import Schedule

LOOKS_S = 1.0
SUMMED = ("gpuplan_requests_waiting", "gpuplan_requests_running")


class Reading(NamedTuple):
    """The server at one moment: its memory, its requests, and how late its event loop was."""

    at_s: float
    rss_mib: float
    waiting: float
    running: float
    lag_s: float


@dataclass
class Watched:
    """A run, and what its server was seen to do meanwhile."""

    run: Run
    readings: list[Reading] = field(default_factory=list)

    def rss_mib(self, begin_s: float, end_s: float) -> float:
        """The most memory that it had in that time."""
        return max(r.rss_mib for r in self.readings if begin_s <= r.at_s < end_s)


def measured(scenario: Scenario, schedule: Schedule) -> Run:
    """The run, with the server's side of each request."""
    return run_async(bench(scenario, deployment.resolve(scenario), schedule, BenchOptions(telemetry="none")))


def watched(scenario: Scenario, schedule: Schedule, stop: tuple[float, float] | None = None) -> Watched:
    """The run, with a reading of the server every second. `stop` is when its process stands still, and how long."""
    with _served(scenario) as (url, pid):
        return run_async(_watch(scenario, schedule, url, pid, stop))


async def _watch(
    scenario: Scenario, schedule: Schedule, url: str, pid: int, stop: tuple[float, float] | None
) -> Watched:
    loop, readings, looking = asyncio.get_running_loop(), list[Reading](), set[asyncio.Task[None]]()
    begun = False

    async def look(at_s: float) -> None:
        with contextlib.suppress(OSError):  # one that was too late to be answered
            readings.append(await asyncio.to_thread(_read, url, pid, at_s))

    def tick(progress: Progress) -> None:
        nonlocal begun
        if not begun and progress.elapsed_s > 0.0 and stop is not None:
            for after_s, number in ((stop[0], signal.SIGSTOP), (sum(stop), signal.SIGCONT)):
                loop.call_later(after_s - progress.elapsed_s, os.kill, pid, number)
        begun = begun or progress.elapsed_s > 0.0
        if not any(not task.done() for task in looking) and progress.elapsed_s >= len(readings) * LOOKS_S:
            looking.add(loop.create_task(look(progress.elapsed_s)))

    options = BenchOptions(target=url, telemetry="none")
    run = await bench(scenario, deployment.resolve(scenario), schedule, options, on_tick=tick)
    await asyncio.wait(looking)
    await look(run.meta.measured_s)
    return Watched(run, readings)


def _read(url: str, pid: int, at_s: float) -> Reading:
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    sums = {family.name: sum(sample.value for sample in family.samples) for family in families}
    status = Path(f"/proc/{pid}/status").read_text()
    rss_kib = int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])
    waiting, running = (sums[name] for name in SUMMED)
    return Reading(at_s, rss_kib / 1024, waiting, running, sums["gpuplan_event_loop_lag_seconds"])


@contextlib.contextmanager
def _served(scenario: Scenario) -> Iterator[tuple[str, int]]:
    """A server without a record: its URL, and its process."""
    with tempfile.TemporaryDirectory(prefix="gpuplan-") as folder:
        file = Path(folder) / "scenario.yaml"  # JSON is YAML
        file.write_bytes(msgspec.json.encode(files.to_builtins(scenario)))
        command = [sys.executable, "-m", "gpuplan", "serve", str(file), "--port", "0", "--json", "--telemetry", "none"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).resolve().parents[1])
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["url"], process.pid
        finally:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            process.wait(60)
