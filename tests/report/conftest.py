"""Runs to draw: simulated ones, and what can become of them (errors, no telemetry, hostile names)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gpuplan.record.run import SERVER_VIEW, Run
from gpuplan.record.summary import summarize
from gpuplan.scenario import deployment, files
from gpuplan.scenario.schedule import Schedule, build_schedule
from gpuplan.sim.service_times import ServiceTimes
from gpuplan.sim.simulator import simulate

QUICKSTART = Path(__file__).parents[2] / "scenarios" / "quickstart.yaml"


def simulated(
    *, classes: int | None = None, slo: bool = True, requests: int | None = None, telemetry: bool = True
) -> Run:
    """Quickstart, or `classes` copies of its moderation class; only its first `requests` after the warm-up."""
    data = files.to_builtins(files.load(QUICKSTART))
    if classes is not None:
        data["traffic"] = [{**data["traffic"][0], "name": f"class-{i}"} for i in range(classes)] + data["traffic"][1:2]
    if not slo:
        data["traffic"] = [{k: v for k, v in c.items() if k != "slo"} for c in data["traffic"]]
    scenario = files.from_builtins(data)
    schedule = build_schedule(scenario)
    if requests is not None:
        kept = [r for r in schedule.requests if r.scheduled_s > scenario.warmup][:requests]
        kept = [msgspec.structs.replace(r, index=i) if isinstance(r, msgspec.Struct) else replace(r, index=i)
                for i, r in enumerate(kept)]  # fmt: skip
        schedule = Schedule(tuple(kept), schedule.duration_s)
    return simulate(scenario, deployment.resolve(scenario), schedule, ServiceTimes({}), keep_telemetry=telemetry)


def all_errors() -> Run:
    run = simulated()
    rows = run.requests.copy()
    rows["status"], rows["error"], rows["message"], rows["http_status"] = "error", "http_500", "no <b>luck</b>", 500
    for column in ("first_token_s", "started_s", "finished_s"):
        rows[column] = float("nan")
    rows["tokens"], rows["gaps_ms"] = 0, [[] for _ in range(len(rows))]
    return replace(run, requests=rows, batches=run.batches.iloc[:0])


def foreign_server() -> Run:
    """A server that tells nothing of its inside."""
    run = simulated(telemetry=False)
    meta = msgspec.structs.replace(
        run.meta, source="bench", target="http://example.test", provenance=dict.fromkeys(run.meta.provenance, "remote")
    )
    rows = run.requests.assign(**dict.fromkeys(SERVER_VIEW, None))
    return replace(run, meta=meta, requests=rows, batches=run.batches.iloc[:0])


def interrupted() -> Run:
    run = simulated()
    rows = run.requests.copy()
    late = rows["done_s"] > 8.0
    rows.loc[late, "status"] = "interrupted"
    rows.loc[late, ["first_token_s", "done_s", "finished_s"]] = float("nan")
    meta = msgspec.structs.replace(
        run.meta, source="bench", interrupted=True, failure="the server died", measured_s=8.0
    )
    return replace(run, meta=meta, requests=rows)


ODD_RUNS: dict[str, Callable[[], Run]] = {
    "quickstart": simulated,
    "zero requests": lambda: simulated(requests=0),
    "one request": lambda: simulated(requests=1),
    "all errors": all_errors,
    "no telemetry": lambda: simulated(telemetry=False),
    "no server-side times": foreign_server,
    "no slos": lambda: simulated(slo=False),
    "50 classes": lambda: simulated(classes=50),
    "interrupted": interrupted,
}


def plan_for(run: Run, *, gpu: str = "a100-80gb") -> dict[str, Any]:
    """A plan.json in the shape of `gpuplan.plan.document`, for cards or for the CPU."""
    cpu = gpu == "cpu"
    shape = {"card": 0, "cells": 8, "memory_bytes": 42 << 30, "memory_used_bytes": None, "model": None, "replica": None}
    used = {"model": "assistant", "replica": "assistant-0", "memory_used_bytes": 20 << 30}
    placements = [
        {**shape, "profile": "3g.40gb", "start": 4, "width": 4, "slices": 3, **used},
        {**shape, "profile": "2g.20gb", "start": 0, "width": 2, "slices": 2},
    ]
    layout = {"gpu": gpu, "count": 1, "profiles": ["3g.40gb", "2g.20gb"], "placements": placements}
    evidence = [
        {"rate_factor": f, "queue_depth_per_replica": q, "slo_attainment": a, "meets_slos": a == 1.0}
        for f, q, a in ((0.5, 0.0, 1.0), (1.0, 0.3, 1.0), (2.0, 9.5, 0.41))
    ]
    threshold = {
        "metric": "queue_depth_per_replica", "scale_up_at": 2, "scale_down_at": 0.5, "cooldown_s": 60,
        "stabilization_window_s": 300, "min_replicas": 1, "max_replicas": 4, "reason": "holds up to 1 x",
        "evidence": evidence,
    }  # fmt: skip
    other = {
        "gpu": gpu, "count": 1, "profiles": ["7g.80gb"],
        "replicas": [{"model": "assistant", "slice": "7g.80gb", "count": 1}],
        "cost_per_hour": 3.67, "slo_attainment": 0.99, "worst_margin": 0.8, "meets_slos": True, "simulated": True,
        "reason": "less room",
    }  # fmt: skip
    path = "classes.summary.ttft_ms.p50"
    return {
        "schema_version": 1, "scenario": run.meta.name, "meets_slos": True, "verdict": f"1 x {gpu} meets every SLO",
        "gpus_needed": 0 if cpu else 1, "fleet": [{"gpu": gpu, "count": 1, "price_per_hour": 0.0 if cpu else 3.67}],
        "cost_per_hour": 0.0 if cpu else 3.67, "lower_bound_cost_per_hour": 0.0 if cpu else 1.84,
        "optimality_gap": 0.0 if cpu else 0.5, "proven_optimal": False, "price_source": "a list",
        "mig": {"layouts": [] if cpu else [layout]},
        "replicas": [{"model": "assistant", "slice": "cpu" if cpu else "3g.40gb", "processes": 1, "count": 1}],
        "batching": {
            "assistant": {"max_batch_size": 16, "max_queue_delay_ms": 0.0, "max_queue_size": 24, "reason": "why"}
        },
        "autoscale": {} if cpu else {"assistant": threshold},
        "predicted": None if cpu else summarize(run),
        "backtest": None if cpu else {
            "error_percent": {path: -7.4}, "measured": {path: 280.1}, "predicted": {path: 259.4},
            "basis": "fitted on the first half", "worst_percent": 7.4, "median_percent": 7.4, "worst": path, "requests": 412,
        },
        "service_times": [{"model": "assistant", "slice": "3g.40gb", "basis": "roofline", "error": None, "steps": 0}],
        "searched": {"layouts_valid": 77, "layouts_maximal": 28, "layouts_simulated": 28, "simulations": 93, "elapsed_s": 9.1},
        "alternatives": [] if cpu else [other, {**other, "worst_margin": None, "slo_attainment": None, "replicas": [],
                                                "meets_slos": False, "simulated": False, "reason": "no memory"}] * 8,
        "notes": ["a note"],
    }  # fmt: skip


HOSTILE = {
    "quickstart": "</title></script><img src=x onerror=alert(1)>",
    "assistant": "</script><img src=x onerror=alert(2)>$\\alpha$",
    "moderator": "$x$ \"'><svg onload=alert(3)> [bold red]m[/]",
    "moderation": "<!-- --><b>$x^2$</b> {{ 7 * 7 }} [link=http://evil.test]c[/link]",
    "summary": "a.b.<script>alert(4)</script>",
    "gpu0": "_</style><img src=http://evil.test/x>",
    "http_500": "<iframe src=http://evil.test>",
    "no <b>luck</b>": "\x1b[31m<img src=http://evil.test/y onerror=alert(5)>",
}


def hostile(data: Any) -> Any:
    """The same data with every known name replaced: no scenario file may hold these, a run folder of others can."""
    if isinstance(data, dict):
        return {HOSTILE.get(k, k): hostile(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [hostile(v) for v in data]
    return HOSTILE.get(data, data) if isinstance(data, str) else data


def hostile_case() -> tuple[Run, dict[str, Any], dict[str, Any]]:
    run = simulated()
    rows = run.requests.copy()
    failed = rows.index[rows["traffic_class"] == "summary"][3:9]
    rows.loc[failed, ["status", "error", "message"]] = ["error", "http_500", "no <b>luck</b>"]
    run = replace(run, requests=rows)
    figures, plan = hostile(summarize(run)), hostile(plan_for(run))
    plan["backtest"]["error_percent"] = {f"classes.{HOSTILE['summary']}.ttft_ms.p50": 3.0}
    meta = msgspec.convert(
        hostile({k: v for k, v in msgspec.to_builtins(run.meta).items() if k != "provenance"})
        | {"provenance": {HOSTILE.get(k, k): v for k, v in run.meta.provenance.items()}},
        type(run.meta),
    )
    meta = msgspec.structs.replace(
        meta, failure=HOSTILE["http_500"], notes=[HOSTILE["gpu0"]], target=HOSTILE["assistant"]
    )
    tables = {name: getattr(run, name).replace(HOSTILE) for name in ("requests", "batches", "telemetry")}
    return replace(run, meta=meta, **tables), figures, plan


@cache
def odd(case: str) -> Run:
    """The run of that name, made once: tests do not change it."""
    return ODD_RUNS[case]()


@pytest.fixture(params=list(ODD_RUNS))
def odd_run(request: pytest.FixtureRequest) -> Run:
    return odd(request.param)


@pytest.fixture(scope="session")
def quickstart() -> Run:
    return odd("quickstart")


@pytest.fixture(scope="session")
def make_run() -> Callable[[str], Run]:
    return odd


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., dict[str, Any]]:
    return plan_for


@pytest.fixture(scope="session")
def hostile_run() -> tuple[Run, dict[str, Any], dict[str, Any]]:
    return hostile_case()


@pytest.fixture(scope="session")
def hostile_names() -> dict[str, str]:
    return HOSTILE
