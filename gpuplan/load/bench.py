"""One benchmark, from scenario to Run: open the target, replay the schedule, join what both sides saw.

Whatever breaks after the first request was sent, the Run that comes back holds every row until then, and its
`failure` says what broke. Before that, InputError and RunError.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import platform
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec

from gpuplan import __version__
from gpuplan.errors import InputError, RunError
from gpuplan.load import protocols
from gpuplan.load.replayer import Replay
from gpuplan.load.targets import opened
from gpuplan.load.wire import Pool, Target
from gpuplan.record import summary
from gpuplan.record.recorder import assemble
from gpuplan.record.run import Run, RunMeta
from gpuplan.scenario import deployment as supply
from gpuplan.scenario import files
from gpuplan.scenario.demand import ModelSource, Scenario
from gpuplan.scenario.deployment import Deployment
from gpuplan.scenario.schedule import Schedule
from gpuplan.serve import model_files
from gpuplan.telemetry import choice, nvml
from gpuplan.telemetry.sampler import HZ

if TYPE_CHECKING:
    import pandas as pd

LEAD_S = 0.25
"""From 'everything is ready' to time zero: the first request must not be late for want of a loop turn."""
WARM_CONNECTIONS = 8
TICK_S = 0.25
LATE_MS = 10.0
"""A send lag p99 above this is said aloud: the generator, or its host, was the limit."""


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """How to send, and what to sample meanwhile. `target` is `local`, `in-process` or a URL; `timeout_s` bounds each
    request; `telemetry` is a checked choice."""

    target: str = "local"
    api: str | None = None
    timeout_s: float = 120.0
    rate_scale: float = 1.0
    speed: float = 1.0
    allow_cpu: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    sample_hz: float = HZ
    telemetry: str = choice.AUTO


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a bench stands, for a live display. Latencies are of the last thousand answers, from the schedule."""

    elapsed_s: float
    duration_s: float
    requests: int
    sent: int
    in_flight: int
    ended: int
    failed: int
    e2el_ms_p50: float | None
    e2el_ms_p95: float | None


async def bench(
    scenario: Scenario,
    deployment: Deployment,
    schedule: Schedule,
    options: BenchOptions,
    *,
    on_tick: Callable[[Progress], None] | None = None,
) -> Run:
    """Runs the schedule against the target and gives the Run."""
    apis = {
        name: protocols.api_for(options.api if supply.role(source) == "decoder" else None, supply.role(source))
        for name, source in scenario.models.items()
    }
    async with opened(
        options.target,
        scenario,
        deployment,
        allow_cpu=options.allow_cpu,
        sample_hz=options.sample_hz,
        telemetry=options.telemetry,
    ) as target:
        vocabularies = {name: _vocabulary(source) for name, source in scenario.models.items()}
        payloads = [
            protocols.request_bytes(
                apis[r.model], target.target, r, scenario.seed, options.headers, vocabularies[r.model]
            )
            for r in schedule.requests
        ]
        pool = Pool(target.target, timeout_s=options.timeout_s)
        replay = Replay(schedule.requests, payloads, pool)
        started_at = datetime.now(UTC)
        try:
            await _reach(pool, target.target, len(payloads))
            async with _quiet(), _interruptible(replay), _ticking(replay, schedule, on_tick):
                await replay.run(start_s=time.monotonic() + LEAD_S)
            measured_s = time.monotonic() - replay.start_s
        finally:
            pool.close()
        failure = target.failure
        server, about = await target.close(replay.start_s)
    answers = [
        protocols.read_answer(apis[r.model], r, exchange, start_s=replay.start_s, warmup_s=scenario.warmup)
        for r, exchange in zip(schedule.requests, replay.exchanges, strict=False)
    ]
    tables = assemble(answers, server)
    # Without what may stand before an @: a run folder is passed on.
    name = str(target.target) if "://" in options.target else options.target
    meta = RunMeta(
        name=scenario.name,
        source="bench",
        scenario=files.to_builtins(scenario),
        deployment=supply.describe(deployment),
        seed=scenario.seed,
        rate_scale=options.rate_scale,
        speed=options.speed,
        started_at=started_at.isoformat(timespec="seconds"),
        duration_s=schedule.duration_s,
        measured_s=measured_s if replay.stopped or failure else max(measured_s, schedule.duration_s),
        target=name,
        provenance=about.get("provenance") or dict.fromkeys(scenario.models, "remote"),
        engines=about.get("engines") or dict.fromkeys(scenario.models, f"unknown, behind {name}"),
        telemetry_source=about.get("telemetry_source", "none"),
        machine=_machine(),
        interrupted=replay.stopped,
        failure=failure,
        notes=[
            *supply.differences(scenario.deployment),
            *supply.assumptions(deployment),
            *about.get("notes", []),
            *_notes(schedule, tables.requests),
        ],
        gpuplan_version=__version__,
    )
    return Run(meta, *tables, decisions=server.decisions if server else ())


