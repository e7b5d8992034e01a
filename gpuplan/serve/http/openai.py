"""OpenAI's protocol as its clients hear it: completion objects, SSE events, embeddings and errors. Pure.

Shapes follow the openai-python client and vLLM's server.
"""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from gpuplan.serve.engines import Output, TokenLogprob

Kind = Literal["completion", "chat"]

LOGPROB_MIN = -9999.0
"""Stands for minus infinity, which JSON has not; vLLM's."""


class Reply:
    """One answer's objects: every chunk carries the same id and time of creation. `with_logprobs` tells each token's
    log-probability, where the engine gave one."""

    def __init__(self, kind: Kind, request_id: str, model: str, created: int, *, with_logprobs: bool = False) -> None:
        self._chat = kind == "chat"
        self._with_logprobs = with_logprobs
        self._offset = 0  # characters of text in the tokens told so far
        prefix = "chatcmpl" if self._chat else "cmpl"
        self._base = {"id": f"{prefix}-{request_id}", "created": created, "model": model}

    def whole(self, outputs: Sequence[Output], finish_reason: str, usage: dict[str, int]) -> dict[str, Any]:
        """The answer in one object."""
        text = "".join(output.text for output in outputs)
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason, "logprobs": self._logprobs(outputs)}
        choice |= {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._base, "object": kind, "choices": [choice], "usage": usage}

    def role(self) -> bytes:
        """The first event of a chat: the role, without text. Empty for a completion."""
        return self._event({"role": "assistant", "content": ""}, None) if self._chat else b""

    def token(self, output: Output) -> bytes:
        """The event of one output; nothing for one whose text is held back, unless it has a log-probability to tell."""
        logprobs = self._logprobs([output])
        if not output.text and logprobs is None:
            return b""
        return self._event({"content": output.text} if self._chat else output.text, None, logprobs)

    def finish(self, finish_reason: str) -> bytes:
        return self._event({} if self._chat else "", finish_reason)

    def usage(self, usage: dict[str, int]) -> bytes:
        """The extra event of `stream_options.include_usage`: no choices."""
        return event({**self._base, "object": self._object(), "choices": [], "usage": usage})

    def _event(self, piece: Any, finish_reason: str | None, logprobs: dict[str, Any] | None = None) -> bytes:
        choice = {"index": 0, "finish_reason": finish_reason, "logprobs": logprobs}
        choice["delta" if self._chat else "text"] = piece
        return event({**self._base, "object": self._object(), "choices": [choice]})

    def _object(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _logprobs(self, outputs: Sequence[Output]) -> dict[str, Any] | None:
        """The outputs' log-probabilities in the shape of a completion's choice or of a chat's; None without any."""
        told = [o.logprob for o in outputs if o.logprob is not None] if self._with_logprobs else []
        if not told:
            return None
        if self._chat:
            return {"content": [_chat_token(t) for t in told]}
        offsets = []
        for t in told:
            offsets.append(self._offset)
            self._offset += len(t.token)
        return {
            "tokens": [t.token for t in told],
            "token_logprobs": [_finite(t.logprob) for t in told],
            # The chosen token is always among them, as in vLLM's answers.
            "top_logprobs": [
                {t.token: _finite(t.logprob), **{text: _finite(logprob) for text, logprob, _ in t.top}} for t in told
            ],
            "text_offset": offsets,
        }


def _chat_token(told: TokenLogprob) -> dict[str, Any]:
    def token(text: str, logprob: float, raw: bytes) -> dict[str, Any]:
        return {"token": text, "logprob": _finite(logprob), "bytes": list(raw)}

    top = [token(*alternative) for alternative in told.top]
    return {**token(told.token, told.logprob, told.token_bytes), "top_logprobs": top}


def _finite(logprob: float) -> float:
    return max(logprob, LOGPROB_MIN)


DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(data) + b"\n\n"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def embeddings(model: str, vectors: Sequence[bytes], prompt_tokens: int, *, as_base64: bool) -> dict[str, Any]:
    """The answer to an embeddings request; `vectors` are little-endian float32."""
    form = _base64 if as_base64 else _floats
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": form(v)} for i, v in enumerate(vectors)],
        "model": model,
        "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens},
    }


def _base64(vector: bytes) -> str:
    return base64.b64encode(vector).decode()


def _floats(vector: bytes) -> list[float]:
    floats = array("f", vector)
    if sys.byteorder == "big":
        floats.byteswap()
    return floats.tolist()


def error(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error body as OpenAI's clients read it."""
    kinds = {401: "AuthenticationError", 404: "NotFoundError", 413: "BadRequestError", 429: "RateLimitError"}
    kind = kinds.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return {"error": {"message": message, "type": kind, "param": param, "code": code or status}}
