"""A whole server: engines, core, observers, telemetry and the HTTP listener, from start to drained end.

Both ways of serving use it: `gpuplan serve` as a process, `gpuplan bench --target in-process` on the load generator's
own event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from gpuplan.errors import InputError
from gpuplan.record.recorder import Recorder
from gpuplan.record.run import Provenance, TelemetrySource
from gpuplan.scenario.demand import ModelSource
from gpuplan.scenario.deployment import Deployment, Replica
from gpuplan.serve import models, versions
from gpuplan.serve.engines import Engine
from gpuplan.serve.faults import Injection
from gpuplan.serve.http.app import App
from gpuplan.serve.http.protocol import BoundedProtocol
from gpuplan.serve.lag import LoopLag
from gpuplan.serve.metrics import Metrics
from gpuplan.serve.server import Observer, Server
from gpuplan.telemetry import choice, nvml
from gpuplan.telemetry.emulated import EmulatedCards
from gpuplan.telemetry.sampler import HZ, Sampler

DRAIN_S = 30.0
SHUTDOWN_S = 1
"""What is left to connections after the drain: their last bytes. A stream that outlived the drain is cut."""


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """How to serve. `record` keeps every decision and sample in memory for the run folder; `telemetry` is a checked
    choice of where samples come from; `api_keys` are bearer tokens by name; `models_dir` is where versions of models
    may be loaded from."""

    host: str = "127.0.0.1"
    port: int = 0
    api_keys: Mapping[str, str] = field(default_factory=dict)
    admin_token: str | None = None
    models_dir: Path | None = None
    allow_cpu: bool = False
    record: bool = False
    sample_hz: float = HZ
    telemetry: str = choice.AUTO
    drain_s: float = DRAIN_S


@dataclass(slots=True)
class Service:
    """A running server. `about()` says what really runs, for `run.json`."""

    url: str
    server: Server
    recorder: Recorder | None
    sampler: Sampler | None
    listener: _Listener
    lag: LoopLag
    notes: list[str] = field(default_factory=list)

    @property
    def telemetry_source(self) -> TelemetrySource:
        return self.sampler.origin if self.sampler else "none"

    async def stopped(self) -> None:
        """Returns when a signal or a fault has ended the listener."""
        await self.listener.over.wait()

    def about(self) -> dict[str, Any]:
        engines = self.server.fleet.engines
        by_model = {r.model: self.server.fleet.engine_of(r.model) for r in self.server.deployment.replicas}
        provenance: dict[str, Provenance] = {name: engine.provenance for name, engine in by_model.items()}
        return {
            "engines": {name: engine.description for name, engine in by_model.items()},
            "provenance": provenance,
            "telemetry_source": self.telemetry_source,
            "notes": [
                *dict.fromkeys([*self.notes, *(self.sampler.problems if self.sampler else ())]),
                *(f"{r}: {note}" for r, engine in engines.items() for note in engine.notes()),
                *self.lag.notes(),
            ],
        }


@contextlib.asynccontextmanager
async def serving(deployment: Deployment, options: ServiceOptions, *, signals: bool = False) -> AsyncIterator[Service]:
    """Starts everything, and on leaving drains it and frees the engines. With `signals`, SIGTERM and SIGINT drain too.

    Raises InputError for an address that cannot be used, and whatever an engine's `load` raises.
    """
    cards, problems = nvml.survey()
    card_present = any(card.known_as == deployment.gpu_name for card in cards)
    injection = Injection(deployment) if deployment.faults else None

    def engine_for(replica: Replica, source: ModelSource | None = None) -> Engine:
        engine = models.engine_for(replica, deployment, cards=cards, allow_cpu=options.allow_cpu, source=source)
        return injection.into(replica, engine) if injection else engine

    engines = {r.id: engine_for(r) for r in deployment.every_replica()}
    metrics = Metrics(deployment)
    recorder = Recorder(deployment) if options.record else None
    emulated = EmulatedCards(deployment) if any(e.provenance == "emulated" for e in engines.values()) else None
    observers: list[Observer] = [o for o in (injection, metrics, recorder, emulated) if o is not None]
    server = Server(deployment, engines, observers)
    lag = LoopLag()
    metrics.watch(server.core, deployment, lag)
    listening = _bind(options.host, options.port)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(listening.close)
        stack.push_async_callback(server.close)
        source = choice.source(options.telemetry, emulated=emulated, cards_here=card_present)
        await server.start()
        lag.start()
        stack.callback(lag.stop)
        sinks = (metrics, recorder) if recorder else (metrics,)
        sampler = Sampler(source, *sinks, hz=options.sample_hz) if source else None
        if sampler:
            sampler.start()
            stack.callback(sampler.stop)

        async def swap_to(model: str, asked: ModelSource, beside: bool) -> None:
            version = versions.checked(asked, deployment.models[model], options.models_dir)
            await server.swap(model, lambda replica: engine_for(replica, version), beside=beside)

        app = App(server, metrics, api_keys=options.api_keys, admin_token=options.admin_token, swap_to=swap_to)
        listener = _Listener(server, app, options.drain_s)
        await stack.enter_async_context(listener.listening(listening, signals=signals))
        host, port = listening.getsockname()[:2]
        service = Service(
            f"http://{f'[{host}]' if ':' in host else host}:{port}",
            server,
            recorder,
            sampler,
            listener,
            lag,
            problems if options.telemetry in (choice.AUTO, "nvml") else [],
        )
        yield service


class _Listener(uvicorn.Server):
    """uvicorn, with a drain in front of its shutdown: the first signal drains, the second ends at once."""

    def __init__(self, server: Server, app: Any, drain_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app, http=BoundedProtocol, ws="none", proxy_headers=False,
                log_level="warning", access_log=False, lifespan="off", server_header=False, timeout_keep_alive=75,
                timeout_graceful_shutdown=SHUTDOWN_S,
                backlog=2048,
            )
        )  # fmt: skip
        self._server, self._drain_s = server, drain_s
        self._loop = asyncio.get_running_loop()
        self._draining: asyncio.Task[None] | None = None
        self.over = asyncio.Event()

    @contextlib.asynccontextmanager
    async def listening(self, listening: socket.socket, *, signals: bool) -> AsyncIterator[None]:
        """Serves on the socket until left, drained first."""
        if signals:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self.handle_exit)
        task = self._loop.create_task(self._serve(sockets=[listening]))
        task.add_done_callback(lambda _: self.over.set())
        while not self.started and not task.done():
            await asyncio.sleep(0.005)
        try:
            yield
        finally:
            self._begin_drain()
            await asyncio.wait([task])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining is not None:
            self.force_exit = self.should_exit = True
            self._loop.call_soon_threadsafe(self._draining.cancel)
        else:
            self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        if self._draining is None:
            self._draining = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        try:
            await self._server.drain(self._drain_s)
        finally:
            self.should_exit = True


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
        listening.setblocking(False)
    except OSError as error:
        raise InputError(
            f"cannot listen there: {error.strerror}", key="--host/--port", value=f"{host}:{port}"
        ) from None
    return listening
