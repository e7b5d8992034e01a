"""Replicas that come and go while clients are being answered: by the autoscaler, and by a swap in between."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from gpuplan.errors import RunError
from gpuplan.policy.vocabulary import Action, Drain, Event, Scale, Wake
from gpuplan.scenario import deployment
from gpuplan.scenario.build import build
from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.deployment import Deployment, Replica
from gpuplan.serve.server import Server
from gpuplan.serve.service import Service

from .test_fleet import Version, ask, said, to
from .test_http import run

QUICK = {
    "scale_up_window": 0, "stabilization_window": "300ms", "cooldown": "100ms", "scale_to_zero_after": "300ms",
}  # fmt: skip


def scenario(least: int, most: int = 3, **rule: Any) -> dict[str, Any]:
    """A decoder, one request at a time on each of at most `most` slices; looked at ten times a second."""
    return {
        "name": "scaled",
        "models": {"chat": {"emulate": "phi-2"}},
        "deployment": {
            "gpu": "a100-80gb",
            "mig": ["2g.20gb"] * 3,
            "replicas": [{"model": "chat", "slice": "2g.20gb"}],
            "batching": {"chat": {"max_batch_size": 1}},
            "autoscale": {
                "cold_start": "50ms",
                "interval": "100ms",
                "models": {"chat": {"min_replicas": least, "max_replicas": most, **QUICK, **rule}},
            },
        },
    }


def resolved(*arguments: Any, **rule: Any) -> Deployment:
    return deployment.resolve(build(scenario(*arguments, **rule), Scenario))


async def until(true: Callable[[], bool], timeout_s: float = 10) -> None:
    for _ in range(int(timeout_s / 0.01)):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came true")


# --- over HTTP, on emulated cards ---------------------------------------------------------------------------------


def test_replicas_come_with_the_load_and_go_with_it() -> None:
    async def scene(client: httpx.AsyncClient, service: Service) -> None:
        fleet, body = service.server.fleet, {"model": "chat", "prompt": "a b", "max_tokens": 10}
        assert fleet.serving["chat"] == ["chat-0"]
        asked = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(40)]
        await until(lambda: len(fleet.serving["chat"]) == 3)
        assert {(await answer).status_code for answer in asked} == {200}
        assert service.recorder is not None
        assert set(service.recorder.server_rows().served["replica"]) == {"chat-0", "chat-1", "chat-2"}
        await until(lambda: len(fleet.serving["chat"]) == 1)
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        service.server.core.check_invariants()

    run(scenario(1), scene)


def test_a_model_scaled_to_zero_comes_back_for_whoever_asks() -> None:
    async def scene(client: httpx.AsyncClient, service: Service) -> None:
        fleet, body = service.server.fleet, {"model": "chat", "prompt": "a b", "max_tokens": 2}
        for _ in range(2):
            await until(lambda: not fleet.serving["chat"])
            await until(lambda: service.server.core.replicas("chat")["standby"] == 3)
            assert (await client.get("/health/ready")).status_code == 200, "it will serve whoever asks"
            assert service.about()["provenance"] == {"chat": "emulated"}
            both = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(2)))
            assert [answer.status_code for answer in both] == [200, 200]
            assert len(fleet.serving["chat"]) >= 1
        service.server.core.check_invariants()

    run(scenario(0), scene)


# --- with engines that say which version they are -----------------------------------------------------------------


class Log:
    """A server's events, each with the actions that came of it."""

    def __init__(self) -> None:
        self.lines: list[tuple[Event, list[Action]]] = []

    def decided(self, event: Event, actions: list[Action], *, now_s: float) -> None:
        self.lines.append((event, actions))


def drive(supply: Deployment, scene: Callable[[Server, Log], Awaitable[None]]) -> None:
    async def main() -> None:
        log = Log()
        server = Server(supply, {r.id: Version("1") for r in supply.every_replica()}, [log])
        await server.start()
        await asyncio.wait_for(scene(server, log), 30)
        server.core.check_invariants()
        await server.close()

    asyncio.run(main())


class Load:
    """Clients that ask again and again, and what they were told last."""

    def __init__(self, server: Server, clients: int) -> None:
        self.texts: list[str] = []
        self._server = server
        self._clients = [asyncio.create_task(self._ask()) for _ in range(clients)]

    async def _ask(self) -> None:
        while True:
            self.texts.append(await said(ask(self._server, tokens=20)))

    async def stop(self) -> None:
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        assert all(isinstance(e, asyncio.CancelledError) for c in self._clients if (e := _error(c)) is not None)


def _error(task: asyncio.Task[None]) -> BaseException | None:
    return asyncio.CancelledError() if task.cancelled() else task.exception()


def serving(server: Server) -> int:
    return len(server.fleet.serving["chat"])


def versions(server: Server) -> set[str]:
    """Of every engine that there is, whether it serves or stands by."""
    return {engine.name for engine in server.fleet.engines.values() if isinstance(engine, Version)}


