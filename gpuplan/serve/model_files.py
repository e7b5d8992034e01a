"""What a model is made of, read from one place: a built-in, or an ONNX file with its neighbours.

`read(source)` takes `builtin:NAME` or the path of an ONNX file. Beside a file stand `tokenizer.json` (needed) and
`config.json` (labels, window, ids that pad or end a text), as Hugging Face's exporters write them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuplan.errors import InputError
from gpuplan.hardware import shapes
from gpuplan.scenario import onnx_files

BUILTIN = "builtin:"


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """`make` gives `model`, a path or a serialised graph: not before it is asked for, as a server whose workers are
    processes only needs the rest. `encode` gives a text's token ids; `vocabulary` is the `tokenizers.Tokenizer` behind
    it, which decoders turn ids back into text with (None: there is no way back). `end_ids` are the tokens that end a
    text. `context_tokens_max` is the window and `vocabulary_size` the number of token ids, None where nobody says;
    `multi_label`: several labels may hold at once."""

    make: Callable[[], Path | bytes]
    encode: Callable[[str], Sequence[int]]
    vocabulary: Any = None
    labels: tuple[str, ...] = ()
    end_ids: frozenset[int] = frozenset()
    pad_id: int = 0
    context_tokens_max: int | None = None
    vocabulary_size: int | None = None
    multi_label: bool = False

    @property
    def model(self) -> Path | bytes:
        return self.make()


def read(source: str) -> ModelFiles:
    """The model's parts. Raises InputError for a file that is missing or cannot be read."""
    if source.startswith(BUILTIN):
        return _builtin(source.removeprefix(BUILTIN))
    model = Path(source)
    found = _vocabulary_beside(model)
    config = onnx_files.config_beside(model)
    return ModelFiles(
        lambda: model,
        lambda text: found.encode(text).ids,
        found,
        labels(config),
        _end_ids(config),
        pad_id=pad if isinstance(pad := config.get("pad_token_id"), int) and pad >= 0 else 0,
        context_tokens_max=onnx_files.window_of(config),
        vocabulary_size=_vocabulary_size(config, found),
        multi_label=config.get("problem_type") == "multi_label_classification",
    )


def vocabulary(source: str) -> Any:
    """The model's `tokenizers.Tokenizer` alone; None for a built-in that counts words. Raises InputError as `read`."""
    if not source.startswith(BUILTIN):
        return _vocabulary_beside(Path(source))
    made = importlib.import_module(builtin_module(source.removeprefix(BUILTIN)))
    return made.vocabulary() if hasattr(made, "vocabulary") else None


def labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a classifier's outputs by a `config.json`, in order. Raises InputError for an `id2label` that is
    none."""
    named = config.get("id2label") or {}
    try:
        return tuple(str(named[key]) for key in sorted(named, key=int))
    except (TypeError, ValueError, KeyError):
        raise InputError(
            "not a mapping from numbers to names", key="config.json: id2label", value=named, allowed='{"0": "no", ...}'
        ) from None


def builtin_module(name: str) -> str:
    """Where a built-in is made."""
    return f"gpuplan.serve.builtin.{name.replace('-', '_')}"


def _builtin(name: str) -> ModelFiles:
    """A built-in is a module of that name with `token_ids`, `model`, for a classifier `LABELS`, and for a decoder
    `vocabulary` and `end_ids`."""
    made = importlib.import_module(builtin_module(name))
    shape = shapes.shape(name)
    decodes = shape.role == "decoder"
    return ModelFiles(
        made.model,
        made.token_ids,
        made.vocabulary() if decodes else None,
        labels=getattr(made, "LABELS", ()),
        end_ids=made.end_ids() if decodes else frozenset(),
        context_tokens_max=shape.context_tokens_max,
        vocabulary_size=shape.vocabulary,
    )


def _vocabulary_beside(model: Path) -> Any:
    file = model.with_name("tokenizer.json")
    if not model.is_file() or not file.is_file():
        missing = model if not model.is_file() else file
        raise InputError(
            "no such file", key="models", value=str(missing), allowed="model.onnx with tokenizer.json beside"
        )
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise InputError(f"not a tokenizer: {error}", key="models", value=str(file)) from None
    found.no_padding()
    found.no_truncation()
    return found


def _vocabulary_size(config: Mapping[str, Any], vocabulary: Any) -> int:
    """Rows of the embedding: `vocab_size`, which may be rounded up, or one past the tokenizer's last id."""
    told = config.get("vocab_size")
    if isinstance(told, int) and not isinstance(told, bool) and told > 0:
        return told
    return int(max(vocabulary.get_vocab(with_added_tokens=True).values(), default=0)) + 1


def _end_ids(config: Mapping[str, Any]) -> frozenset[int]:
    ids = config.get("eos_token_id")
    return frozenset(ids if isinstance(ids, list) else [ids] if isinstance(ids, int) else [])
