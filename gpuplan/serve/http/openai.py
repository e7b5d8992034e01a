"""OpenAI's protocol as its clients speak it: request bodies in, completion objects and SSE events out. Pure.

Bodies may carry keys that gpuplan does not know (clients send many); the ones it knows are checked. Prompts are
text. Shapes follow the openai-python client and vLLM's server.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

DEFAULT_COMPLETION_TOKENS = 16
"""What OpenAI's completions endpoint generates when `max_tokens` is not given."""
DEFAULT_CHAT_TOKENS = 256
"""A bound of our own: OpenAI's chat endpoint has none, and an unbounded answer would hold a place for minutes."""

TokenLimit = Annotated[int, Meta(ge=1, le=1_000_000)]
Kind = Literal["completion", "chat"]


class StreamOptions(Struct):
    include_usage: bool = False


class CompletionBody(Struct):
    """`POST /v1/completions`."""

    model: str
    prompt: str | list[str]
    max_tokens: TokenLimit | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=1)] = 1

    def text(self) -> str:
        """The one prompt. Raises ValueError for several."""
        if isinstance(self.prompt, list):
            if len(self.prompt) != 1:
                raise ValueError("prompt: one prompt a request")
            return self.prompt[0]
        return self.prompt

    def tokens_max(self) -> int:
        return self.max_tokens or DEFAULT_COMPLETION_TOKENS


class ContentPart(Struct):
    type: str
    text: str = ""


class Message(Struct):
    role: str
    content: str | list[ContentPart] | None = None

    def text(self) -> str:
        if isinstance(self.content, list):
            return " ".join(part.text for part in self.content if part.type == "text")
        return self.content or ""


class ChatBody(Struct):
    """`POST /v1/chat/completions`."""

    model: str
    messages: Annotated[list[Message], Meta(min_length=1, max_length=10_000)]
    max_tokens: TokenLimit | None = None
    max_completion_tokens: TokenLimit | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=1)] = 1

    def text(self) -> str:
        """The conversation as one prompt: the messages' texts, one on a line."""
        return "\n".join(message.text() for message in self.messages)

    def tokens_max(self) -> int:
        return self.max_completion_tokens or self.max_tokens or DEFAULT_CHAT_TOKENS


class Reply:
    """One answer's objects: every chunk carries the same id and time of creation."""

    def __init__(self, kind: Kind, request_id: str, model: str, created: int) -> None:
        self._chat = kind == "chat"
        prefix = "chatcmpl" if self._chat else "cmpl"
        self._base = {"id": f"{prefix}-{request_id}", "created": created, "model": model}

    def whole(self, text: str, finish_reason: str, usage: dict[str, int]) -> dict[str, Any]:
        """The answer in one object."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason, "logprobs": None}
        choice |= {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._base, "object": kind, "choices": [choice], "usage": usage}

    def role(self) -> bytes:
        """The first event of a chat: the role, without text. Empty for a completion."""
        return self._event({"role": "assistant", "content": ""}, None) if self._chat else b""

    def token(self, text: str) -> bytes:
        return self._event({"content": text} if self._chat else text, None)

    def finish(self, finish_reason: str) -> bytes:
        return self._event({} if self._chat else "", finish_reason)

    def usage(self, usage: dict[str, int]) -> bytes:
        """The extra event of `stream_options.include_usage`: no choices."""
        return event({**self._base, "object": self._object(), "choices": [], "usage": usage})

    def _event(self, piece: Any, finish_reason: str | None) -> bytes:
        choice = {"index": 0, "finish_reason": finish_reason, "logprobs": None}
        choice["delta" if self._chat else "text"] = piece
        return event({**self._base, "object": self._object(), "choices": [choice]})

    def _object(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"


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


def error(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error body as OpenAI's clients read it."""
    kinds = {401: "AuthenticationError", 404: "NotFoundError", 413: "BadRequestError", 429: "RateLimitError"}
    kind = kinds.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return {"error": {"message": message, "type": kind, "param": param, "code": code or status}}
