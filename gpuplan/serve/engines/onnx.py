"""ONNX Runtime: models that answer in one step (classifiers), on the CPU or on CUDA.

The provider asked for is the provider that runs, or `load` raises: ONNX Runtime by itself falls back to the CPU
without a word, at session creation and again when a GPU fails in mid-run, so both are checked and switched off.
Inputs are `input_ids` and, where the graph has it, `attention_mask`, both [batch, tokens] int64, zero-padded to the
longest of the batch; the first output is the logits, [batch, labels].
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpuplan.errors import RunError
from gpuplan.policy.vocabulary import RunStep
from gpuplan.record.run import Provenance
from gpuplan.serve.engines import Output, Prompt

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"

Tokenizer = Callable[[str], Sequence[int]]


class OnnxEngine:
    """One session in one thread of its own; `run` on it releases the GIL."""

    def __init__(
        self,
        model: Path | bytes,
        labels: Sequence[str],
        tokenizer: Tokenizer,
        *,
        provider: str = CPU_PROVIDER,
        threads: int = 1,
        memory_bytes_max: int | None = None,
    ) -> None:
        self._model, self._labels, self._tokenizer = model, tuple(labels), tokenizer
        self._provider, self._threads, self._memory_bytes_max = provider, threads, memory_bytes_max
        self._session: Any = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="onnx")
        self.description = f"ONNX Runtime, {provider}"
        self.provenance: Provenance = "cpu" if provider == CPU_PROVIDER else "hardware"

    def tokenize(self, text: str) -> Sequence[int]:
        return self._tokenizer(text)

    async def load(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._load)

    async def run(self, step: RunStep, prompts: Mapping[int, Prompt], *, asked_s: float) -> Mapping[int, Output]:
        batch = [(p.request_id, prompts[p.request_id].token_ids) for p in step.prefills]
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, batch)

    def notes(self) -> list[str]:
        return []

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._unload)
        self._thread.shutdown()

    # --- in the engine's thread -----------------------------------------------------------------------------------

    def _load(self) -> None:
        import onnxruntime as ort

        # Without this, asking for CUDA on a machine without it prints to stderr past the session's own log level.
        ort.set_default_logger_severity(4)
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        source = str(self._model) if isinstance(self._model, Path) else self._model
        try:
            self._session = ort.InferenceSession(source, options, providers=[self._provider_with_options()])
        except Exception as error:  # onnxruntime's exceptions derive from Exception one by one
            raise RunError(f"cannot load the model: {_first_line(error)}") from None
        self._session.disable_fallback()
        runs_on = self._session.get_providers()[0]
        if runs_on != self._provider:
            raise RunError(f"{self._provider} was asked for and is not available here ({runs_on} is)")
        self.description = f"ONNX Runtime {ort.__version__}, {runs_on}"
        self._infer([[1], [1, 1]])  # warm up; also proves that the graph takes what we feed it

    def _provider_with_options(self) -> Any:
        if self._provider == CPU_PROVIDER:
            return self._provider
        options = {"arena_extend_strategy": "kSameAsRequested"}
        if self._memory_bytes_max is not None:
            options["gpu_mem_limit"] = str(self._memory_bytes_max)
        return (self._provider, options)

    def _run(self, batch: list[tuple[int, Sequence[int]]]) -> dict[int, Output]:
        rows = self._infer([ids for _, ids in batch])
        return {request_id: self._output(row) for (request_id, _), row in zip(batch, rows, strict=True)}

    def _infer(self, sequences: Sequence[Sequence[int]]) -> Any:
        import numpy as np

        ids = np.zeros((len(sequences), max(map(len, sequences))), dtype=np.int64)
        mask = np.zeros_like(ids)
        for i, sequence in enumerate(sequences):
            ids[i, : len(sequence)] = sequence
            mask[i, : len(sequence)] = 1
        known = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        names = [given.name for given in self._session.get_inputs()]
        if missing := [name for name in names if name not in known]:
            raise RunError(f"the model wants inputs that gpuplan does not feed: {', '.join(missing)}")
        (logits, *_) = self._session.run(None, {name: known[name] for name in names})
        if logits.ndim != 2 or len(logits) != len(sequences):
            raise RunError(f"the model's first output is {logits.shape}, not [batch, labels]")
        return logits

    def _output(self, logits: Any) -> Output:
        import numpy as np

        if not np.isfinite(logits).all():
            return Output("", error="nan_output")
        weights = np.exp(logits - logits.max())
        shares = weights / weights.sum()
        labels = self._labels or tuple(f"LABEL_{i}" for i in range(len(shares)))
        scores = {label: float(share) for label, share in zip(labels, shares, strict=True)}
        return Output(max(scores, key=lambda label: scores[label]), scores=scores)

    def _unload(self) -> None:
        self._session = None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
