"""The wire against servers that behave and servers that do not: every fault is a kind of error, none is an exception."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from gpuplan.errors import InputError
from gpuplan.load import wire
from gpuplan.load.wire import Exchange, Pool, Target

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def head(reader: asyncio.StreamReader) -> bytes:
    return await reader.readuntil(b"\r\n\r\n")


def said(*pieces: bytes | float, close: bool = False) -> Talk:
    """A server that says the pieces to every request, waiting where a number stands."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await head(reader)
            for piece in pieces:
                if isinstance(piece, bytes):
                    writer.write(piece)
                    await writer.drain()
                else:
                    await asyncio.sleep(piece)
            if close:
                writer.close()
                return

    return talk


def exchange_with(talk: Talk, *, requests: int = 1, timeout_s: float = 2.0) -> list[Exchange]:
    """What comes back from a server that talks so, one request after the other."""

    async def main() -> list[Exchange]:
        async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await talk(reader, writer)
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(guarded, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        target = Target.parse(f"http://127.0.0.1:{port}")
        pool = Pool(target, timeout_s=timeout_s)
        exchanges = []
        for _ in range(requests):
            exchanges.append(Exchange())
            await asyncio.wait_for(pool.send(target.request("GET", "/"), exchanges[-1]), 5)
        pool.close()
        server.close()
        return exchanges

    return asyncio.run(main())


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

FAULTS: list[tuple[str, Talk, str | None, int | None]] = [
    ("a plain answer", said(OK, b"hello"), None, 200),
    ("an answer in pieces", said(OK[:10], OK[10:], b"he", 0.01, b"llo"), None, 200),
    ("chunks", said(CHUNKED, b"5\r\nhello\r\n0\r\n\r\n"), None, 200),
    ("a refusal", said(b"HTTP/1.1 429 No\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n"), None, 429),
    ("an answer that ends with the connection", said(b"HTTP/1.1 200 OK\r\n\r\nhello", close=True), "disconnected", 200),
    ("a connection closed before any answer", said(close=True), "disconnected", None),
    ("a half-closed stream", said(CHUNKED, b"5\r\nhello\r\n", close=True), "disconnected", 200),
    ("not HTTP at all", said(b"SSH-2.0-OpenSSH_9.2\r\n"), "malformed", None),
    ("a malformed chunk", said(CHUNKED, b"zz\r\nhello\r\n"), "malformed", 200),
    ("silence", said(60.0), "timeout", None),
    ("silence in mid-stream", said(CHUNKED, b"5\r\nhello\r\n", 60.0), "timeout", 200),
]


@pytest.mark.parametrize(("what", "talk", "error", "status"), FAULTS, ids=[f[0] for f in FAULTS])
def test_faults_are_kinds_of_error(what: str, talk: Talk, error: str | None, status: int | None) -> None:
    (exchange,) = exchange_with(talk, timeout_s=0.3)
    assert (exchange.error, exchange.status) == (error, status)
    assert exchange.sent_s is not None
    assert exchange.done_s is not None
    assert exchange.done_s >= exchange.sent_s


def test_each_piece_has_the_time_at_which_it_came() -> None:
    (exchange,) = exchange_with(said(CHUNKED, b"2\r\nab\r\n", 0.05, b"2\r\ncd\r\n0\r\n\r\n"))
    (first_s, ab), (second_s, cd) = exchange.pieces
    assert (ab, cd) == (b"ab", b"cd")
    assert 0.04 < second_s - first_s < 0.5


def test_a_connection_is_used_again_until_the_server_says_close() -> None:
    connections = 0

    async def counting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await head(reader)
        writer.write(OK + b"hello")
        await head(reader)
        writer.write(OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + b"hello")

    exchanges = exchange_with(counting, requests=6)
    assert [(e.error, e.status) for e in exchanges] == [(None, 200)] * 6
    assert connections == 3


def test_an_unreachable_target_is_an_error_of_its_own() -> None:
    async def main() -> Exchange:
        exchange = Exchange()
        await Pool(Target.parse("http://127.0.0.1:9"), timeout_s=1).send(b"", exchange)
        return exchange

    assert asyncio.run(main()).error == "connect"


def test_an_endless_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "RESPONSE_BYTES_MAX", 1000)
    (exchange,) = exchange_with(said(b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n", b"x" * 5000))
    assert exchange.error == "response_too_large"


@pytest.mark.parametrize("url", ["", "nonsense", "ftp://x", "http://", "http://x:99999"])
def test_what_is_not_a_url_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="not a target"):
        Target.parse(url)


def test_a_target_keeps_path_and_port() -> None:
    target = Target.parse("http://[::1]:8080/prefix/")
    assert (target.host, target.port, target.path) == ("::1", 8080, "/prefix")
    assert target.request("POST", "/v1", b"{}").startswith(b"POST /prefix/v1 HTTP/1.1\r\nHost: [::1]:8080\r\n")
