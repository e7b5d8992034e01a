"""ONNX Runtime: models that answer in one step (classifiers), on the CPU or on CUDA.

Inputs are `input_ids` and, where the graph has it, `attention_mask`, both [batch, tokens] int64, zero-padded to the
longest of the batch; the first output is the logits, [batch, labels].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpuplan.errors import RunError
from gpuplan.policy.vocabulary import RunStep
from gpuplan.serve import model_files
from gpuplan.serve.engines import Output, Prompt
from gpuplan.serve.engines.session import EngineSpec, described, memory_watched, open_session


class SingleStepEngine:
    """A runner with one session."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._files = model_files.read(spec.source)
        self._session: Any = None
        self.description = described(spec)

    def load(self) -> None:
        self._session = open_session(self._files.model, self._spec)
        self._infer([[1], [1, 1]])  # warm up; also proves that the graph takes what we feed it

    def run(self, step: RunStep, prompts: Mapping[int, Prompt]) -> dict[int, Output]:
        batch = [(p.request_id, prompts[p.request_id].token_ids) for p in step.prefills]
        with memory_watched():
            rows = self._infer([ids for _, ids in batch])
        return {request_id: self._output(row) for (request_id, _), row in zip(batch, rows, strict=True)}

    def release(self, request_ids: Iterable[int]) -> None:
        """Nothing is kept between steps."""

    def notes(self) -> list[str]:
        return []

    def close(self) -> None:
        self._session = None

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