def _vocabulary(source: ModelSource) -> Any:
    """What counts the model's tokens; None where words do: for an emulated model, and where the files are not here."""
    if source.emulated:
        return None
    try:
        return model_files.vocabulary(source.onnx or f"{model_files.BUILTIN}{source.builtin}")
    except InputError:
        return None


async def _reach(pool: Pool, target: Target, requests: int) -> None:
    try:
        await pool.warm(min(WARM_CONNECTIONS, requests))
    except OSError as error:
        raise RunError(f"cannot reach {target}: {error.strerror or error}") from None


def _notes(schedule: Schedule, requests: pd.DataFrame) -> list[str]:
    notes = []
    sent = requests[~requests["warmup"].astype(bool)]
    if schedule.clipped:
        notes.append(f"{schedule.clipped} drawn lengths were cut to the model's context window")
    late_ms = summary.statistics(summary.send_lag_ms(sent))["p99"]
    if late_ms is not None and late_ms > LATE_MS:
        notes.append(f"requests left late (p99 {late_ms:.1f} ms): the load generator or its host was a limit")
    return notes


def _machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "gpus": [msgspec.to_builtins(card) for card in nvml.discover()],
    }


# --- around the replay --------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _quiet() -> AsyncIterator[None]:
    """No garbage collection while requests are sent: a full one stops the loop for tens of milliseconds."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@contextlib.asynccontextmanager
async def _interruptible(replay: Replay) -> AsyncIterator[None]:
    """Ctrl-C stops the sending; a second one ends everything."""
    loop = asyncio.get_running_loop()
    try:
        loop.add_signal_handler(signal.SIGINT, replay.stop)
    except (NotImplementedError, ValueError, RuntimeError):  # not the main thread, or a platform without it
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


@contextlib.asynccontextmanager
async def _ticking(
    replay: Replay, schedule: Schedule, on_tick: Callable[[Progress], None] | None
) -> AsyncIterator[None]:
    async def tick() -> None:
        while on_tick is not None:
            on_tick(_progress(replay, schedule))
            await asyncio.sleep(TICK_S)

    task = asyncio.get_running_loop().create_task(tick())
    try:
        yield
    finally:
        task.cancel()
        if on_tick is not None:
            on_tick(_progress(replay, schedule))


def _progress(replay: Replay, schedule: Schedule) -> Progress:
    waits_ms = sorted(replay.recent_ms)
    sent = len(replay.exchanges)
    return Progress(
        elapsed_s=max(time.monotonic() - replay.start_s, 0.0) if replay.start_s else 0.0,
        duration_s=schedule.duration_s,
        requests=len(schedule.requests),
        sent=sent,
        in_flight=replay.in_flight,
        ended=sent - replay.in_flight,
        failed=replay.failed,
        e2el_ms_p50=waits_ms[len(waits_ms) // 2] if waits_ms else None,
        e2el_ms_p95=waits_ms[int(len(waits_ms) * 0.95)] if waits_ms else None,
    )
