"""ONNX Runtime: models that answer in one step (classifiers, embedders), on the CPU or on CUDA.

What a graph may take and give is said in `graph`, how requests become rectangles in `padding`. A request's answer is
the same alone and in any batch: padding is masked, and a graph without a mask is never padded but run once for each
length. (A graph that quantises its activations as it runs takes their range from the whole batch; nothing here can
undo that.) Rows are told apart by their place in the batch, and an output with another number of rows fails the step.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gpuplan.errors import RunError
from gpuplan.policy.vocabulary import RunStep
from gpuplan.serve import model_files
from gpuplan.serve.engines import OutOfMemory, Output, Prompt, graph
from gpuplan.serve.engines.graph import MASK, Graph
from gpuplan.serve.engines.padding import Inputs, row_buckets, token_buckets
from gpuplan.serve.engines.session import (
    CPU_PROVIDER,
    EngineSpec,
    described,
    first_line,
    memory_watched,
    open_session,
)

WARM_UP_CPU_S_MAX, WARM_UP_CUDA_S_MAX = 0.2, 20.0
"""On the CPU warming up saves the first steps some allocations; on CUDA it loads every shape's kernels."""

TOO_LONG, BAD_TOKEN, NAN_OUTPUT = "too_long", "bad_token", "nan_output"
"""Errors of one request, which leave the others of its batch alone."""

Row = tuple[int, Sequence[int]]
"""A request's id and its token ids."""


