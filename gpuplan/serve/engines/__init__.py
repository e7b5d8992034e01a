"""Engines: what runs a step. One Protocol; `models.engine_for` chooses.

An engine is loaded once, runs one step at a time, and answers every request that `step.answered()` names. A step that
raises fails as a whole; an output with `error` fails alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from gpuplan.policy.vocabulary import RunStep
from gpuplan.record.run import Provenance


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request's text and its token ids. An emulated model has no vocabulary: its ids are zeros, one for a word."""

    text: str
    token_ids: Sequence[int]


class OutOfMemory(Exception):
    """A step needs more memory than its slice has."""


class Output(NamedTuple):
    """What one request gets from one step: a token's text, or a label with every label's score."""

    text: str
    end: bool = False
    scores: Mapping[str, float] | None = None
    error: str | None = None


class Engine(Protocol):
    """`description` and `provenance` say what really runs, for logs and reports."""

    description: str
    provenance: Provenance

    def tokenize(self, text: str) -> Sequence[int]:
        """Token ids of a text."""
        ...

    async def load(self) -> None:
        """Loads and warms up; afterwards `run` may be called. Raises RunError or InputError when it cannot."""
        ...

    async def run(self, step: RunStep, prompts: Mapping[int, Prompt], *, asked_s: float) -> Mapping[int, Output]:
        """Runs one step and answers the requests of `step.answered()`. `asked_s` is when the core decided on it, on the
        monotonic clock."""
        ...

    def notes(self) -> list[str]:
        """What a reader of the measurements must know of this engine; usually nothing."""
        ...

    async def close(self) -> None:
        """Frees what was loaded."""
        ...
