"""ONNX Runtime: models that answer in one step (classifiers), on the CPU or on CUDA.

Inputs are `input_ids` and, where the graph has it, `attention_mask`, both [batch, tokens] int64, zero-padded to the
longest of the batch; the first output is the logits, [batch, labels].
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gpuplan.errors import RunError
from gpuplan.policy.vocabulary import RunStep
from gpuplan.record.run import Provenance
from gpuplan.serve import model_files
from gpuplan.serve.engines import Output, Prompt
from gpuplan.serve.engines.session import CPU_PROVIDER, EngineSpec, described, memory_watched, open_session


class SingleStepEngine:
    """One session in one thread of its own; `run` on it releases the GIL."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._files = model_files.read(spec.source)
        self._session: Any = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="onnx")
        self.description = described(spec)
        self.provenance: Provenance = "cpu" if spec.provider == CPU_PROVIDER else "hardware"

    def tokenize(self, text: str) -> Sequence[int]:
        return self._files.encode(text)

    async def load(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._load)

    async def run(self, step: RunStep, prompts: Mapping[int, Prompt], *, asked_s: float) -> Mapping[int, Output]:
        batch = [(p.request_id, prompts[p.request_id].token_ids) for p in step.prefills]
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, batch)

    def release(self, request_ids: Iterable[int]) -> None:
        """Nothing is kept between steps."""

    def notes(self) -> list[str]:
        return []

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._unload)
        self._thread.shutdown()

    # --- in the engine's thread -----------------------------------------------------------------------------------

    def _load(self) -> None:
        self._session = open_session(self._files.model, self._spec)
        self._infer([[1], [1, 1]])  # warm up; also proves that the graph takes what we feed it

    def _run(self, batch: list[tuple[int, Sequence[int]]]) -> dict[int, Output]:
        with memory_watched():
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
        labels = self._files.labels or tuple(f"LABEL_{i}" for i in range(len(shares)))
        scores = {label: float(share) for label, share in zip(labels, shares, strict=True)}
        return Output(max(scores, key=lambda label: scores[label]), scores=scores)

    def _unload(self) -> None:
        self._session = None
