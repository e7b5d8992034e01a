"""Engines: what runs a step. One Protocol; `models.engine_for` chooses.

An `Engine` is what the server's event loop talks to. A `Runner` computes, blocking, in a thread or a process of its
own; `worker` makes engines of runners.

An engine is loaded once, runs one step at a time, and answers every request that `step.answered()` names. A step that
raises fails as a whole and leaves the engine as it was before (plan, run, commit); an output with `error` fails alone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import Protocol

from msgspec import Struct

from gpuplan.policy.vocabulary import RunStep
from gpuplan.record.run import Provenance


class Sampling(Struct, frozen=True, omit_defaults=True):
    """How a decoder chooses tokens. `temperature` 0 is greedy; `logprobs` is how many alternatives to tell beside the
    chosen token (None: no log-probabilities at all); `stop` ends the text before the first of these strings."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None


GREEDY = Sampling()


class Prompt(Struct, frozen=True):
    """A request's text, its token ids, and what its answer may be. An emulated model has no vocabulary: its ids are
    zeros, one for a word. `output_tokens` is the most a decoder may generate: its last token flushes held-back text."""

    text: str
    token_ids: Sequence[int]
    output_tokens: int = 0
    sampling: Sampling = GREEDY


class OutOfMemory(Exception):
    """A step needs more memory than its slice has."""


class EngineLost(Exception):
    """The engine is gone with all that ran on it: see `Engine.gone`."""


class TokenLogprob(Struct, frozen=True, array_like=True):
    """A generated token as text, its natural-log probability, its bytes, and the likeliest alternatives as (text,
    log-probability, bytes), likeliest first."""

    token: str
    logprob: float
    token_bytes: bytes
    top: tuple[tuple[str, float, bytes], ...] = ()


class Output(Struct, frozen=True, array_like=True):
    """What one request gets from one step: a token's text (which may be empty while bytes of a character or a part of
    a stop string are held back), a label with every label's score, or an embedding (little-endian float32).

    `end`: the model met an end of text or a stop string. `error` is a short machine-readable reason.
    """

    text: str
    end: bool = False
    scores: dict[str, float] | None = None
    error: str | None = None
    embedding: bytes | None = None
    logprob: TokenLogprob | None = None


class Engine(Protocol):
    """`description` and `provenance` say what really runs, for logs and reports. `late_s` is how much later than the
    card it emulates would have its last step ended; None for an engine whose time is its own. `vocabulary_size` bounds
    token ids, where that is known."""

    description: str
    provenance: Provenance
    late_s: float | None
    vocabulary_size: int | None

    def tokenize(self, text: str) -> Sequence[int]:
        """Token ids of a text."""
        ...

    async def load(self) -> None:
        """Loads and warms up; afterwards `run` may be called. Raises RunError or InputError when it cannot."""
        ...

    def run(self, step: RunStep, prompts: Mapping[int, Prompt], *, asked_s: float) -> Awaitable[Mapping[int, Output]]:
        """Begins one step and, once awaited, answers the requests of `step.answered()`. `prompts` holds those of
        `step.prefills`. `asked_s` is when the core decided on it, on the monotonic clock. Raises OutOfMemory,
        EngineLost, anything."""
        ...

    def release(self, request_ids: Iterable[int]) -> None:
        """These requests are over: what is kept for them (a KV cache) may go. Those not known are passed over."""
        ...

    async def gone(self) -> str:
        """Returns when the engine is lost, with the reason; never for one that cannot be. `load` brings it back."""
        ...

    def notes(self) -> list[str]:
        """What a reader of the measurements must know of this engine; usually nothing."""
        ...

    async def close(self) -> None:
        """Frees what was loaded."""
        ...


class Runner(Protocol):
    """Loads a model and runs its steps, one call at a time. `description` is final once it is loaded."""

    description: str

    def load(self) -> None:
        """As `Engine.load`."""
        ...

    def run(self, step: RunStep, prompts: Mapping[int, Prompt]) -> Mapping[int, Output]:
        """As `Engine.run`."""
        ...

    def release(self, request_ids: Iterable[int]) -> None:
        """As `Engine.release`, between two steps."""
        ...

    def notes(self) -> list[str]:
        """As `Engine.notes`, once it is loaded."""
        ...

    def close(self) -> None:
        """Frees what was loaded."""
        ...
