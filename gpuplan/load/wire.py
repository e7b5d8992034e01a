"""HTTP/1.1 as a load generator needs it: bytes out, time-stamped bytes in, nothing parsed before its time.

A `Pool` sends an already serialised request on an idle connection (the one used last, so few are kept warm) or a new
one, and gives an `Exchange`: when the bytes left, the status, and every piece of the body with the time at which the
socket handed it over. Whatever goes wrong ends in `Exchange.error`, never in an exception:
`connect`, `disconnected`, `malformed`, `timeout`, `abandoned`, `interrupted` or `response_too_large`.
One request at a time on a connection; no pipelining, no redirects, no retries.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httptools

from gpuplan.errors import InputError

RESPONSE_BYTES_MAX = 64 << 20
"""A bound on what one answer may hold in memory: 100 times a long stream of tokens."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go. `host_header` is the authority as HTTP wants it."""

    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, url: str, *, key: str = "--target") -> Target:
        """The target of an http or https URL. Raises InputError for anything else."""
        parts = urlsplit(url)
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or not port:
            raise InputError("not a target", key=key, value=url, allowed="local, in-process, or http(s)://host[:port]")
        return cls(parts.scheme, parts.hostname, port, parts.path.rstrip("/"))

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host_header}{self.path}"

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def request(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
        """The bytes of one request."""
        lines = [f"{method} {self.path}{path} HTTP/1.1", f"Host: {self.host_header}", "Accept: */*"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace") + body


class Exchange:
    """One request and what came back. Times are the monotonic clock's; `pieces` are (time, bytes) in order."""

    __slots__ = ("bytes_in", "done", "done_s", "error", "message", "pieces", "sent_s", "status")

    def __init__(self) -> None:
        self.sent_s: float | None = None
        self.done_s: float | None = None
        self.status: int | None = None
        self.pieces: list[tuple[float, bytes]] = []
        self.bytes_in = 0
        self.error: str | None = None
        self.message: str | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def end(self, now_s: float, error: str | None = None, message: str | None = None) -> None:
        """Closes the exchange; only the first end counts."""
        if not self.done.done():
            self.done_s, self.error, self.message = now_s, error, message
            self.done.set_result(None)


class Pool:
    """Connections to one target. `timeout_s` bounds an exchange from its sending to its last byte."""

    def __init__(self, target: Target, *, timeout_s: float) -> None:
        self._target, self._timeout_s = target, timeout_s
        self._tls = ssl.create_default_context() if target.scheme == "https" else None
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()

    async def warm(self, connections: int) -> None:
        """Opens that many connections ahead. Raises OSError when the target cannot be reached."""
        self._idle += await asyncio.gather(*(self._connect() for _ in range(connections)))

    async def send(self, data: bytes, exchange: Exchange, patience_s: float | None = None) -> None:
        """Sends `data` now and returns when the exchange has ended, or hangs up after `patience_s`. Cancelled: the
        connection is dropped."""
        connection = None
        try:
            connection = self._idle.pop() if self._idle else await self._connect()
            while connection.lost:
                connection = self._idle.pop() if self._idle else await self._connect()
            if patience_s is not None and patience_s < self._timeout_s:
                connection.begin(data, exchange, patience_s, "abandoned")
            else:
                connection.begin(data, exchange, self._timeout_s, "timeout")
            await exchange.done
        except OSError as error:
            exchange.sent_s = exchange.sent_s or time.monotonic()
            exchange.end(time.monotonic(), "connect", str(error))
        except asyncio.CancelledError:
            exchange.end(time.monotonic(), "interrupted")
            if connection is not None:
                connection.drop()
            raise
        if connection is not None and not connection.lost:
            self._idle.append(connection)

    def close(self) -> None:
        """Drops every connection."""
        for connection in list(self._open):
            connection.drop()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        server_name = self._target.host if self._tls else None
        connecting = loop.create_connection(
            lambda: _Connection(self._open),
            self._target.host,
            self._target.port,
            ssl=self._tls,
            server_hostname=server_name,
        )
        try:
            _, connection = await asyncio.wait_for(connecting, self._timeout_s)
        except TimeoutError:
            raise OSError("connecting took too long") from None
        return connection


class _Connection(asyncio.Protocol):
    """One connection and the exchange that is on it. The callbacks below `data_received` are httptools'."""

    def __init__(self, register: set[_Connection]) -> None:
        self._register = register
        self._transport: Any = None
        self._parser: Any = None
        self._exchange: Exchange | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._now_s = 0.0
        self._complete = False
        self._keep_alive = False
        self.lost = False

    def begin(self, data: bytes, exchange: Exchange, timeout_s: float, otherwise: str) -> None:
        """Sends, and ends the exchange as `otherwise` when it is not complete in time."""
        self._exchange = exchange
        self._complete = False
        self._parser = httptools.HttpResponseParser(self)
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self._timed_out, otherwise)
        exchange.sent_s = time.monotonic()
        self._transport.write(data)

    def drop(self) -> None:
        self.lost = True
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio ---------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._register.add(self)

    def data_received(self, data: bytes) -> None:
        self._now_s = time.monotonic()
        if self._exchange is None:
            self.drop()  # bytes that nobody asked for
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._finish("malformed", str(error))
            return
        if self._complete:
            self._finish(None, None)
            if not self._keep_alive:
                self.drop()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        self._register.discard(self)
        if self._exchange is not None:
            self._now_s = time.monotonic()
            self._finish("disconnected", str(error) if error else "the server closed the connection")

    # --- httptools -------------------------------------------------------------------------------------------------

    def on_headers_complete(self) -> None:
        if self._exchange is not None:
            self._exchange.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        exchange = self._exchange
        if exchange is None:
            return
        exchange.bytes_in += len(body)
        if exchange.bytes_in > RESPONSE_BYTES_MAX:
            self._finish("response_too_large", f"more than {RESPONSE_BYTES_MAX} bytes")
            self.drop()
            return
        exchange.pieces.append((self._now_s, body))

    def on_message_complete(self) -> None:
        self._complete = True
        self._keep_alive = self._parser.should_keep_alive()

    # --- ends ------------------------------------------------------------------------------------------------------

    def _timed_out(self, error: str) -> None:
        self._now_s = time.monotonic()
        self._finish(error, "no complete answer in time")
        self.drop()

    def _finish(self, error: str | None, message: str | None) -> None:
        exchange, self._exchange = self._exchange, None
        if self._timer is not None:
            self._timer.cancel()
        if error:
            self.lost = True
        if exchange is not None:
            exchange.end(self._now_s, error, message)
        if error and self._transport is not None:
            self._transport.abort()
