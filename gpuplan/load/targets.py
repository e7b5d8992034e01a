"""What a bench sends to: a server process of its own, a server on its own event loop, or somebody's URL.

`opened(name, ...)` gives a `Target` to send to and, once it is closed, what the server told of the run. The server's
rows are on the machine's monotonic clock until they are counted from the run's start.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

import msgspec

from gpuplan.errors import RunError
from gpuplan.load.wire import Target
from gpuplan.record import store
from gpuplan.record.recorder import Recorder, ServerRows
from gpuplan.scenario import files
from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.deployment import Deployment
from gpuplan.serve.service import Service, ServiceOptions, serving
from gpuplan.telemetry import choice, nvml
from gpuplan.telemetry.sampler import HZ, Sampler

START_S_MAX = 120.0
"""How long a server process may take to load its models."""


class OpenTarget(Protocol):
    """A target while it is open; `close` ends what bench started and gives what the server told."""

    target: Target

    @property
    def failure(self) -> str | None: ...

    async def close(self, start_s: float) -> tuple[ServerRows | None, dict[str, Any]]: ...


@contextlib.asynccontextmanager
async def opened(
    name: str,
    scenario: Scenario,
    deployment: Deployment,
    *,
    allow_cpu: bool,
    sample_hz: float = HZ,
    telemetry: str = choice.AUTO,
) -> AsyncIterator[OpenTarget]:
    """The target of that name. Raises InputError for a name that is none, RunError when a server does not start."""
    if name == "in-process":
        options = ServiceOptions(record=True, allow_cpu=allow_cpu, sample_hz=sample_hz, telemetry=telemetry)
        async with serving(deployment, options) as service:
            yield _InProcess(service)
    elif name == "local":
        with tempfile.TemporaryDirectory(prefix="gpuplan-") as folder:
            flags = ["--sample-hz", str(sample_hz), "--telemetry", telemetry]
            flags += ["--allow-cpu"] if allow_cpu else []
            process = await _Process.start(scenario, Path(folder), flags)
            try:
                yield process
            finally:
                await process.end()
    else:
        remote = _Remote(Target.parse(name), deployment, sample_hz, telemetry)
        try:
            yield remote
        finally:
            remote.end()


class _InProcess:
    failure: str | None = None

    def __init__(self, service: Service) -> None:
        self._service = service
        self.target = Target.parse(service.url)

    async def close(self, start_s: float) -> tuple[ServerRows | None, dict[str, Any]]:
        await self._service.server.drain(0.0)
        recorder = self._service.recorder
        assert recorder is not None, "opened() asks for a recorder"
        rows = recorder.server_rows(start_s=start_s)
        return rows._replace(decisions=store.shifted_decisions(rows.decisions, start_s)), self._service.about()


class _Process:
    """`gpuplan serve` in a process group of its own, so that a Ctrl-C meant for bench does not reach it."""

    def __init__(self, process: asyncio.subprocess.Process, target: Target, records: Path) -> None:
        self._process, self._records, self.target = process, records, target
        self._chatter = asyncio.get_running_loop().create_task(_last_lines(process.stderr))

    @classmethod
    async def start(cls, scenario: Scenario, folder: Path, flags: list[str]) -> _Process:
        file = folder / "scenario.yaml"  # JSON is YAML
        file.write_bytes(msgspec.json.encode(files.to_builtins(scenario)))
        arguments = ["serve", str(file), "--port", "0", "--json", "--record", str(folder), *flags]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gpuplan", *arguments,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None and process.stderr is not None, "both are pipes"
        try:
            line = await asyncio.wait_for(process.stdout.readline(), START_S_MAX)
            url = json.loads(line)["url"]
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            if not isinstance(error, TimeoutError | ValueError):
                raise
            said = (await process.stderr.read()).decode(errors="replace").strip().splitlines()
            raise RunError(f"the server did not start: {said[-1] if said else 'it said nothing'}") from None
        return cls(process, Target.parse(url), folder)

    @property
    def failure(self) -> str | None:
        """Why the server is gone, or None while it runs."""
        if self._process.returncode is None:
            return None
        said = self._chatter.result()[-1:] if self._chatter.done() else []
        return f"the server process ended by itself with exit code {self._process.returncode}" + "".join(
            f": {s}" for s in said
        )

    async def close(self, start_s: float) -> tuple[ServerRows | None, dict[str, Any]]:
        await self.end()
        try:
            return await asyncio.to_thread(store.read_server_rows, self._records, start_s=start_s)
        except OSError:
            return None, {}

    async def end(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self._process.wait(), 60.0)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        await self._chatter


class _Remote:
    """Somebody's server: it tells nothing of itself. Where it is on this machine, this machine's cards are read;
    elsewhere it takes an exporter's URL to have telemetry."""

    failure: str | None = None

    def __init__(self, target: Target, deployment: Deployment, sample_hz: float, telemetry: str) -> None:
        self.target = target
        self._recorder = Recorder(deployment, keep_decisions=False)
        self._sampler: Sampler | None = None
        here = telemetry == choice.AUTO and _is_loopback(target.host)
        cards, self._problems = nvml.survey() if here else ([], [])
        source = choice.source(telemetry, cards_here=bool(cards))
        if source is not None:
            self._sampler = Sampler(source, self._recorder, hz=sample_hz)
            self._sampler.start()

    async def close(self, start_s: float) -> tuple[ServerRows | None, dict[str, Any]]:
        self.end()
        sampler = self._sampler
        about = {
            "telemetry_source": sampler.origin if sampler else "none",
            "notes": list(dict.fromkeys([*self._problems, *(sampler.problems if sampler else ())])),
        }
        return self._recorder.server_rows(start_s=start_s), about

    def end(self) -> None:
        if self._sampler:
            self._sampler.stop()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _last_lines(stream: asyncio.StreamReader | None, keep: int = 20) -> list[str]:
    lines: list[str] = []
    while stream is not None and (line := await stream.readline()):
        lines = [*lines[1 - keep :], line.decode(errors="replace").rstrip()]
    return lines
