"""One request and its answer, over ASGI as uvicorn speaks it.

An `Exchange` reads the body, bounded in size and in time, and sends one answer or a stream. It is made for small
requests answered in milliseconds: no task, queue or lock is made for one, and it is polled for nothing. Whoever waits
for a body or an engine does so inside `with exchange:`, which ends the wait with Refusal when the body takes too long,
and with ClientGone when the client hangs up. Used by the task that made it, and by no other.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from gpuplan.serve.http import openai
from gpuplan.serve.http.errors import Refusal
from gpuplan.serve.server import Caller

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
    """`started` says that a status line is out, `caller` who asks. Everything happens inside `with exchange:`."""

    __slots__ = (
        "_cut_with",
        "_deadline_set",
        "_loop",
        "_read",
        "_receive",
        "_send",
        "_task",
        "_timer",
        "_watcher",
        "caller",
        "headers",
        "method",
        "path",
        "started",
    )

    _loop: asyncio.AbstractEventLoop
    _task: asyncio.Task[Any] | None
    _timer: asyncio.TimerHandle

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])  # names in lower case
        self.started = False
        self.caller = Caller()
        self._read = self.method != "POST"  # whether the body is here, or none is asked for
        self._deadline_set = False
        self._watcher: asyncio.Task[None] | None = None
        self._cut_with: Exception | None = None

    def request_id(self) -> str:
        """The client's `X-Request-Id` when it is a plain one, or a new one."""
        given = self.headers.get(b"x-request-id", b"")
        if 0 < len(given) <= 128 and given.isascii() and (text := given.decode()).isprintable():
            return text
        return f"{_PROCESS}{next(_numbers):08x}"

    async def body(self, decoder: msgspec.json.Decoder[T]) -> T:
        """The JSON body. Raises Refusal for one that is too large, too slow or wrong, ClientGone when it breaks off."""
        declared = self.headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > BODY_BYTES_MAX:
            raise _too_large()
        raw = await self._raw()
        self._read = True
        if self._deadline_set:  # it came slowly: from here on the timer is for hanging up again
            self._timer.cancel()
            self._timer = self._loop.call_later(HANG_UP_S, self._look)
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
            if len(whole) > BODY_BYTES_MAX:
                raise _too_large()
            return whole
        raw = bytearray()
        while message["type"] == "http.request":
            raw += message.get("body", b"")
            if len(raw) > BODY_BYTES_MAX:
                raise _too_large()
            if not message.get("more_body"):
                return bytes(raw)
            message = await self._receive()
        raise ClientGone

    # --- the answer -----------------------------------------------------------------------------------------------

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

    # --- what ends a wait -----------------------------------------------------------------------------------------

    def __enter__(self) -> Exchange:
        """From here on waits are cut short: a body's after BODY_S_MAX, all others when the client hangs up. One timer
        does for both, and only after HANG_UP_S does it cost more than being set and cancelled."""
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task(self._loop)
        self._timer = self._loop.call_later(HANG_UP_S, self._look)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None  # its frames, which its cancellation keeps, know this exchange
        cut, self._cut_with = self._cut_with, None
        if cut is None or self._task is None:
            return
        # When somebody else cancels the task at the same time, theirs is the cancellation that counts.
        if self._task.uncancel() == 0 and kind is asyncio.CancelledError:
            try:
                raise cut from None
            finally:
                del cut

    def _look(self) -> None:
        if self._read:
            self._watcher = self._loop.create_task(self._until_gone())
        elif self._deadline_set:
            self._cut(Refusal(408, f"the body took longer than {BODY_S_MAX:g} s", headers=((b"connection", b"close"),)))
        else:
            self._deadline_set = True
            self._timer = self._loop.call_later(BODY_S_MAX, self._look)

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._cut(ClientGone())

    def _cut(self, error: Exception) -> None:
        """The task's wait ends with a cancellation that leaves the block as `error`, as `asyncio.timeout` does it."""
        if self._task is not None:
            self._cut_with = error
            self._task.cancel()


_PROCESS = secrets.token_hex(8)
_numbers = itertools.count()


def _too_large() -> Refusal:
    return Refusal(413, f"the body is larger than {BODY_BYTES_MAX} bytes")
