"""ONNX Runtime: decoders, a token at a time, on the CPU or on CUDA.

A step says who gets a token and who reads how much of a prompt (iteration-level batching; Yu et al., Orca, OSDI 2022),
and may name any of the sequences that run. Those that decode run together in as few runs as padding allows; first
prompts of similar length are read together, later chunks one by one. A step is planned, run and only then committed:
one that raises leaves every sequence as it was. While the members stay the same their cache goes from run to run
without a copy; when some join or leave, `kv_cache` makes a block of those that are there.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gpuplan.errors import RunError
from gpuplan.policy.vocabulary import Prefill, RunStep
from gpuplan.serve import model_files
from gpuplan.serve.engines import Output, Prompt, TokenLogprob
from gpuplan.serve.engines.decoder import Decoder
from gpuplan.serve.engines.detokenize import TextStream, Vocabulary
from gpuplan.serve.engines.kv_cache import Block, Surgeon
from gpuplan.serve.engines.sampling import Chosen, Draw, choose
from gpuplan.serve.engines.session import CPU_PROVIDER, EngineSpec, described, first_line, memory_watched

NAN_OUTPUT = "nan_output"
NO_TEXT = "detokenize_error"
NOT_RUNNING = "not_running"
"""A decode of a sequence that the engine does not hold: it was released, or has ended."""


@dataclass(frozen=True, slots=True)
class _Padding:
    """Rows that together need n columns share a run while padding is at most `share` of n, or `free` columns a row."""

    share: float
    free: int


# A padded column of cache is memory that is read for nothing, a second run is all weights read again: the weights of
# llama-3-8b are as much as the cache of 120,000 tokens. What bounds the share is the memory.
_DECODE_PADDING = _Padding(0.5, 16)
# On the CPU memory is not what is short: 256 columns of tiny-chat are a fiftieth of its weights.
_DECODE_PADDING_CPU = _Padding(0.5, 256)
# A padded token of a prompt is computed like any other.
_PREFILL_PADDING = _Padding(0.1, 4)
_NO_PADDING = _Padding(0.0, 0)
_WARM_UP_TOKENS = 4


@dataclass(slots=True)
class _Sequence:
    """A request between steps. Its last token is not in the cache yet: the next step feeds it."""

    prompt: Prompt
    text: TextStream
    seed: int
    block: Block | None = None
    read: int = 0
    count: int = 0
    last_token: int = -1


@dataclass(frozen=True, slots=True)
class _Advance:
    """What a run has brought, not committed yet: rows of `block`, and the logits after each row's last token."""

    block: Block
    logits: Any
    read: Mapping[int, int]


