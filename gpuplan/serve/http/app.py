"""The ASGI app over a Server.

Every request is bounded before it is read (body size, time to send it) and answered with a body that a client library
understands: 400 for what is wrong with it, 401 without the key, 404 for a model that is not here, 413 too large, 429
with Retry-After when the model's queue is full, 503 while draining or without a replica, 500 when an engine failed. An
error after the first token comes in the stream, as an event.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import secrets
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from gpuplan.scenario.deployment import shape_of
from gpuplan.serve.engines import Output, Prompt
from gpuplan.serve.http import openai
from gpuplan.serve.metrics import Metrics
from gpuplan.serve.server import RequestFailed, RequestRefused, Server, Ticket

BODY_BYTES_MAX = 4 << 20
"""Four times a 128k-token prompt of English text."""
BODY_S_MAX = 30.0
PROMPT_TOKENS_MAX = 2048
"""For models without a known context window (ONNX files)."""

B = TypeVar("B", bound=msgspec.Struct)
T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.retry_after_s = status, message, param, retry_after_s

    def response(self) -> Response:
        headers = {"Retry-After": str(math.ceil(self.retry_after_s))} if self.retry_after_s is not None else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return _json(openai.error(self.status, self.message, param=self.param), self.status, headers)


def make_app(server: Server, metrics: Metrics, *, api_key: str | None = None) -> Starlette:
    """The routes of a server. With `api_key`, all but the health routes want it as a bearer token."""
    http = _Http(server, metrics)
    guarded = [
        Route("/v1/completions", _answering(http.completions, api_key), methods=["POST"]),
        Route("/v1/chat/completions", _answering(http.chat, api_key), methods=["POST"]),
        Route("/v1/classify", _answering(http.classify, api_key), methods=["POST"]),
        Route("/v1/models", _answering(http.models, api_key), methods=["GET"]),
        Route("/metrics", _answering(http.metrics, api_key), methods=["GET"]),
    ]
    health = [
        Route("/health/live", http.live, methods=["GET"]),
        Route("/health/ready", http.ready, methods=["GET"]),
    ]
    return Starlette(routes=[*guarded, *health], exception_handlers={404: _no_route, 405: _wrong_method})


class ClassifyBody(msgspec.Struct):
    """`POST /v1/classify`."""

    model: str
    input: str | list[str]


class _Http:
    def __init__(self, server: Server, metrics: Metrics) -> None:
        self._server, self._metrics = server, metrics
        self._models = {r.model: r.role for r in server.deployment.replicas}
        self._started = int(time.time())

    async def completions(self, request: Request) -> Response:
        return await self._complete(request, "completion", await _body(request, openai.CompletionBody))

    async def chat(self, request: Request) -> Response:
        return await self._complete(request, "chat", await _body(request, openai.ChatBody))

    async def classify(self, request: Request) -> Response:
        body = await _body(request, ClassifyBody)
        started_s = time.monotonic()
        if self._models.get(body.model, "classifier") != "classifier":
            raise Refusal(400, f"{body.model} is not a classifier", param="model")
        texts = [body.input] if isinstance(body.input, str) else body.input
        if not texts or not all(text.strip() for text in texts):
            raise Refusal(400, "input must be text that is not empty", param="input")
        if len(texts) > 256:
            raise Refusal(400, "input holds more than 256 texts", param="input")
        prompts = [self._prompt(body.model, text, 0, "input") for text in texts]
        request_id = _request_id(request)
        tickets = [
            self._server.submit(body.model, prompt, output_tokens=0, client_id=request_id if i == 0 else "")
            for i, prompt in enumerate(prompts)
        ]
        try:
            outputs = await _while_connected(request, _all_of(tickets))
        finally:
            for ticket in tickets:
                self._server.cancel(ticket)
        results = [
            {"label": o.text, "confidence": (o.scores or {}).get(o.text, 1.0), "scores": o.scores} for o in outputs
        ]
        timing = {"model": body.model, "processing_time_ms": (time.monotonic() - started_s) * 1e3}
        many = {"results": results} if not isinstance(body.input, str) else results[0]
        return _json({**many, **timing}, headers={"X-Request-Id": request_id})

    async def models(self, request: Request) -> Response:
        names = [
            {"id": name, "object": "model", "created": self._started, "owned_by": "gpuplan"} for name in self._models
        ]
        return _json({"object": "list", "data": names})

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def live(self, request: Request) -> Response:
        return _json({"status": "live"})

    async def ready(self, request: Request) -> Response:
        ready = self._server.core.ready()
        return _json({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    # --- completions ----------------------------------------------------------------------------------------------

    async def _complete(
        self, request: Request, kind: openai.Kind, body: openai.CompletionBody | openai.ChatBody
    ) -> Response:
        try:
            text = body.text()
        except ValueError as error:
            raise Refusal(400, str(error), param="prompt") from None
        decoder = self._models.get(body.model) == "decoder"
        tokens_max = body.tokens_max() if decoder else 0
        prompt = self._prompt(body.model, text, tokens_max, "prompt" if kind == "completion" else "messages")
        request_id = _request_id(request)
        reply = openai.Reply(kind, request_id, body.model, int(time.time()))
        ticket = self._server.submit(body.model, prompt, output_tokens=tokens_max, client_id=request_id)
        outputs = aiter(ticket)
        try:  # a refusal comes here, before any header is sent
            first = await _while_connected(request, _first_of(outputs))
        except BaseException:
            self._server.cancel(ticket)
            raise
        headers = {"X-Request-Id": request_id}
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            events = self._stream(ticket, first, outputs, reply, len(prompt.token_ids), tokens_max, with_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        try:
            pieces = [first] if first else []
            pieces += await _while_connected(request, _all_of([outputs]))
        finally:
            self._server.cancel(ticket)
        used = openai.usage(len(prompt.token_ids), len(pieces))
        text = "".join(output.text for output in pieces)
        return _json(reply.whole(text, _finish_reason(pieces, tokens_max), used), headers=headers)

    async def _stream(
        self,
        ticket: Ticket,
        first: Output | None,
        rest: AsyncIterator[Output],
        reply: openai.Reply,
        prompt_tokens: int,
        tokens_max: int,
        with_usage: bool,
    ) -> AsyncIterator[bytes]:
        tokens, last = 0, first
        try:
            if first is not None:
                tokens = 1
                yield reply.role() + reply.token(first.text)
            async for output in rest:
                tokens, last = tokens + 1, output
                yield reply.token(output.text)
            ending = reply.finish(_finish_reason([last] if last else [], tokens_max))
            if with_usage:
                ending += reply.usage(openai.usage(prompt_tokens, tokens))
            yield ending + openai.DONE
        except (RequestFailed, RequestRefused) as error:
            yield openai.event(openai.error(*_failure(error))) + openai.DONE
        finally:
            self._server.cancel(ticket)

    def _prompt(self, model: str, text: str, tokens_max: int, param: str) -> Prompt:
        if model not in self._models:
            raise Refusal(404, f"no such model; this server has {', '.join(self._models)}", param="model")
        if not text.strip():
            raise Refusal(400, "the prompt is empty", param=param)
        prompt = self._server.tokenize(model, text)
        shape = shape_of(self._server.deployment.models[model])
        limit = shape.context_tokens_max if shape else PROMPT_TOKENS_MAX
        tokens = len(prompt.token_ids)
        if tokens == 0:
            raise Refusal(400, "the prompt has no words", param=param)
        if tokens + tokens_max > limit:
            asked = f"{tokens} prompt tokens" + (f" and {tokens_max} to generate" if tokens_max else "")
            raise Refusal(400, f"too long: {asked}, the model takes {limit} in all", param=param)
        return prompt


_REASONS = {
    "queue_full": (429, "the model's queue is full"),
    "draining": (503, "the server is shutting down"),
    "no_replica": (503, "no replica of the model is up"),
    "too_long": (400, "the request needs more KV cache than any replica has"),
}
# What an admitted request may meet, in words; everything else is a 500 with its reason.
_FAILURES = {
    "out_of_memory": (503, "model unavailable: out of GPU memory"),
    "replica_lost": (503, "the replica that ran the request was lost"),
    "no_replica": (503, "no replica of the model is up"),
    "nan_output": (500, "the model's output was not a number"),
}


def _failure(error: RequestFailed | RequestRefused) -> tuple[int, str]:
    return _FAILURES.get(str(error), (500, f"the request failed: {error}"))


def _answering(handler: Handler, api_key: str | None) -> Handler:
    """The handler with its errors turned into answers, behind the key when there is one."""
    wanted = hashlib.sha256(api_key.encode()).digest() if api_key else None

    async def answer(request: Request) -> Response:
        try:
            if wanted is not None:
                given = request.headers.get("authorization", "").removeprefix("Bearer ")
                if not hmac.compare_digest(hashlib.sha256(given.encode()).digest(), wanted):
                    raise Refusal(401, "a valid API key is needed")
            return await handler(request)
        except Refusal as refusal:
            return refusal.response()
        except RequestRefused as refused:
            status, message = _REASONS[refused.reason]
            retry_after_s = refused.retry_after_s if status != 400 else None
            return Refusal(status, message, retry_after_s=retry_after_s).response()
        except RequestFailed as failed:
            return Refusal(*_failure(failed)).response()
        except ClientDisconnect:
            return Response(status_code=499)

    return answer


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives. Raises ClientDisconnect, with the work cancelled, as soon as the client is gone."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        leaving.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _first_of(outputs: AsyncIterator[Output]) -> Output | None:
    return await anext(outputs, None)


async def _all_of(streams: Sequence[AsyncIterable[Output]]) -> list[Output]:
    return [output for stream in streams async for output in stream]


async def _body(request: Request, kind: type[B]) -> B:
    """The request's JSON body, bounded in size and time. Raises Refusal."""
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > BODY_BYTES_MAX:
        raise Refusal(413, f"the body is larger than {BODY_BYTES_MAX} bytes")
    raw = bytearray()
    try:
        async with asyncio.timeout(BODY_S_MAX):
            async for chunk in request.stream():
                raw += chunk
                if len(raw) > BODY_BYTES_MAX:
                    raise Refusal(413, f"the body is larger than {BODY_BYTES_MAX} bytes")
    except TimeoutError:
        raise Refusal(408, f"the body took longer than {BODY_S_MAX:g} s") from None
    try:
        return msgspec.json.decode(bytes(raw), type=kind)
    except msgspec.ValidationError as error:
        problem, _, where = str(error).partition(" - at ")
        param = where.strip("`").removeprefix("$.") or None
        raise Refusal(400, f"{problem}{f' ({param})' if param else ''}", param=param) from None
    except (msgspec.DecodeError, RecursionError):
        raise Refusal(400, "the body is not valid JSON") from None


def _request_id(request: Request) -> str:
    """The client's `X-Request-Id` when it is a plain one, or a new one."""
    given = request.headers.get("x-request-id", "")
    return given if 0 < len(given) <= 128 and given.isascii() and given.isprintable() else secrets.token_hex(12)


def _finish_reason(outputs: list[Output], tokens_max: int) -> str:
    """`length` when the limit ended it, `stop` when the model did."""
    return "length" if tokens_max and not (outputs and outputs[-1].end) else "stop"


def _json(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(data), status, headers, media_type="application/json")


async def _no_route(request: Request, _: Exception) -> Response:
    return Refusal(404, "no such route").response()


async def _wrong_method(request: Request, error: Exception) -> Response:
    response = Refusal(405, "method not allowed here").response()
    response.headers.update(getattr(error, "headers", None) or {})
    return response
