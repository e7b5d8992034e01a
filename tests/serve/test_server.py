"""The asyncio driver: what a request gets when engines answer, fail, or stall."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from gpuplan.scenario.deployment import Deployment
from gpuplan.serve.engines import Output
from gpuplan.serve.server import RequestFailed, RequestRefused, Server, Ticket

from .conftest import FakeEngine


def drive(deployment: Deployment, scene: Callable[[Server, dict[str, FakeEngine]], Awaitable[None]]) -> None:
    """Runs a scene on a started server and checks the core's invariants after it."""

    async def main() -> None:
        engines = {r.id: FakeEngine() for r in deployment.replicas}
        server = Server(deployment, engines)
        await server.start()
        await asyncio.wait_for(scene(server, engines), 5)
        server.core.check_invariants()
        await server.close()
        assert all(engine.closed for engine in engines.values())

    asyncio.run(main())


async def read(ticket: Ticket) -> list[str]:
    return [output.text async for output in ticket]


def test_a_decoder_streams_as_many_tokens_as_asked(fake_deployment: Deployment) -> None:
    async def scene(server: Server, engines: dict[str, FakeEngine]) -> None:
        ticket = server.submit("chat", server.tokenize("chat", "a b c"), output_tokens=5)
        assert await read(ticket) == ["t1 "] * 5
        assert server.core.in_flight == 0

    drive(fake_deployment, scene)


def test_requests_that_wait_together_run_together(fake_deployment: Deployment) -> None:
    async def scene(server: Server, engines: dict[str, FakeEngine]) -> None:
        engine = engines["mood-0"]
        engine.gate.clear()
        tickets = [server.submit("mood", server.tokenize("mood", "x"), output_tokens=0) for _ in range(5)]
        engine.gate.set()
        assert [await read(t) for t in tickets] == [[f"t{i} "] for i in range(1, 6)]
        assert [len(step.prefills) for step in engine.steps] == [1, 2, 2], "the first alone, then full batches of 2"

    drive(fake_deployment, scene)


def test_a_full_queue_refuses_with_a_time_to_come_back(fake_deployment: Deployment) -> None:
    async def scene(server: Server, engines: dict[str, FakeEngine]) -> None:
        engines["mood-0"].gate.clear()
        tickets = [server.submit("mood", server.tokenize("mood", "x"), output_tokens=0) for _ in range(6)]
        with pytest.raises(RequestRefused) as refused:  # one runs, four wait, the sixth is too many
            await read(tickets[5])
        assert refused.value.reason == "queue_full"
        assert refused.value.retry_after_s >= 1
        engines["mood-0"].gate.set()
        assert [len(await read(t)) for t in tickets[:5]] == [1] * 5

    drive(fake_deployment, scene)


def test_a_failed_step_fails_its_requests_and_the_next_is_served(fake_deployment: Deployment) -> None:
    async def scene(server: Server, engines: dict[str, FakeEngine]) -> None:
        engines["chat-0"].failure = RuntimeError("CUDA error")
        with pytest.raises(RequestFailed, match="engine_error: RuntimeError"):
            await read(server.submit("chat", server.tokenize("chat", "a"), output_tokens=3))
        engines["chat-0"].failure = None
        assert len(await read(server.submit("chat", server.tokenize("chat", "a"), output_tokens=3))) == 3

    drive(fake_deployment, scene)


def test_a_poisoned_request_fails_alone_and_its_batch_mates_are_answered(fake_deployment: Deployment) -> None:
    async def scene(server: Server, engines: dict[str, FakeEngine]) -> None:
        engines["mood-0"].gate.clear()
        texts = ["a", "poison", "b", "c"]
        tickets = [server.submit("mood", server.tokenize("mood", text), output_tokens=0) for text in texts]
        engines["mood-0"].gate.set()
        for text, ticket in zip(texts, tickets, strict=True):
            if text == "poison":
                with pytest.raises(RequestFailed, match="engine_error: RuntimeError"):
                    await read(ticket)
            else:
                assert len(await read(ticket)) == 1, text

    drive(fake_deployment, scene)


def test_a_bad_output_fails_its_request_alone(fake_deployment: Deployment) -> None:
    async def scene(server: Server, engines: dict[str, FakeEngine]) -> None:
        engine = engines["mood-0"]
        engine.gate.clear()
        engine.bad = {2}
        tickets = [server.submit("mood", server.tokenize("mood", "x"), output_tokens=0) for _ in range(3)]
        engine.gate.set()
        assert await read(tickets[0]) == ["t1 "]
        with pytest.raises(RequestFailed, match="nan_output"):
            await read(tickets[1])
        assert await read(tickets[2]) == ["t3 "], "its batch-mate"

    drive(fake_deployment, scene)


def test_a_cancelled_request_frees_its_place(fake_deployment: Deployment) -> None:
    async def scene(server: Server, engines: dict[str, FakeEngine]) -> None:
        engine = engines["chat-0"]
        ticket = server.submit("chat", server.tokenize("chat", "a"), output_tokens=10_000)
        first = await anext(aiter(ticket))
        assert first == Output("t1 ")
        server.cancel(ticket)
        for _ in range(10):
            await asyncio.sleep(0)
        assert server.core.in_flight == 0
        steps = len(engine.steps)
        await asyncio.sleep(0.01)
        assert len(engine.steps) == steps, "nothing runs for nobody"

    drive(fake_deployment, scene)


def test_a_drain_lets_the_running_finish_and_refuses_the_new(fake_deployment: Deployment) -> None:
    async def scene(server: Server, engines: dict[str, FakeEngine]) -> None:
        running = server.submit("chat", server.tokenize("chat", "a"), output_tokens=20)
        draining = asyncio.create_task(server.drain(5))
        await asyncio.sleep(0)
        with pytest.raises(RequestRefused) as refused:
            await read(server.submit("chat", server.tokenize("chat", "a"), output_tokens=1))
        assert refused.value.reason == "draining"
        assert not server.core.ready()
        assert len(await read(running)) == 20
        assert await draining

    drive(fake_deployment, scene)


def test_a_drain_that_takes_too_long_says_so(fake_deployment: Deployment) -> None:
    async def scene(server: Server, engines: dict[str, FakeEngine]) -> None:
        engines["chat-0"].gate.clear()
        server.submit("chat", server.tokenize("chat", "a"), output_tokens=1)
        assert not await server.drain(0.01)

    drive(fake_deployment, scene)