class SingleStepEngine:
    """A runner with one session."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._files = model_files.read(spec.source)
        self._loaded: _Loaded | None = None
        self.description = described(spec)

    def load(self) -> None:
        loaded = _Loaded(open_session(self._files.model, self._spec), self._files, self._spec)
        loaded.warm_up()
        self._loaded = loaded

    def run(self, step: RunStep, prompts: Mapping[int, Prompt]) -> dict[int, Output]:
        if self._loaded is None:
            raise RunError("the model is not loaded")
        return self._loaded.answers([(p.request_id, prompts[p.request_id].token_ids) for p in step.prefills])

    def release(self, request_ids: Iterable[int]) -> None:
        """Nothing is kept between steps."""

    def notes(self) -> list[str]:
        return []

    def close(self) -> None:
        self._loaded = None


class _Loaded:
    """A session with its buffers: all that `close` has to free."""

    def __init__(self, session: Any, files: model_files.ModelFiles, spec: EngineSpec) -> None:
        self._session, self._files, self._role = session, files, spec.role
        self._on_cpu = spec.provider == CPU_PROVIDER
        self._graph = graph.read(session.get_inputs(), session.get_outputs(), spec.role)
        self._rows_max = self._graph.batch or spec.max_batch_size
        window = files.context_tokens_max or spec.tokens_max
        self._tokens_max = self._graph.tokens or min(spec.tokens_max, window)
        if self._graph.tokens and MASK not in self._graph.inputs:
            raise RunError(f"the model takes exactly {self._graph.tokens} tokens and has no {MASK} to pad with")
        self._buckets = [self._tokens_max]
        if self._graph.tokens is None:
            self._buckets = token_buckets(self._tokens_max, fine=self._on_cpu)
        self._inputs = Inputs(
            self._graph.inputs, rows_max=self._rows_max, tokens_max=self._tokens_max, pad_id=files.pad_id
        )
        self._labels: tuple[str, ...] = ()
        self._bound: dict[tuple[int, int], _Bound] = {}
        self._device = "cpu" if self._on_cpu else "cuda"

    def answers(self, batch: Sequence[Row]) -> dict[int, Output]:
        """An answer for every request of the batch. Raises RunError, OutOfMemory or what ONNX Runtime does."""
        outputs: dict[int, Output] = {}
        fit: list[Row] = []
        for row in batch:
            problem = self._problem(row[1])
            if problem is None:
                fit.append(row)
            else:
                outputs[row[0]] = Output("", error=problem)
        for rows in self._runs(fit):
            told = self._infer([ids for _, ids in rows])
            outputs.update(zip((request_id for request_id, _ in rows), told, strict=True))
        return outputs

    def warm_up(self) -> None:
        """Runs each shape that traffic will have, short of the time limit; the shortest and the longest sequence
        always, to prove that the graph takes what it is fed. Raises RunError when it does not."""
        first, last = self._buckets[0], self._buckets[-1]
        self._proven(1, first)
        if last != first:
            self._proven(1, last)
        rows = [1, self._rows_max] if self._on_cpu else row_buckets(self._rows_max)
        shapes = sorted((n * tokens, n, tokens) for n in dict.fromkeys(rows) for tokens in self._buckets)
        began_s = time.monotonic()
        pace_s, limit_s = 0.0, WARM_UP_CPU_S_MAX if self._on_cpu else WARM_UP_CUDA_S_MAX
        for cells, n, tokens in shapes:
            now_s = time.monotonic()
            if now_s - began_s + 2 * pace_s * cells > limit_s:
                break
            try:
                self._infer([[self._files.pad_id] * tokens] * n)
            except OutOfMemory:
                break  # whoever asks for such a batch is told so, and smaller ones follow
            pace_s = (time.monotonic() - now_s) / cells

    def _proven(self, rows: int, tokens: int) -> None:
        try:
            self._infer([[self._files.pad_id] * tokens] * rows)
        except (RunError, OutOfMemory) as error:
            raise RunError(f"cannot run the model: {first_line(error)}") from None
        except Exception as error:  # onnxruntime's exceptions derive from Exception one by one
            hint = f"; is its window under {tokens} tokens? (context_tokens_max)" if tokens > self._buckets[0] else ""
            raise RunError(f"cannot run the model on {tokens} tokens: {first_line(error)}{hint}") from None

    def _problem(self, ids: Sequence[int]) -> str | None:
        if len(ids) > self._tokens_max:
            return TOO_LONG
        size = self._files.vocabulary_size
        if size is not None and ids and (min(ids) < 0 or max(ids) >= size):
            return BAD_TOKEN
        return None

    def _runs(self, rows: list[Row]) -> Iterator[list[Row]]:
        """The batch in as many runs as it takes: one, but for a fixed batch size or a graph that cannot be padded."""
        if MASK in self._graph.inputs:
            groups = [rows]
        else:
            by_length: dict[int, list[Row]] = {}
            for row in rows:
                by_length.setdefault(len(row[1]), []).append(row)
            groups = list(by_length.values())
        for group in groups:
            for start in range(0, len(group), self._rows_max):
                yield group[start : start + self._rows_max]

    def _infer(self, sequences: Sequence[Sequence[int]]) -> list[Output]:
        count, longest = len(sequences), max(map(len, sequences))
        rows, tokens = self._shape(count, longest)
        arrays, real = self._inputs.write(sequences, rows=rows, tokens=tokens)
        with memory_watched():
            values = self._run_in_place(arrays) if self._on_cpu else self._run_bound(arrays, rows, tokens)
        if values.ndim != (3 if self._graph.pooled else 2) or len(values) != rows:
            raise RunError(f"{rows} rows went into the model, and its {self._graph.output} is {list(values.shape)}")
        values = values[:count].astype("float32", copy=False)
        if self._role == "embedder":
            return _embedded(_pooled(values, real[:count]) if self._graph.pooled else values)
        return _labelled(values, self._named(values.shape[1]), each_alone=self._files.multi_label)

    def _shape(self, count: int, longest: int) -> tuple[int, int]:
        rows = self._graph.batch or count
        if not self._on_cpu:
            rows = next(size for size in row_buckets(self._rows_max) if size >= rows)
        if MASK not in self._graph.inputs:
            return rows, max(longest, 1)
        return rows, next(size for size in self._buckets if size >= longest)

    def _run_in_place(self, arrays: Mapping[str, Any]) -> Any:
        """The session reads the arrays where they are."""
        from onnxruntime import OrtValue

        fed = {name: OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        (output,) = self._session.run_with_ort_values([self._graph.output], fed)
        return output.numpy()

    def _run_bound(self, arrays: Mapping[str, Any], rows: int, tokens: int) -> Any:
        bound = self._bound.get((rows, tokens))
        if bound is None:
            bound = _Bound(self._session, self._graph, arrays, self._device)
            if tokens in self._buckets:  # a graph without a mask has a shape for every length: too many to keep
                self._bound[rows, tokens] = bound
        return bound.run(arrays)

    def _named(self, width: int) -> tuple[str, ...]:
        """Every column's label. Raises RunError when the configuration names more, fewer, or one twice."""
        if len(self._labels) != width:
            labels = self._files.labels or tuple(f"LABEL_{i}" for i in range(width))
            if len(labels) != width or len(set(labels)) != width:
                raise RunError(f"the model gives {width} scores, and its config.json names {len(set(labels))} labels")
            self._labels = labels
        return self._labels


