"""What a model is made of, read from one place: a built-in, or an ONNX file with its neighbours.

`read(source)` takes `builtin:NAME` or the path of an ONNX file. Beside a file stand `tokenizer.json` (needed) and
`config.json` (labels, ids that end a text), as Hugging Face's exporters write them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuplan.errors import InputError

BUILTIN = "builtin:"


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """`model` is a path or a serialised graph, `encode` gives a text's token ids; `vocabulary` is the
    `tokenizers.Tokenizer` behind it, which decoders turn ids back into text with (None: there is no way back).
    `end_ids` are the tokens that end a text."""

    model: Path | bytes
    encode: Callable[[str], Sequence[int]]
    vocabulary: Any = None
    labels: tuple[str, ...] = ()
    end_ids: frozenset[int] = frozenset()


def read(source: str) -> ModelFiles:
    """The model's parts. Raises InputError for a file that is missing or cannot be read."""
    if source.startswith(BUILTIN):
        return _builtin(source.removeprefix(BUILTIN))
    model = Path(source)
    vocabulary = _vocabulary_beside(model)
    config = _config_beside(model)
    return ModelFiles(model, lambda text: vocabulary.encode(text).ids, vocabulary, _labels(config), _end_ids(config))


def _builtin(name: str) -> ModelFiles:
    from gpuplan.serve.builtin import sentiment, tiny_chat

    if name == tiny_chat.NAME:
        vocabulary = tiny_chat.vocabulary()
        return ModelFiles(
            tiny_chat.model(), lambda text: vocabulary.encode(text).ids, vocabulary, end_ids=tiny_chat.end_ids()
        )
    assert name == "sentiment", "demand.ModelSource names the built-ins that exist"
    return ModelFiles(sentiment.model(), sentiment.token_ids, labels=sentiment.LABELS)


def _vocabulary_beside(model: Path) -> Any:
    file = model.with_name("tokenizer.json")
    if not model.is_file() or not file.is_file():
        missing = model if not model.is_file() else file
        raise InputError(
            "no such file", key="models", value=str(missing), allowed="model.onnx with tokenizer.json beside"
        )
    from tokenizers import Tokenizer

    try:
        vocabulary = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise InputError(f"not a tokenizer: {error}", key="models", value=str(file)) from None
    vocabulary.no_padding()
    vocabulary.no_truncation()
    return vocabulary


def _config_beside(model: Path) -> dict[str, Any]:
    """Hugging Face's `config.json` beside the model, or nothing."""
    file = model.with_name("config.json")
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}", key="models", value=str(file)) from None
    if not isinstance(config, dict):
        raise InputError("not a JSON object", key="models", value=str(file))
    return config


def _labels(config: dict[str, Any]) -> tuple[str, ...]:
    named = config.get("id2label") or {}
    return tuple(str(named[key]) for key in sorted(named, key=int))


def _end_ids(config: dict[str, Any]) -> frozenset[int]:
    ids = config.get("eos_token_id")
    return frozenset(ids if isinstance(ids, list) else [ids] if isinstance(ids, int) else [])
