"""The ASGI app over a Server: routes, and what each does from the body to the answer.

A request is an `Exchange`; its body is decoded (`bodies`), becomes a `Prompt`, and is submitted to the Server, which
gives a `Ticket` to read outputs from. Whatever goes wrong on the way is raised, and answered in one place
(`App.__call__`) in words that a client library understands (`errors`). An error after the first token comes in the
stream, as an event.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from msgspec.structs import replace

from gpuplan.errors import InputError, RunError
from gpuplan.scenario.demand import ModelSource
from gpuplan.scenario.deployment import Role, window_of
from gpuplan.serve.engines import Output, Prompt
from gpuplan.serve.http import bodies, openai
from gpuplan.serve.http.errors import Refusal, failure, refusal_of
from gpuplan.serve.http.exchange import ClientGone, Exchange, Handler, Receive, Scope, Send, encode
from gpuplan.serve.metrics import Metrics
from gpuplan.serve.server import RequestFailed, RequestRefused, Server, Ticket

CLASS_LENGTH_MAX = 128
"""Of a traffic class's name, as in a scenario."""
SwapTo = Callable[[str, ModelSource, bool], Awaitable[None]]
"""Puts another version of a model into place: (model, source, beside). Raises InputError and RunError."""


class App:
    """The routes of a server. With `api_keys` (by name), all but the health routes want one of them as a bearer token.
    Admin routes exist only with an `admin_token`, and want that one."""

    def __init__(
        self,
        server: Server,
        metrics: Metrics,
        *,
        api_keys: Mapping[str, str] | None = None,
        admin_token: str | None = None,
        swap_to: SwapTo | None = None,
    ) -> None:
        self._server, self._metrics = server, metrics
        self._keys = {_digest(key): name for name, key in (api_keys or {}).items()}
        self._admin_keys = {_digest(admin_token): "admin"} if admin_token else {}
        self._swap_to = swap_to
        self._models = {r.model: _Model.of(server, r.model, r.role) for r in server.deployment.replicas}
        self._started = int(time.time())
        self._open: dict[str, dict[str, Handler]] = {
            "/health/live": {"GET": self.live},
            "/health/ready": {"GET": self.ready},
        }
        self._guarded: dict[str, dict[str, Handler]] = {
            "/v1/completions": {"POST": self.completions},
            "/v1/chat/completions": {"POST": self.chat},
            "/v1/classify": {"POST": self.classify},
            "/v1/embeddings": {"POST": self.embeddings},
            "/v1/models": {"GET": self.models},
            "/metrics": {"GET": self.metrics},
        }
        self._admin: dict[str, dict[str, Handler]] = {"/admin/swap": {"POST": self.swap}} if admin_token else {}
        self._knocked = {self.completions, self.chat, self.classify, self.embeddings}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        try:
            with exchange:
                handler = self._handler(exchange)
                if handler in self._knocked:
                    await self._let_in(exchange, handler)
                else:
                    await handler(exchange)
        except Refusal as refusal:
            await exchange.refuse(refusal)
        except (RequestRefused, RequestFailed) as error:
            await exchange.refuse(refusal_of(error))
        except ClientGone:
            return
        except Exception:  # a fault of ours: uvicorn logs it
            if not exchange.started:
                await exchange.refuse(Refusal(500, "internal error"))
            raise

    async def _let_in(self, exchange: Exchange, handler: Handler) -> None:
        """A place is taken before anything of the request is read, so that a burst costs next to nothing."""
        caller = exchange.caller
        caller.traffic_class = exchange.headers.get(b"x-traffic-class", b"").decode("latin-1")[:CLASS_LENGTH_MAX]
        caller.timeout_s = _timeout_s(exchange.headers.get(b"x-request-timeout-ms"))
        self._server.knock(caller)
        try:
            await handler(exchange)
        finally:
            self._server.leave(caller)

    def _handler(self, exchange: Exchange) -> Handler:
        """Who answers. Raises Refusal for an unknown route, a wrong method or a wrong key."""
        keys = self._keys
        methods = self._guarded.get(exchange.path)
        if methods is None and (methods := self._open.get(exchange.path)) is not None:
            keys = {}
        if methods is None and (methods := self._admin.get(exchange.path)) is not None:
            keys = self._admin_keys
        if methods is None:
            raise Refusal(404, "no such route")
        if keys:
            # By digest: how long a look-up takes tells nothing of the key.
            given = exchange.headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            name = keys.get(hashlib.sha256(given).digest())
            if name is None:
                raise Refusal(401, "a valid key is needed", headers=((b"www-authenticate", b"Bearer"),))
            exchange.caller.key = name
        handler = methods.get("GET" if exchange.method == "HEAD" else exchange.method)
        if handler is None:
            allowed = ", ".join(methods).encode()
            raise Refusal(405, "method not allowed here", headers=((b"allow", allowed),))
        return handler

    # --- models that answer in one step ---------------------------------------------------------------------------

    async def classify(self, exchange: Exchange) -> None:
        body = await exchange.body(bodies.classify)
        started_s = time.monotonic()
        model = self._model(body.model, "classifier")
        prompts, single = self._inputs(exchange, model, body.input)
        request_id = exchange.request_id()
        outputs = await self._one_step(exchange, model, prompts, request_id)
        results = [
            {"label": o.text, "confidence": (o.scores or {}).get(o.text, 1.0), "scores": o.scores} for o in outputs
        ]
        answer: dict[str, Any] = results[0] if single else {"results": results}
        answer["model"] = model.name
        answer["processing_time_ms"] = (time.monotonic() - started_s) * 1e3
        await exchange.answer(encode(answer), headers=_identified(request_id))

    async def embeddings(self, exchange: Exchange) -> None:
        body = await exchange.body(bodies.embeddings)
        if body.dimensions is not None:
            raise Refusal(400, "dimensions: embeddings come as long as the model makes them", param="dimensions")
        model = self._model(body.model, "embedder")
        prompts, _ = self._inputs(exchange, model, body.input)
        request_id = exchange.request_id()
        outputs = await self._one_step(exchange, model, prompts, request_id)
        # An emulated model has no vectors to give: its embeddings are empty.
        vectors = [output.embedding or b"" for output in outputs]
        tokens = sum(len(prompt.token_ids) for prompt in prompts)
        answer = openai.embeddings(model.name, vectors, tokens, as_base64=body.encoding_format == "base64")
        await exchange.answer(encode(answer), headers=_identified(request_id))

    async def _one_step(
        self, exchange: Exchange, model: _Model, prompts: Sequence[Prompt], request_id: str
    ) -> list[Output]:
        """One output for each prompt; when one fails, all do."""
        tickets: list[Ticket] = []
        try:
            for prompt in prompts:
                client_id = "" if tickets else request_id
                tickets.append(
                    self._server.submit(
                        model.name, prompt, output_tokens=0, client_id=client_id, caller=exchange.caller
                    )
                )
            outputs = [output for ticket in tickets if (output := await ticket.next()) is not None]
        finally:
            for ticket in tickets:
                self._server.cancel(ticket)
        if len(outputs) != len(prompts):
            raise RequestFailed("no output")
        return outputs

    def _inputs(self, exchange: Exchange, model: _Model, given: bodies.Input) -> tuple[list[Prompt], bool]:
        inputs, single = bodies.prompts_of(given, "input")
        if len(inputs) > bodies.INPUTS_MAX:
            raise Refusal(400, f"input holds more than {bodies.INPUTS_MAX} prompts", param="input")
        return [self._prompt(exchange, model, one, "input") for one in inputs], single

    # --- models that generate -------------------------------------------------------------------------------------

    async def completions(self, exchange: Exchange) -> None:
        body = await exchange.body(bodies.completion)
        await self._complete(exchange, "completion", body, body.one_prompt(), "prompt")

    async def chat(self, exchange: Exchange) -> None:
        body = await exchange.body(bodies.chat)
        await self._complete(exchange, "chat", body, body.one_prompt(), "messages")

    async def _complete(
        self, exchange: Exchange, kind: openai.Kind, body: bodies.Generation, given: str | bodies.Ids, param: str
    ) -> None:
        model = self._model(body.model)
        tokens_max = body.tokens_max() if model.role == "decoder" else 0
        sampling = body.sampling()
        prompt = replace(
            self._prompt(exchange, model, given, param, tokens_max), output_tokens=tokens_max, sampling=sampling
        )
        request_id = exchange.request_id()
        reply = openai.Reply(
            kind, request_id, model.name, int(time.time()), with_logprobs=sampling.logprobs is not None
        )
        ticket = self._server.submit(
            model.name, prompt, output_tokens=tokens_max, client_id=request_id, caller=exchange.caller
        )
        try:
            first = await ticket.next()  # a refusal comes here, before any header is sent
            if body.stream:
                await self._stream(exchange, ticket, first, reply, prompt, request_id, with_usage=body.with_usage())
                return
            outputs = [first] if first else []
            while (output := await ticket.next()) is not None:
                outputs.append(output)
        finally:
            self._server.cancel(ticket)
        used = openai.usage(len(prompt.token_ids), len(outputs))
        answer = reply.whole(outputs, _finish_reason(outputs[-1:], tokens_max), used)
        await exchange.answer(encode(answer), headers=_identified(request_id))

    async def _stream(
        self,
        exchange: Exchange,
        ticket: Ticket,
        output: Output | None,
        reply: openai.Reply,
        prompt: Prompt,
        request_id: str,
        *,
        with_usage: bool,
    ) -> None:
        """The outputs from the first one on, an event for each that has something to tell."""
        tokens = 0
        last: list[Output] = []
        await exchange.begin(_identified(request_id))
        try:
            while output is not None:
                tokens, last = tokens + 1, [output]
                event = reply.token(output)
                if tokens == 1:
                    event = reply.role() + event
                if event:
                    await exchange.piece(event)
                output = await ticket.next()
        except (RequestFailed, RequestRefused) as error:
            await exchange.end(openai.event(openai.error(*failure(error))) + openai.DONE)
            return
        ending = reply.finish(_finish_reason(last, prompt.output_tokens))
        if with_usage:
            ending += reply.usage(openai.usage(len(prompt.token_ids), tokens))
        await exchange.end(ending + openai.DONE)

    # --- what there is --------------------------------------------------------------------------------------------

    async def models(self, exchange: Exchange) -> None:
        names = [
            {"id": name, "object": "model", "created": self._started, "owned_by": "gpuplan"} for name in self._models
        ]
        await exchange.answer(encode({"object": "list", "data": names}))

    async def metrics(self, exchange: Exchange) -> None:
        await exchange.answer(self._metrics.text(), kind=b"text/plain; version=0.0.4; charset=utf-8")

    async def live(self, exchange: Exchange) -> None:
        await exchange.answer(encode({"status": "live"}))

    async def ready(self, exchange: Exchange) -> None:
        ready = self._server.core.ready()
        await exchange.answer(encode({"status": "ready" if ready else "not ready"}), 200 if ready else 503)

    # --- what operators ask ---------------------------------------------------------------------------------------

    async def swap(self, exchange: Exchange) -> None:
        body = await exchange.body(bodies.swap)
        model = self._model(body.model)
        if self._swap_to is None:
            raise Refusal(501, "this server swaps no models")
        source = ModelSource(onnx=body.onnx, builtin=body.builtin, emulate=body.emulate)
        started_s = time.monotonic()
        try:
            await self._swap_to(model.name, source, body.mode == "beside")
        except InputError as error:
            raise Refusal(400, str(error), param=error.key) from None
        except RunError as error:
            raise Refusal(409, str(error)) from None
        replicas = self._server.fleet.serving[model.name]
        took_s = time.monotonic() - started_s
        await exchange.answer(encode({"model": model.name, "replicas": replicas, "took_s": took_s}))

    # --- from a body to a prompt ----------------------------------------------------------------------------------

    def _model(self, name: str, role: Role | None = None) -> _Model:
        """The model of that name. Raises Refusal where there is none, or where it is of another role."""
        model = self._models.get(name)
        if model is None:
            raise Refusal(404, f"no such model; this server has {', '.join(self._models)}", param="model")
        if role is not None and model.role != role:
            raise Refusal(400, f"{name} is not {_ARTICLES[role]}", param="model")
        return model

    def _prompt(
        self, exchange: Exchange, model: _Model, given: str | bodies.Ids, param: str, tokens_max: int = 0
    ) -> Prompt:
        """A text as the model counts it, or token ids as they are. Raises Refusal for one that is empty or does not
        fit the model's context together with `tokens_max` more."""
        if not isinstance(given, str):
            size = self._server.vocabulary_size(model.name)
            if given and size is not None and max(given) >= size:
                raise Refusal(400, f"token id {max(given)} is not in the vocabulary of {size}", param=param)
            prompt = Prompt("", given)
        elif given.strip():
            self._server.refuse_if_full(model.name, exchange.caller, exchange.request_id())
            prompt = self._server.tokenize(model.name, given)
        else:
            raise Refusal(400, f"{param} has to be text that is not empty", param=param)
        tokens = len(prompt.token_ids)
        if tokens == 0:
            raise Refusal(400, "the prompt has no words", param=param)
        if tokens + tokens_max > model.tokens_max:
            asked = f"{tokens} prompt tokens" + (f" and {tokens_max} to generate" if tokens_max else "")
            raise Refusal(400, f"too long: {asked}, the model takes {model.tokens_max} in all", param=param)
        if model.kv_tokens_max is not None and tokens + tokens_max > model.kv_tokens_max:
            room = f"the KV cache of the largest replica holds {model.kv_tokens_max} in all"
            raise Refusal(400, f"too long: {tokens} prompt tokens and {tokens_max} to generate, {room}", param=param)
        return prompt


