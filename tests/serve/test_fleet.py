"""Versions that come and go under load: nobody is failed by a swap, and a version that does not load changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from gpuplan.errors import RunError
from gpuplan.scenario.deployment import Deployment, Replica
from gpuplan.serve.engines import EngineLost
from gpuplan.serve.server import Server, Ticket
from tests.serve.test_worker import answer, worker

from .conftest import FakeEngine


class Version(FakeEngine):
    """A fake whose every step takes a little while and says which version it is of."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    async def run(self, step: Any, prompts: Any, *, asked_s: float) -> Any:
        if self.closed:
            raise EngineLost("closed")
        outputs = await super().run(step, prompts, asked_s=asked_s)
        await asyncio.sleep(0.001)
        return {i: type(o)(self.name, o.end, error=o.error) for i, o in outputs.items()}

    async def load(self) -> None:
        self.closed = False
        await asyncio.sleep(0.005)
        await super().load()


def drive(deployment: Deployment, scene: Callable[[Server], Awaitable[None]]) -> None:
    async def main() -> None:
        server = Server(deployment, {r.id: Version("1") for r in deployment.replicas})
        await server.start()
        await asyncio.wait_for(scene(server), 20)
        server.core.check_invariants()
        await server.close()

    asyncio.run(main())


def ask(server: Server, model: str = "chat", tokens: int = 20) -> Ticket:
    return server.submit(model, server.tokenize(model, "a b"), output_tokens=tokens)


async def said(ticket: Ticket) -> str:
    return "".join([output.text async for output in ticket])


def to(name: str) -> Callable[[Replica], Version]:
    return lambda replica: Version(name)


@pytest.mark.parametrize("beside", [True, False])
def test_what_runs_ends_on_the_old_and_what_waits_goes_to_the_new(fake_deployment: Deployment, beside: bool) -> None:
    async def scene(server: Server) -> None:
        old = server.fleet.engines["chat-0"]
        running = [ask(server, tokens=40) for _ in range(4)]  # as many as run at once
        await asyncio.sleep(0.005)
        waiting = [ask(server) for _ in range(2)]
        await asyncio.sleep(0.01)
        await server.swap("chat", to("2"), beside=beside)
        late = ask(server)
        assert {await said(t) for t in running} == {"1" * 40}
        assert {await said(t) for t in waiting} <= {"1" * 20, "2" * 20}
        assert await said(late) == "2" * 20
        while list(server.fleet.engines) != ["mood-0", "chat-0#2"]:
            await asyncio.sleep(0.001)
        assert isinstance(old, Version) and old.closed

    drive(fake_deployment, scene)


@pytest.mark.parametrize("beside", [True, False])
def test_a_version_that_does_not_load_leaves_the_old_one_serving(fake_deployment: Deployment, beside: bool) -> None:
    def broken(replica: Replica) -> Version:
        version = Version("2")
        version.load_failure = RunError("no such weights")
        return version

    async def scene(server: Server) -> None:
        running = ask(server, tokens=30)
        with pytest.raises(RunError, match="no such weights"):
            await server.swap("chat", broken, beside=beside)
        assert await said(running) == "1" * 30
        assert await said(ask(server)) == "1" * 20
        assert list(server.fleet.engines) == ["chat-0", "mood-0"] and server.core.ready()
        await server.swap("chat", to("3"), beside=beside)
        assert await said(ask(server)) == "3" * 20, "the next one may do better"

    drive(fake_deployment, scene)


def test_another_tokenizer_is_another_model(fake_deployment: Deployment) -> None:
    class Other(Version):
        def tokenize(self, text: str) -> bytes:
            return bytes(len(text))

    async def scene(server: Server) -> None:
        with pytest.raises(RunError, match="another tokenizer"):
            await server.swap("chat", lambda replica: Other("2"))
        assert await said(ask(server)) == "1" * 20

    drive(fake_deployment, scene)


def test_one_swap_at_a_time(fake_deployment: Deployment) -> None:
    async def scene(server: Server) -> None:
        first = asyncio.create_task(server.swap("chat", to("2")))
        await asyncio.sleep(0)
        with pytest.raises(RunError, match="being swapped already"):
            await server.swap("chat", to("3"))
        await first
        assert await said(ask(server)) == "2" * 20

    drive(fake_deployment, scene)


def test_without_memory_for_both_the_old_one_has_to_drain(fake_deployment: Deployment) -> None:
    """A 3g.40gb holds llama-3-8b twice, but not beside 150,000 tokens of cache."""

    async def scene(server: Server) -> None:
        limit = server.core.kv_free("chat-0")
        assert limit is not None
        full = [server.submit("chat", server.tokenize("chat", "a"), output_tokens=limit // 4 - 1) for _ in range(4)]
        await asyncio.sleep(0.005)
        with pytest.raises(RunError, match="no memory to load chat beside"):
            await server.swap("chat", to("2"))
        for ticket in full:
            server.cancel(ticket)
        await asyncio.sleep(0.01)
        await server.swap("chat", to("3"))
        assert await said(ask(server)) == "3" * 20

    drive(fake_deployment, scene)


def test_a_version_that_dies_while_it_retires_fails_only_what_it_ran(fake_deployment: Deployment) -> None:
    async def scene(server: Server) -> None:
        old = server.fleet.engines["chat-0"]
        running = ask(server, tokens=1000)
        await anext(aiter(running))
        await server.swap("chat", to("2"))
        assert isinstance(old, Version)
        old.lose()
        assert await answer(running) == "replica_lost"
        assert await said(ask(server)) == "2" * 20
        while "chat-0" in server.fleet.engines:
            await asyncio.sleep(0.001)

    drive(fake_deployment, scene)


@pytest.mark.parametrize("model", ["chat", "mood"])
def test_twenty_swaps_under_traffic_fail_nobody(fake_deployment: Deployment, model: str) -> None:
    async def scene(server: Server) -> None:
        texts: list[str] = []
        over = asyncio.Event()

        async def client() -> None:
            while not over.is_set():
                texts.append(await said(ask(server, model, 10 if model == "chat" else 0)))

        clients = [asyncio.create_task(client()) for _ in range(4)]
        for version in range(2, 22):
            name = chr(ord("A") + version)
            await server.swap(model, to(name), beside=version % 4 != 0)
            while name not in {text[:1] for text in texts}:
                await asyncio.sleep(0.001)
        over.set()
        await asyncio.gather(*clients)
        assert all(len(text) == (10 if model == "chat" else 1) for text in texts)
        assert all(len(set(text)) == 1 for text in texts), "no text is of two versions"
        assert len(set(texts)) >= 20

    drive(fake_deployment, scene)


def test_worker_processes_are_swapped_under_traffic(fake_deployment: Deployment) -> None:
    async def main() -> None:
        engines = {"chat-0": FakeEngine(), "mood-0": worker("v1")}
        server = Server(fake_deployment, engines)
        await server.start()
        answers: list[str] = []
        over = asyncio.Event()

        async def client() -> None:
            while not over.is_set():
                ticket = server.submit("mood", server.tokenize("mood", "a b"), output_tokens=0)
                answers.append((await said(ticket)).partition(":")[0])

        clients = [asyncio.create_task(client()) for _ in range(4)]
        for version in ("v2", "v3"):
            await server.swap("mood", lambda replica, version=version: worker(version))  # type: ignore[misc]
            await asyncio.sleep(0.05)
        over.set()
        await asyncio.gather(*clients)
        assert list(dict.fromkeys(answers)) == ["v1", "v2", "v3"]
        await server.close()

    asyncio.run(asyncio.wait_for(main(), 20))
