"""What a fault costs, and how soon service is back: every fault in a service of four replicas, simulated and live.

The service is a decoder (phi-2) on four 1g.10gb slices of an emulated A100-80GB; a request counts as good when it is
answered within its deadline and its SLOs. They come at a rate that the service bears easily. The fault comes after 10 s
and goes after 12 more; the flood lasts 30 s. Goodput, by when requests were asked for, is given before, meanwhile and
after, with what was lost, and how many seconds after the fault's begin (the flood's end) it was until in any 2 s nine
tenths of those who did not hang up got a good answer.

With `--live` the same requests are also sent to `gpuplan serve`, over loopback, with emulated replicas and the faults
injected; that takes 8 minutes. Server and load generator share one machine; where that was the limit, a note says so.

    python benchmarks/faults.py [--seed 1] [--live] [--only crash]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import faults_live
import numpy as np
import pandas as pd

from gpuplan.policy.vocabulary import Event
from gpuplan.record.run import Run
from gpuplan.scenario import deployment, files
from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.schedule import Schedule, ScheduledRequest, build_schedule
from gpuplan.sim import simulator
from gpuplan.sim.service_times import ServiceTimes

RATE, FLOOD = 10.0, 10.0
BEGIN_S, FAULT_S, FLOOD_S, AFTER_S = 10.0, 12.0, 30.0, 10.0
STOP_S = 3.0
WINDOW_S, BACK_SHARE = 2.0, 0.9
DEADLINE_MS, TPOT_MS = 6000.0, 60.0
CAPACITY_S, SETTLED_S = 20.0, 8.0
ASKED = (3.0, 4.0, 5.0, 6.0, 8.0)
"""How many times RATE is asked for to find what the service bears; it has settled after SETTLED_S."""
NO_MEMORY, FULLER = "one has no memory above batch 8, at 30/s", 3.0
"""At RATE no batch is as large as that."""
FAULTS: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "one replica crashes, back after 12 s": [{"replica": "chat-0", "crash": {"back_after": FAULT_S}}],
    "one becomes 5 x slower": [{"replica": "chat-0", "for": FAULT_S, "slow": {"factor": 5.0}}],
    "one gives no numbers": [{"replica": "chat-0", "for": FAULT_S, "nan": {"share": 1.0}}],
    NO_MEMORY: [{"replica": "chat-0", "for": FAULT_S, "out_of_memory": {"above_batch": 8}}],
    "one hangs": [{"replica": "chat-0", "hang": {}}],
    "all are gone for 12 s": [{"model": "chat", "crash": {"back_after": FAULT_S}}],
}
LEAVING = "half of the clients hang up after 1 s"
STANDING = f"the server stands still for {STOP_S:g} s"
WORDS = {
    "replica that ran the request was lost": "replica_lost",
    "not answered within its deadline": "timeout",
    "after the request's deadline": "deadline",
    "queue is full": "queue_full",
    "output was not a number": "nan_output",
    "fails again and again": "circuit_open",
    "no replica of the model": "no_replica",
}
"""What a client is told, and what the simulation calls it."""


class Spans(NamedTuple):
    """When the fault comes and goes, and when the last request is sent."""

    begin_s: float = BEGIN_S
    end_s: float = BEGIN_S + FAULT_S
    duration_s: float = BEGIN_S + FAULT_S + AFTER_S


FLOODED = Spans(BEGIN_S, BEGIN_S + FLOOD_S, BEGIN_S + FLOOD_S + AFTER_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--live", action="store_true", help="run everything against a server, too")
    parser.add_argument("--only", default="", help="rows whose name holds this word")
    options = parser.parse_args()
    ways: dict[str, Callable[[Scenario, Schedule], Run]] = {"simulated": simulated}
    if options.live:
        ways["live"] = faults_live.measured
    print(f"{'goodput, requests/s':41} {'':9} {'before':>7} {'during':>7} {'after':>7} {'back s':>7}  lost")
    for name, told in FAULTS.items():
        if options.only in name:
            scenario = service(options.seed, [{"at": BEGIN_S, **fault} for fault in told])
            compare(name, ways, scenario, build_schedule(scenario, rate_scale=FULLER if name is NO_MEMORY else 1.0))
    if options.only in LEAVING:
        leaving = service(options.seed, [], abandon={"share": 0.5, "after": 1.0})
        compare(LEAVING, ways, leaving, build_schedule(leaving))
    if options.only in STANDING:
        ways = {"simulated": standing_still}
        if options.live:
            ways["live"] = lambda scenario, schedule: faults_live.watched(scenario, schedule, (BEGIN_S, STOP_S)).run
        plain = service(options.seed, [])
        compare(STANDING, ways, plain, build_schedule(plain))
    if options.only in "a flood":
        flood(options.seed, options.live)


def flood(seed: int, live: bool) -> None:
    """The flood's rows, what the service bears otherwise, and what happened to the server's memory."""
    plain, settled = service(seed, []), Spans(SETTLED_S, CAPACITY_S, CAPACITY_S)
    steady = service(seed, [], settled)
    schedules = {factor: build_schedule(steady, rate_scale=factor) for factor in ASKED}
    bears = {factor: goodput(simulated(steady, asked), *settled[:2]) for factor, asked in schedules.items()}
    best = max(bears, key=lambda factor: bears[factor])
    name = f"a flood of {FLOOD:g} x what it bears"
    asked = flooded(seed, best * FLOOD)
    with mock.patch.object(simulator, "Simulation", Measured):
        done = simulated(plain, asked)
    row(name, "simulated", done, FLOODED)
    share("simulated", done, bears[best], best)
    in_flight, deadlines = Measured.most
    print(f"  simulated: at most {in_flight} requests in flight, and {deadlines} deadlines remembered")
    if live:
        seen = faults_live.watched(plain, asked)
        row("", "live", seen.run, FLOODED)
        bears = {f: goodput(faults_live.watched(steady, schedules[f]).run, *settled[:2]) for f in (best / 2, best)}
        most = max(bears, key=lambda factor: bears[factor])
        share("live", seen.run, bears[most], most)
        held(seen)


def held(seen: faults_live.Watched) -> None:
    """What the live server had in hand during the flood, and after it."""
    begin_s, end_s, _ = FLOODED
    early_s, late_s = begin_s + FLOOD_S / 3, end_s + WINDOW_S
    busy, last = [r for r in seen.readings if begin_s <= r.at_s < end_s], seen.readings[-1]
    waiting, running, lag_s = (max(r[i] for r in busy) for i in (2, 3, 4))
    print(
        f"  live: the server's memory, MiB: {seen.rss_mib(0.0, begin_s):.0f} before, at most "
        f"{seen.rss_mib(begin_s, early_s):.0f} in the flood's first third and {seen.rss_mib(early_s, late_s):.0f} "
        f"later, {last.rss_mib:.0f} at the end\n"
        f"  live: at most {waiting:.0f} waited and {running:.0f} ran, {last.waiting + last.running:.0f} at the end; "
        f"the server's event loop was at most {lag_s * 1e3:.0f} ms late"
    )


def share(way: str, done: Run, most: float, factor: float) -> None:
    """How the goodput of the flood, but for its first moments, compares with the best."""
    during = goodput(done, FLOODED.begin_s + WINDOW_S, FLOODED.end_s)
    print(f"  {way}: the most it bears is {most:.1f} good requests/s, at {factor * RATE:g} asked for")
    print(f"  {way}: in the flood it gives {during:.1f}: {during / most:.0%} of that")


def service(seed: int, faults: list[dict[str, Any]], spans: Spans | None = None, **traffic: Any) -> Scenario:
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
        "duration": (spans or Spans()).duration_s,
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


def flooded(seed: int, during: float) -> Schedule:
    """The service's requests, at `during` times the rate while the flood lasts."""
    begin_s, end_s, duration_s = FLOODED
    parts = []
    for factor, from_s, until_s in ((1.0, 0.0, begin_s), (during, begin_s, end_s), (1.0, end_s, duration_s)):
        drawn = build_schedule(service(seed, [], FLOODED), rate_scale=factor).requests
        parts += [r for r in drawn if from_s <= r.scheduled_s < until_s]
    requests = tuple(
        ScheduledRequest(i, r.scheduled_s, r.traffic_class, r.model, r.prompt_tokens, r.output_tokens)
        for i, r in enumerate(parts)
    )
    return Schedule(requests, duration_s)


