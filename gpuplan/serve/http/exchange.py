"""One request and its answer, over ASGI as uvicorn speaks it.

An `Exchange` reads the body, bounded in size and in time, and sends one answer or a stream. It is made for small
requests answered in milliseconds: no task, queue or lock is made for one. Whoever waits for an engine does so inside
`watched()`, which ends the wait with ClientGone when the client hangs up. Used by one task at a time.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from gpuplan.serve.http import openai
from gpuplan.serve.http.errors import Refusal

BODY_BYTES_MAX = 4 << 20
"""Four times a 128k-token prompt of English text."""
BODY_S_MAX = 30.0
HANG_UP_S = 0.05
"""From here on a wait looks for the client's hanging up. Looking costs a task, which a shorter wait is spared."""

JSON = b"application/json"
EVENTS = b"text/event-stream"

T = TypeVar("T")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]
Handler = Callable[["Exchange"], Awaitable[None]]

encode = msgspec.json.Encoder().encode


class ClientGone(Exception):
    """The client has hung up: nobody is there to answer."""


class Exchange:
    """`started` says that a status line is out."""

    __slots__ = ("_receive", "_send", "headers", "method", "path", "started")

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: list[tuple[bytes, bytes]] = scope["headers"]
        self.started = False

    def header(self, name: bytes) -> bytes:
        """The first header of that name (lower case), or nothing."""
        return next((value for given, value in self.headers if given == name), b"")

    def request_id(self) -> str:
        """The client's `X-Request-Id` when it is a plain one, or a new one."""
        given = self.header(b"x-request-id")
        if 0 < len(given) <= 128 and given.isascii() and (text := given.decode()).isprintable():
            return text
        return secrets.token_hex(12)

    async def body(self, decoder: msgspec.json.Decoder[T]) -> T:
        """The JSON body. Raises Refusal for one that is too large, too slow or wrong, ClientGone when it breaks off."""
        declared = self.header(b"content-length")
        if declared.isdigit() and int(declared) > BODY_BYTES_MAX:
            raise _too_large()
        with _Cut(Refusal(408, f"the body took longer than {BODY_S_MAX:g} s", headers=_CLOSE)) as cut:
            timer = asyncio.get_running_loop().call_later(BODY_S_MAX, cut.now)
            try:
                raw = await self._raw()
            finally:
                timer.cancel()
        try:
            return decoder.decode(raw)
        except msgspec.ValidationError as error:
            problem, _, where = str(error).partition(" - at ")
            place = where.strip("`").removeprefix("$.")
            raise Refusal(
                400, f"{problem}{f' ({place})' if place else ''}", param=place.partition("[")[0] or None
            ) from None
        except (msgspec.DecodeError, RecursionError):
            raise Refusal(400, "the body is not valid JSON") from None

    async def _raw(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body"):  # all of it at once: nearly always
            whole: bytes = message.get("body", b"")
        else:
            raw = bytearray()
            while message["type"] == "http.request":
                raw += message.get("body", b"")
                if len(raw) > BODY_BYTES_MAX:
                    raise _too_large()
                if not message.get("more_body"):
                    break
                message = await self._receive()
            else:
                raise ClientGone
            whole = bytes(raw)
        if len(whole) > BODY_BYTES_MAX:
            raise _too_large()
        return whole

    def watched(self) -> _Watch:
        """`with exchange.watched(): await ...`: raises ClientGone there once the client has hung up. Only after the
        body was read."""
        return _Watch(self._receive)

    async def answer(self, body: bytes, status: int = 200, headers: Headers = (), kind: bytes = JSON) -> None:
        """The whole answer."""
        self.started = True
        head = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), *headers]
        await self._send({"type": "http.response.start", "status": status, "headers": head})
        await self._send({"type": "http.response.body", "body": body})

    async def refuse(self, refusal: Refusal) -> None:
        """An error as the whole answer."""
        error = openai.error(refusal.status, refusal.message, param=refusal.param)
        await self.answer(encode(error), refusal.status, refusal.headers)

    async def begin(self, headers: Headers = (), kind: bytes = EVENTS) -> None:
        """The head of a stream, a 200. Pieces follow, and at last `end`."""
        self.started = True
        head = [(b"content-type", kind), *headers]
        await self._send({"type": "http.response.start", "status": 200, "headers": head})

    async def piece(self, body: bytes) -> None:
        """More of a stream; waits while the client reads too slowly."""
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self, body: bytes = b"") -> None:
        await self._send({"type": "http.response.body", "body": body})


_CLOSE = ((b"connection", b"close"),)


def _too_large() -> Refusal:
    return Refusal(413, f"the body is larger than {BODY_BYTES_MAX} bytes")


class _Cut:
    """Inside the block the current task's wait can be cut short with `now()`: the block then raises `error`.
    What `asyncio.timeout` does, for a cause of any kind, and at a third of its cost."""

    __slots__ = ("_cutting", "_error", "_task")

    def __init__(self, error: Exception) -> None:
        self._error = error
        self._cutting = False
        self._task: asyncio.Task[Any] | None = None

    def __enter__(self) -> _Cut:
        self._task = asyncio.current_task()
        return self

    def now(self) -> None:
        if self._task is not None:
            self._cutting = True
            self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        # When somebody else cancels the task at the same time, theirs is the cancellation that counts.
        if self._cutting and task is not None and task.uncancel() == 0 and kind is asyncio.CancelledError:
            raise self._error from None


class _Watch(_Cut):
    """A block that ends when the client hangs up."""

    __slots__ = ("_receive", "_timer", "_watcher")

    def __init__(self, receive: Receive) -> None:
        super().__init__(ClientGone())
        self._receive = receive
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> _Watch:
        super().__enter__()
        self._timer = asyncio.get_running_loop().call_later(HANG_UP_S, self._begin)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        super().__exit__(kind, error, trace)

    def _begin(self) -> None:
        self._watcher = asyncio.get_running_loop().create_task(self._until_gone())

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.now()