class GenerationEngine:
    """A runner with one decoder session."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._files = model_files.read(spec.source)
        self._decoder: Any = None
        self._surgeon: Any = None
        self._vocabulary: Any = None
        self._sequences: dict[int, _Sequence] = {}
        self.description = described(spec)

    @property
    def kv_bytes_per_token(self) -> int:
        """Cache that one token of one sequence takes; 0 before `load`."""
        return self._decoder.kv_bytes_per_token if self._decoder else 0

    @property
    def surgeries(self) -> int:
        """How often rows of the cache were copied since `load`, because members joined or left."""
        return self._surgeon.operations if self._surgeon else 0

    def load(self) -> None:
        if self._files.vocabulary is None:
            raise RunError("the model has no vocabulary to turn tokens back into text")
        self._vocabulary = Vocabulary(self._files.vocabulary)
        self._decoder = Decoder(self._files.model, self._spec)
        self._surgeon = Surgeon(self._spec, self._decoder.past, self._decoder.layout)
        self._sequences.clear()
        self._warm_up()

    def _warm_up(self) -> None:
        """Prefill, decode and joins, at batch 1 and at the largest; also proves that the graph takes what we feed."""
        try:
            for rows in sorted({1, max(self._spec.max_batch_size, 1)}):
                block = self._decoder.empty(range(rows))
                _, block = self._decoder.forward(block, [[0] * _WARM_UP_TOKENS] * rows)
                _, block = self._decoder.forward(block, [[0]] * rows)
                self._surgeon.warm_up(block)
        except RunError:
            raise
        except Exception as error:  # onnxruntime's exceptions derive from Exception one by one
            raise RunError(f"the model does not run: {first_line(error)}") from None

    def close(self) -> None:
        self._sequences.clear()
        self._decoder = self._surgeon = None

    def release(self, request_ids: Iterable[int]) -> None:
        for request_id in request_ids:
            self._sequences.pop(request_id, None)

    def run(self, step: RunStep, prompts: Mapping[int, Prompt]) -> dict[int, Output]:
        decodes = [request_id for request_id in step.decodes if request_id in self._sequences]
        prefills = list(step.prefills)
        begun = {p.request_id: self._prefilling(p, prompts[p.request_id]) for p in prefills}
        with memory_watched():
            advances = [*self._decode(decodes), *self._prefill(prefills, begun)]
            answered = {*decodes, *(p.request_id for p in prefills if p.last)}
            chosen = self._choose(advances, begun, answered)
        self._sequences.update(begun)
        outputs = self._commit(advances, chosen)
        return {request_id: outputs.get(request_id) or _not_running() for request_id in step.answered()}

    def notes(self) -> list[str]:
        if self._decoder and self._decoder.layout == "equal":
            return ["the model takes no position_ids: only sequences of the same length are decoded together"]
        return []

    # --- plan and run: nothing here changes a sequence ------------------------------------------------------------

    def _prefilling(self, p: Prefill, prompt: Prompt) -> _Sequence:
        """The sequence that a prefill goes on with, or a new one."""
        sequence = self._sequences.get(p.request_id)
        if sequence is None:
            sampling = prompt.sampling
            ends = frozenset[int]() if sampling.ignore_eos else self._files.end_ids
            text = TextStream(self._vocabulary, stop=sampling.stop, end_ids=ends, tokens_max=prompt.output_tokens)
            seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
            sequence = _Sequence(prompt, text, seed)
        left = len(sequence.prompt.token_ids) - sequence.read
        if p.tokens < 1 or p.tokens > left or p.last != (p.tokens == left):
            raise RunError(f"a step reads {p.tokens} tokens (last: {p.last}) of a prompt that has {left} left")
        return sequence

    def _decode(self, request_ids: list[int]) -> list[_Advance]:
        if not request_ids:
            return []
        advances = []
        for block in self._blocks(request_ids):
            tokens = [[self._sequences[request_id].last_token] for request_id in block.request_ids]
            logits, after = self._decoder.forward(block, tokens)
            advances.append(_Advance(after, logits, {}))
        return advances

    def _blocks(self, request_ids: list[int]) -> list[Block]:
        """Blocks with exactly these rows: those that are there while they are good enough, else new ones."""
        held = {request_id: _block_of(self._sequences[request_id]) for request_id in request_ids}
        blocks = list({id(block): block for block in held.values()}.values())
        layout = self._decoder.layout
        exact = sum(len(b.request_ids) for b in blocks) == len(held) and all(b.in_place(layout) for b in blocks)
        if exact and len(blocks) == 1:
            return blocks
        lengths = {request_id: block.lengths[block.row(request_id)] for request_id, block in held.items()}
        allowed = _DECODE_PADDING_CPU if self._spec.provider == CPU_PROVIDER else _DECODE_PADDING
        groups = self._grouped(lengths, allowed)
        if exact and len(blocks) <= len(groups):
            return blocks
        return [self._surgeon.arranged([(request_id, held[request_id]) for request_id in group]) for group in groups]

    def _grouped(self, lengths: Mapping[int, int], allowed: _Padding, most: int | None = None) -> list[list[int]]:
        """Requests that may share a run of at most `most` tokens, the longest first."""
        if self._decoder.layout == "equal":
            allowed = _NO_PADDING
        groups: list[list[int]] = []
        longest = needed = 0
        for request_id in sorted(lengths, key=lambda i: (-lengths[i], i)):
            length = lengths[request_id]
            rows = len(groups[-1]) + 1 if groups else 1
            padding = rows * longest - (needed + length)
            bound = max(allowed.share * (needed + length), allowed.free * rows)
            if groups and padding <= bound and (most is None or rows * longest <= most):
                groups[-1].append(request_id)
                needed += length
            else:
                groups.append([request_id])
                longest = needed = length
        return groups

    def _prefill(self, prefills: list[Prefill], begun: Mapping[int, _Sequence]) -> list[_Advance]:
        most = self._decoder.run_tokens_max
        whole = {p.request_id: p.tokens for p in prefills if not begun[p.request_id].read and p.tokens <= most}
        advances = []
        for group in self._grouped(whole, _PREFILL_PADDING, most):
            tokens = [begun[request_id].prompt.token_ids[: whole[request_id]] for request_id in group]
            logits, block = self._decoder.forward(self._decoder.empty(group), tokens)
            advances.append(_Advance(block, logits, {request_id: whole[request_id] for request_id in group}))
        for p in prefills:
            if p.request_id not in whole:
                advances.append(self._chunk(p, begun[p.request_id], most))
        return advances

    def _chunk(self, p: Prefill, sequence: _Sequence, most: int) -> _Advance:
        """More of one prompt, in runs of at most `most` tokens."""
        block = (
            self._decoder.empty([p.request_id])
            if sequence.block is None
            else self._surgeon.arranged([(p.request_id, sequence.block)])
        )
        logits: Any = None
        end = sequence.read + p.tokens
        for at in range(sequence.read, end, most):
            piece = sequence.prompt.token_ids[at : min(at + most, end)]
            logits, block = self._decoder.forward(block, [piece])
        return _Advance(block, logits, {p.request_id: p.tokens})

    def _choose(
        self, advances: list[_Advance], begun: Mapping[int, _Sequence], answered: set[int]
    ) -> dict[int, Chosen | None]:
        chosen: dict[int, Chosen | None] = {}
        for advance in advances:
            rows = [i for i, request_id in enumerate(advance.block.request_ids) if request_id in answered]
            if not rows:
                continue
            logits = advance.logits if len(rows) == len(advance.logits) else advance.logits[rows]
            ids = [advance.block.request_ids[i] for i in rows]
            sequences = [begun.get(request_id) or self._sequences[request_id] for request_id in ids]
            draws = [Draw(s.prompt.sampling, s.seed, s.count) for s in sequences]
            chosen.update(zip(ids, choose(logits, draws), strict=True))
        return chosen

    # --- commit: nothing here fails -------------------------------------------------------------------------------

    def _commit(self, advances: list[_Advance], chosen: Mapping[int, Chosen | None]) -> dict[int, Output]:
        for advance in advances:
            for request_id in advance.block.request_ids:
                sequence = self._sequences[request_id]
                sequence.block = advance.block
                sequence.read += advance.read.get(request_id, 0)
        return {request_id: self._output(request_id, choice) for request_id, choice in chosen.items()}

    def _output(self, request_id: int, choice: Chosen | None) -> Output:
        sequence = self._sequences[request_id]
        if choice is None:
            del self._sequences[request_id]
            return Output("", error=NAN_OUTPUT)
        sequence.count += 1
        sequence.last_token = choice.token_id
        try:
            text, end = sequence.text.push(choice.token_id)
            logprob = self._logprob(choice)
        except Exception:  # a vocabulary that cannot say its own token: the others have theirs already
            del self._sequences[request_id]
            return Output("", error=NO_TEXT)
        if end or sequence.count == sequence.prompt.output_tokens:
            del self._sequences[request_id]
        return Output(text, end=end, logprob=logprob)

    def _logprob(self, choice: Chosen) -> TokenLogprob | None:
        if choice.logprob is None:
            return None
        top = []
        for token_id, logprob in choice.top:
            written = self._vocabulary.token_bytes(token_id)
            top.append((written.decode("utf-8", "replace"), logprob, written))
        written = self._vocabulary.token_bytes(choice.token_id)
        return TokenLogprob(written.decode("utf-8", "replace"), choice.logprob, written, tuple(top))


def _block_of(sequence: _Sequence) -> Block:
    if sequence.block is None or sequence.count == 0:
        raise RunError("a step decodes a sequence whose prompt has not been read")
    return sequence.block


def _not_running() -> Output:
    return Output("", error=NOT_RUNNING)