# --- ways to run it -----------------------------------------------------------------------------------------------


def simulated(scenario: Scenario, schedule: Schedule) -> Run:
    supply = deployment.resolve(scenario)
    return simulator.simulate(scenario, supply, schedule, ServiceTimes({}), keep_telemetry=False)


class StandingStill(simulator.Simulation):
    """What falls into the time of a stop is handled at its end: the core's clock jumps."""

    def _feed(self, event: Event, now_s: float) -> None:
        stopped = BEGIN_S <= now_s < BEGIN_S + STOP_S
        super()._feed(event, BEGIN_S + STOP_S if stopped else now_s)


class Measured(simulator.Simulation):
    """Keeps the most requests that were in flight, and the most deadlines that the core remembered."""

    most = (0, 0)

    def _feed(self, event: Event, now_s: float) -> None:
        super()._feed(event, now_s)
        held = (self._core.in_flight, len(self._core._deadlines))
        Measured.most = (max(self.most[0], held[0]), max(self.most[1], held[1]))


def standing_still(scenario: Scenario, schedule: Schedule) -> Run:
    with mock.patch.object(simulator, "Simulation", StandingStill):
        return simulated(scenario, schedule)


# --- what came of it ----------------------------------------------------------------------------------------------


def compare(
    name: str, ways: dict[str, Callable[[Scenario, Schedule], Run]], scenario: Scenario, asked: Schedule
) -> None:
    for label, way in zip((name, ""), ways, strict=False):
        row(label, way, ways[way](scenario, asked), Spans())