class _Bound:
    """One shape on the device: inputs that are overwritten there, and an output that stays bound."""

    def __init__(self, session: Any, contract: Graph, arrays: Mapping[str, Any], device: str) -> None:
        from onnxruntime import OrtValue

        self._session = session
        self._binding = session.io_binding()
        self._inputs = {name: OrtValue.ortvalue_from_numpy(array, device, 0) for name, array in arrays.items()}
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_output(contract.output, device, 0)

    def run(self, arrays: Mapping[str, Any]) -> Any:
        for name, array in arrays.items():
            self._inputs[name].update_inplace(array)
        self._session.run_with_iobinding(self._binding)
        (output,) = self._binding.get_outputs()
        return output.numpy()


# --- answers ------------------------------------------------------------------------------------------------------


def _labelled(logits: Any, labels: tuple[str, ...], *, each_alone: bool) -> list[Output]:
    """Softmax over the labels; a logistic function of each where there is one logit or several may hold at once."""
    import numpy as np

    with np.errstate(all="ignore"):  # rows that are not finite are told apart below
        if each_alone or logits.shape[1] == 1:
            shares = 1.0 / (1.0 + np.exp(-logits))
        else:
            shares = np.exp(logits - logits.max(axis=1, keepdims=True))
            shares /= shares.sum(axis=1, keepdims=True)
    best = [labels[i] for i in logits.argmax(axis=1).tolist()]
    answers = [
        Output(label, False, dict(zip(labels, row, strict=True)))
        for label, row in zip(best, shares.tolist(), strict=True)
    ]
    return _without_nan(answers, logits)


def _embedded(vectors: Any) -> list[Output]:
    import numpy as np

    raw = np.ascontiguousarray(vectors, dtype="<f4").tobytes()
    size = 4 * vectors.shape[1]
    answers = [Output("", embedding=raw[at : at + size]) for at in range(0, len(raw), size)]
    return _without_nan(answers, vectors)


def _pooled(hidden: Any, real: Any) -> Any:
    """The mean over each row's own tokens, at length 1, as sentence-transformers' models are trained for."""
    import numpy as np

    weights = real.astype(np.float32)
    with np.errstate(all="ignore"):  # rows that are not finite are told apart later
        sums = np.matmul(weights[:, None, :], hidden)[:, 0, :]
        means = sums / np.maximum(weights.sum(axis=1, keepdims=True), 1.0)
        return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)


def _without_nan(answers: list[Output], values: Any) -> list[Output]:
    import numpy as np

    finite = np.isfinite(values)
    if finite.all():
        return answers
    failed = Output("", error=NAN_OUTPUT)
    return [answer if sound else failed for answer, sound in zip(answers, finite.all(axis=1).tolist(), strict=True)]
