"""What may be asked: request bodies as OpenAI's clients and vLLM's write them, every number in them bounded. Pure.

Bodies may carry keys that gpuplan does not know (clients send many); the ones it knows are checked, by their types
as they are decoded, and by `sampling` and `prompts_of` where types cannot say it. Both raise Refusal with the key's
name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

import msgspec
from msgspec import Meta, Struct

from gpuplan.scenario.demand import BuiltinName
from gpuplan.serve.engines import Sampling
from gpuplan.serve.http.errors import Refusal

DEFAULT_COMPLETION_TOKENS = 16
"""What OpenAI's completions endpoint generates when `max_tokens` is not given."""
DEFAULT_CHAT_TOKENS = 256
"""A bound of our own: OpenAI's chat endpoint has none, and an unbounded answer would hold a place for minutes."""
INPUTS_MAX = 256
"""Prompts of one request to classify or embed; each takes a place in the model's queue."""

TokenLimit = Annotated[int, Meta(ge=1, le=1_000_000)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
Alternatives = Annotated[int, Meta(ge=0, le=20)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
StopText = Annotated[str, Meta(min_length=1, max_length=256)]

# What msgspec can say of text, texts, token ids or lists of token ids: a list may still mix them.
Input = str | list[str | TokenId | list[TokenId]]
Ids = Sequence[int]


class Swap(Struct, forbid_unknown_fields=True):
    """`POST /admin/swap`: another version of a model, by exactly one of `onnx`, `builtin` and `emulate`."""

    model: str
    onnx: str | None = None
    builtin: BuiltinName | None = None
    emulate: str | None = None
    mode: Literal["beside", "drain"] = "beside"


class StreamOptions(Struct):
    include_usage: bool = False


class Generation(Struct, kw_only=True):
    """What completions and chats have in common. OpenAI's defaults; `ignore_eos` is vLLM's."""

    model: str
    max_tokens: TokenLimit | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=1)] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    seed: Seed | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=16)] | None = None
    ignore_eos: bool | None = None

    def with_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def tokens_max(self) -> int:
        raise NotImplementedError

    def alternatives(self) -> int | None:
        """How many log-probabilities a token is told with; None for none. Raises Refusal."""
        raise NotImplementedError

    def sampling(self) -> Sampling:
        """How tokens are chosen. Raises Refusal."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=self.alternatives(),
        )


class CompletionBody(Generation, kw_only=True):
    """`POST /v1/completions`."""

    prompt: Input
    logprobs: Alternatives | None = None

    def tokens_max(self) -> int:
        return self.max_tokens or DEFAULT_COMPLETION_TOKENS

    def alternatives(self) -> int | None:
        return self.logprobs

    def one_prompt(self) -> str | Ids:
        """The prompt. Raises Refusal for several."""
        prompts, _ = prompts_of(self.prompt, "prompt")
        if len(prompts) != 1:
            raise Refusal(400, "prompt: one prompt a request", param="prompt")
        return prompts[0]


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


class ChatBody(Generation, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=10_000)]
    max_completion_tokens: TokenLimit | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None

    def tokens_max(self) -> int:
        return self.max_completion_tokens or self.max_tokens or DEFAULT_CHAT_TOKENS

    def alternatives(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise Refusal(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def one_prompt(self) -> str:
        """The conversation as one prompt: the messages' texts, one on a line."""
        return "\n".join(message.text() for message in self.messages)


class ClassifyBody(Struct):
    """`POST /v1/classify`."""

    model: str
    input: Input


class EmbeddingsBody(Struct):
    """`POST /v1/embeddings`. OpenAI's own Python client asks for base64 unless told otherwise."""

    model: str
    input: Input
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Any = None


completion = msgspec.json.Decoder(CompletionBody)
chat = msgspec.json.Decoder(ChatBody)
classify = msgspec.json.Decoder(ClassifyBody)
embeddings = msgspec.json.Decoder(EmbeddingsBody)
swap = msgspec.json.Decoder(Swap)


def prompts_of(given: Input, param: str) -> tuple[list[str] | list[Ids], bool]:
    """The prompts in `given`, and whether it is a single one outside a list. Raises Refusal when there is none, or when
    a list mixes texts with token ids."""
    if isinstance(given, str):
        return [given], True
    kinds = set(map(type, given))
    if kinds == {int}:
        return cast(list[Ids], [given]), True
    if kinds == {str} or kinds == {list}:
        return cast(list[str] | list[Ids], given), False
    problem = "has to be not empty" if not kinds else "holds texts and token ids: one kind at a time"
    raise Refusal(400, f"{param} {problem}", param=param)