def row(name: str, way: str, done: Run, spans: Spans) -> None:
    begin_s, end_s, duration_s = spans
    before, after = goodput(done, WINDOW_S, begin_s), goodput(done, end_s, duration_s)
    during = goodput(done, begin_s, end_s)
    lost = done.requests[done.requests["status"] != "completed"]
    why = [kind(error, message) for error, message in zip(lost["error"], lost["message"], strict=True)]
    unstarted = int((lost["started_s"].isna() & (np.array(why, dtype=object) == "replica_lost")).sum())
    kinds = ", ".join(f"{n} {kind}" for kind, n in pd.Series(why, dtype=object).value_counts().items()) or "nothing"
    told = f" ({unstarted} of them not started)" if "replica_lost" in why else ""
    back = back_s(done, end_s if spans is FLOODED else begin_s, duration_s)
    print(f"{name:41} {way:9} {before:7.1f} {during:7.1f} {after:7.1f} {back:7.1f}  {kinds}{told}", flush=True)
    for note in done.meta.notes:
        if "limit" in note:
            print(f"    {note}")


def kind(error: str, message: str | None) -> str:
    """The simulation's word for what a client met."""
    return next((word for said, word in WORDS.items() if message and said in message), error)


def good(done: Run) -> pd.Series[bool]:
    r = done.requests
    e2el_ms = (r["done_s"] - r["scheduled_s"]) * 1e3
    tpot_ms = (r["done_s"] - r["first_token_s"]) * 1e3 / (r["tokens"] - 1)
    fine = (r["status"] == "completed") & (e2el_ms <= DEADLINE_MS) & (tpot_ms <= TPOT_MS)
    return fine.fillna(False).astype(bool)


def goodput(done: Run, begin_s: float, end_s: float) -> float:
    at_s = done.requests["scheduled_s"]
    return float((good(done) & (at_s >= begin_s) & (at_s < end_s)).sum() / (end_s - begin_s))


def back_s(done: Run, since_s: float, until_s: float) -> float:
    """How long after `since_s` the last window ends in which too few of those who asked and stayed were served well."""
    fine, stayed = good(done), done.requests[done.requests["error"] != "abandoned"]
    at_s, ok = stayed["scheduled_s"].to_numpy(), fine[stayed.index].to_numpy()
    windows = [(b, (at_s >= b) & (at_s < b + WINDOW_S)) for b in np.arange(since_s, until_s - WINDOW_S + 0.1, 0.5)]
    low = [begin_s for begin_s, inside in windows if inside.any() and ok[inside].mean() < BACK_SHARE]
    return max(low) + WINDOW_S - since_s if low else 0.0


if __name__ == "__main__":
    main()
