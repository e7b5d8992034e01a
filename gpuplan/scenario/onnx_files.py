"""What stands beside an ONNX file: its `config.json` and its weights' size, as the keys of a `ModelSource`.

`filled(source)` gives the source with every key that the file's neighbours answer and the user did not; what the user
wrote stays. The graph itself is not opened here: planning needs no ONNX Runtime. A folder may have moved or be on
another machine when a run is read again, so what was found is kept as plain data.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from gpuplan.errors import InputError
from gpuplan.hardware import shapes
from gpuplan.scenario.build import build
from gpuplan.scenario.demand import ModelSource, Role, ShapeSpec, Task

CONFIG_CHARS_MAX = 1 << 20
"""A `config.json` is some kilobytes: a weight file named by mistake is not read to its end."""

ROLES: dict[Task, Role] = {"generate": "decoder", "classify": "classifier", "embed": "embedder"}

# Hugging Face names a class by its head. A bare `...Model` has none: its last hidden state is pooled to an embedding.
_ENDINGS: tuple[tuple[str, Task], ...] = (
    ("ForCausalLM", "generate"),
    ("LMHeadModel", "generate"),
    ("ForSequenceClassification", "classify"),
    ("Model", "embed"),
)
_WINDOW_KEYS = ("max_position_embeddings", "n_positions", "n_ctx")
# These count positions from behind the padding id on, so that many rows of their table are never reached.
_OFFSET_FAMILIES = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet", "longformer"})


def filled(source: ModelSource, *, key: str) -> ModelSource:
    """`source` with `task`, `context_tokens_max` and `onnx_shape` where the files beside `source.onnx` tell them; the
    defaults where they do not. Raises InputError for a `config.json` that cannot be read, or a window past its own.
    """
    assert source.onnx is not None, "only an ONNX file has neighbours"
    model = Path(source.onnx)
    config = config_beside(model, key=key)
    task = source.task or task_of(config) or "classify"
    window = window_of(config)
    asked = source.context_tokens_max
    if asked is not None and window is not None and asked > window:
        raise InputError(
            "is past the model's positions",
            key=f"{key}.context_tokens_max",
            value=asked,
            allowed=f"at most {window}, as its config.json says",
        )
    return msgspec.structs.replace(
        source,
        task=task,
        context_tokens_max=asked or window or default_window(task),
        onnx_shape=source.onnx_shape or _shape(config, task, weights_bytes(model), key),
    )


def config_beside(model: Path, *, key: str = "models") -> dict[str, Any]:
    """Hugging Face's `config.json` beside the model, or nothing. Raises InputError when it is no JSON object."""
    file = model.with_name("config.json")
    try:
        with file.open(encoding="utf-8") as opened:
            config = json.loads(opened.read(CONFIG_CHARS_MAX))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise InputError(f"cannot read: {error.strerror}", key=key, value=str(file)) from None
    except (ValueError, RecursionError):
        raise InputError("not JSON", key=key, value=str(file), allowed="a Hugging Face config.json") from None
    if not isinstance(config, dict):
        raise InputError("not a JSON object", key=key, value=str(file), allowed="a Hugging Face config.json")
    return config


def task_of(config: Mapping[str, Any]) -> Task | None:
    """What a model's class is for; None where the configuration does not say, or names a head that is not served."""
    named = config.get("architectures")
    for architecture in named if isinstance(named, list) else ():
        for ending, task in _ENDINGS:
            if str(architecture).endswith(ending):
                return task
    return None


def window_of(config: Mapping[str, Any]) -> int | None:
    """The most tokens a sequence may have by the configuration; None where it does not say."""
    found = next((config[name] for name in _WINDOW_KEYS if config.get(name) is not None), None)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        return None
    if config.get("model_type") in _OFFSET_FAMILIES:
        pad = config.get("pad_token_id", 1)
        return max(found - (pad if isinstance(pad, int) else 1) - 1, 1)
    return found


def default_window(task: Task) -> int:
    """Tokens, where nobody says: what small decoders and BERT-like encoders are mostly made with."""
    return 2048 if task == "generate" else 512


def weights_bytes(model: Path) -> int:
    """The size of the file and of its external data (`.onnx_data`, `.onnx.data`, `.data`); 0 when it is not there."""
    beside = (model, Path(f"{model}_data"), Path(f"{model}.data"), model.with_suffix(".data"))
    total = 0
    for file in dict.fromkeys(beside):
        try:
            total += file.stat().st_size
        except OSError:
            continue
    return total


def _shape(config: Mapping[str, Any], task: Task, file_bytes: int, key: str) -> ShapeSpec | None:
    """The transformer that a configuration describes, its weights as large as the files; None where it is none
    that can be read. Bytes an element are kept within what a shape may have: a graph may hold a tied table twice."""
    try:
        found = dataclasses.replace(shapes.from_config(config, key=key), role=ROLES[task])
    except InputError:
        return None
    if file_bytes:
        elements = found.weights_bytes / found.bytes_per_element
        found = dataclasses.replace(found, bytes_per_element=round(min(max(file_bytes / elements, 0.5), 4.0), 4))
    return build(dataclasses.asdict(found), ShapeSpec, key)