@pytest.mark.parametrize("beside", [True, False])
def test_a_swap_while_scaled_up_takes_them_all_along(beside: bool) -> None:
    """Two swaps with a way down and up again after each: whatever is started is of the last version."""

    async def scene(server: Server, log: Log) -> None:
        for version in "23":
            load = Load(server, 30)
            await until(lambda: serving(server) == 3)
            await server.swap("chat", to(version), beside=beside)
            await until(lambda: versions(server) == {version})  # noqa: B023
            await until(lambda: load.texts[-1] == version * 20)  # noqa: B023
            await load.stop()
            assert all(len(set(text)) == 1 for text in load.texts), "no text is of two versions"
            await until(lambda: serving(server) == 1)
            assert sum(server.core.replicas("chat").values()) == 3, "no version is left over"

    drive(resolved(1), scene)


@pytest.mark.parametrize("beside", [True, False])
def test_what_stands_by_while_others_are_swapped_starts_as_the_new_version(beside: bool) -> None:
    """As it is in the deployment, and as a version of an earlier swap."""

    async def scene(server: Server, log: Log) -> None:
        async def full() -> set[str]:
            """What is said when all have come."""
            load = Load(server, 30)
            await until(lambda: serving(server) == 3)
            seen = len(load.texts)
            await until(lambda: len(load.texts) > seen + 60)
            await load.stop()
            return {text[0] for text in load.texts}

        await server.swap("chat", to("2"), beside=beside)
        assert await full() == {"2"}
        await server.swap("chat", to("3"), beside=beside)
        await until(lambda: serving(server) == 1)
        await server.swap("chat", to("4"), beside=beside)
        assert await full() == {"4"}

    drive(resolved(1), scene)


@pytest.mark.parametrize("beside", [True, False])
def test_a_swap_while_replicas_are_being_started_leaves_no_old_one(beside: bool) -> None:
    """They take long to load, and so does the new version: one may come up before the other, whichever way."""

    class Slow(Version):
        load_s = 0.15

        async def load(self) -> None:
            await asyncio.sleep(self.load_s)
            await super().load()

    async def scene(server: Server, log: Log) -> None:
        for name, load_s in (("2", 0.05), ("3", 0.3)):
            for engine in server.fleet.engines.values():
                engine.__class__ = Slow
            load = Load(server, 30)
            await until(lambda: server.core.replicas("chat")["starting"] > 0)
            await asyncio.sleep(0.1)  # past the emulated cold start, in the middle of a load

            def make(replica: Replica) -> Slow:
                version = Slow(name)  # noqa: B023
                version.load_s = load_s  # noqa: B023
                return version

            await server.swap("chat", make, beside=beside)
            await until(lambda: serving(server) == 3 and versions(server) == {name})  # noqa: B023
            await load.stop()
            await until(lambda: serving(server) == 1)
            assert sum(server.core.replicas("chat").values()) == 3

    drive(resolved(1), scene)


def test_a_swap_while_replicas_go_leaves_none_of_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """The new versions take so long to load that two of the three places are given up meanwhile."""

    class Slow(Version):
        async def load(self) -> None:
            await asyncio.sleep(0.4)
            await super().load()

    async def scene(server: Server, log: Log) -> None:
        load = Load(server, 30)
        await until(lambda: serving(server) == 3)
        await load.stop()
        await until(lambda: server.core.replicas("chat")["stopping"] > 0 or serving(server) < 3)
        await server.swap("chat", lambda replica: Slow("2"))
        await until(lambda: versions(server) == {"2"})
        await until(lambda: serving(server) == 1)
        assert server.core.replicas("chat") == {"ready": 1, "starting": 0, "stopping": 0, "standby": 2}
        assert await said(ask(server)) == "2" * 20

    drive(resolved(1), scene)


def test_a_model_without_a_replica_has_nothing_to_swap() -> None:
    async def scene(server: Server, log: Log) -> None:
        await until(lambda: serving(server) == 0)
        with pytest.raises(RunError, match="no replica now"):
            await server.swap("chat", to("2"))
        assert await said(ask(server)) == "1" * 20

    drive(resolved(0), scene)


def test_a_replica_that_does_not_load_is_tried_again_and_nobody_waits_for_it() -> None:
    async def scene(server: Server, log: Log) -> None:
        second = server.fleet.engines["chat-1"]
        assert isinstance(second, Version)
        second.load_failure = RunError("no such weights")
        load = Load(server, 10)
        await until(lambda: "chat-2" in server.fleet.serving["chat"] or second.closed is False)
        await asyncio.sleep(0.2)
        assert "chat-1" not in server.fleet.serving["chat"] and load.texts
        second.load_failure = None
        await until(lambda: "chat-1" in server.fleet.serving["chat"])
        await load.stop()

    drive(resolved(1), scene)


def test_a_draining_server_changes_nothing_and_sleeps() -> None:
    async def scene(server: Server, log: Log) -> None:
        engine = server.fleet.engines["chat-0"]
        assert isinstance(engine, Version)
        engine.gate.clear()
        running = [ask(server, tokens=3) for _ in range(8)]
        draining = asyncio.create_task(server.drain(10))
        await asyncio.sleep(0.5)
        since = [event for event, _ in log.lines].index(Drain())
        assert sum(isinstance(event, Wake) for event, _ in log.lines[since:]) < 10, "it does not spin"
        engine.gate.set()
        for ticket in running:
            assert await said(ticket) == "111"
        assert await draining
        assert not any(isinstance(action, Scale) for _, actions in log.lines[since:] for action in actions)

    drive(resolved(1), scene)