class _Model(NamedTuple):
    """What requests are checked against; `tokens_max` bounds prompt and output together, and so does the KV cache of
    its largest replica, where it has one."""

    name: str
    role: Role
    tokens_max: int
    kv_tokens_max: int | None

    @classmethod
    def of(cls, server: Server, name: str, role: Role) -> _Model:
        held = [r.kv_tokens_max for r in server.deployment.every_replica() if r.model == name]
        kv_tokens_max = None if None in held else max(tokens for tokens in held if tokens is not None)
        return cls(name, role, window_of(server.deployment.models[name]), kv_tokens_max)


_ARTICLES: dict[Role, str] = {"decoder": "a decoder", "classifier": "a classifier", "embedder": "an embedder"}


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _timeout_s(given: bytes | None) -> float | None:
    """The header's milliseconds. Raises Refusal for what is no positive number."""
    if given is None:
        return None
    if not given.isdigit() or len(given) > 9 or int(given) == 0:
        raise Refusal(400, "X-Request-Timeout-Ms has to be a whole number of milliseconds, at least 1")
    return int(given) / 1e3


def _identified(request_id: str) -> tuple[tuple[bytes, bytes]]:
    return ((b"x-request-id", request_id.encode()),)


def _finish_reason(last: Sequence[Output], tokens_max: int) -> str:
    """`length` when the limit ended it, `stop` when the model did."""
    return "length" if tokens_max and not (last and last[-1].end) else "stop"
