"""What another version of a model may be: asked for by an operator, checked before anything is loaded.

A version answers as the model that it replaces: the same task, a window that is not shorter, and (the fleet sees to it)
the same tokens. An ONNX file is looked for below one folder that the operator named at start, and nowhere else.
"""

from __future__ import annotations

from pathlib import Path

from gpuplan.errors import InputError
from gpuplan.scenario import onnx_files
from gpuplan.scenario.demand import ModelSource
from gpuplan.scenario.deployment import role, window_of


def checked(source: ModelSource, current: ModelSource, root: Path | None) -> ModelSource:
    """The version to load: `source` with its path and all that stands beside the file. Raises InputError."""
    named = [key for key in ("onnx", "builtin", "emulate") if getattr(source, key) is not None]
    if len(named) != 1:
        raise InputError("exactly one of them", key="onnx, builtin, emulate", value=named)
    if source.onnx is not None:
        task = source.task or current.task
        source = onnx_files.filled(ModelSource(onnx=str(_below(root, source.onnx)), task=task), key="onnx")
    if role(source) != role(current):
        raise InputError("another task: it is another model, not a version", key=named[0], value=role(source))
    if window_of(source) < window_of(current):
        raise InputError(
            "takes fewer tokens than the version that serves",
            key=named[0],
            value=window_of(source),
            allowed=f"at least {window_of(current)}",
        )
    return source


def _below(root: Path | None, name: str) -> Path:
    """The file of that name below the folder. What leads out of it, by `..` or by a link, is not there."""
    if root is None:
        raise InputError("no file may be loaded", key="onnx", value=name, allowed="start the server with --models-dir")
    file = (root / name).resolve()
    if not file.is_relative_to(root.resolve()) or not file.is_file():
        raise InputError("no such file below --models-dir", key="onnx", value=name)
    return file
