"""What can be served: the built-ins, and one ONNX file looked at from outside.

`inspect` reads the graph's inputs and outputs and the files beside it, and loads it on the CPU as a server would: the
reason that it gives is the one that a server would give.
"""

from __future__ import annotations

import importlib
import typing
from pathlib import Path
from typing import Any

from msgspec import Struct

from gpuplan.errors import GpuplanError, InputError
from gpuplan.scenario import deployment, onnx_files
from gpuplan.scenario.demand import ModelSource, Role, Task
from gpuplan.serve import model_files
from gpuplan.serve.engines.session import EngineSpec
from gpuplan.serve.models import runner

ENDPOINTS: dict[Role, str] = {
    "decoder": "/v1/completions, /v1/chat/completions",
    "classifier": "/v1/classify",
    "embedder": "/v1/embeddings",
}
LABELS_MAX = 1000
"""Of a configuration that is shown: more are counted, not listed."""


class Builtin(Struct, frozen=True):
    """A model that the package makes itself. `parameters` counts weights, `size_bytes` the serialised graph."""

    name: str
    about: str
    role: Role
    endpoint: str
    parameters: int
    size_bytes: int
    context_tokens_max: int


class Tensor(Struct, frozen=True):
    """An input or output; a dimension that varies has its name, or `?`."""

    name: str
    type: str
    shape: list[int | str]


class Inspected(Struct, frozen=True):
    """An ONNX file. `task_from` says who decided on the task, `tokenizer` is the file found (None: there is none),
    `problem` the reason why it cannot be served (None: it can)."""

    path: str
    size_bytes: int
    inputs: list[Tensor]
    outputs: list[Tensor]
    task: Task
    task_from: str
    endpoint: str
    context_tokens_max: int
    tokenizer: str | None
    labels: list[str]
    problem: str | None


def builtins() -> list[Builtin]:
    """Every built-in that a scenario can name."""
    kinds = typing.get_type_hints(ModelSource)["builtin"]
    names = [name for kind in typing.get_args(kinds) for name in typing.get_args(kind)]
    return [_builtin(name) for name in names]


def inspect(path: Path, *, task: Task | None = None) -> Inspected:
    """What an ONNX file is and whether it can be served, as `task` or as what stands beside it says.

    Raises InputError for what is no ONNX file, and for a `config.json` beside it that cannot be read.
    """
    graph = _graph(path)
    config = onnx_files.config_beside(path, key="MODEL")
    source = onnx_files.filled(ModelSource(onnx=str(path), task=task), key="MODEL")
    decided = "asked for" if task else "config.json" if onnx_files.task_of(config) else "nothing says otherwise"
    inputs, outputs = ([_tensor(value) for value in values] for values in (_fed(graph), graph.output))
    tokenizer = path.with_name("tokenizer.json")
    role = deployment.role(source)
    assert source.task is not None, "filled() names it"
    return Inspected(
        path=str(path),
        size_bytes=onnx_files.weights_bytes(path),
        inputs=inputs,
        outputs=outputs,
        task=source.task,
        task_from=decided,
        endpoint=ENDPOINTS[role],
        context_tokens_max=deployment.window_of(source),
        tokenizer=str(tokenizer) if tokenizer.is_file() else None,
        labels=list(model_files.labels(config)[:LABELS_MAX]) if role == "classifier" else [],
        problem=_problem(source),
    )


def _problem(source: ModelSource) -> str | None:
    assert source.onnx is not None, "only an ONNX file is inspected"
    spec = EngineSpec(
        source=source.onnx, role=deployment.role(source), tokens_max=deployment.window_of(source), max_batch_size=1
    )
    try:
        tried = runner(spec)
        try:
            tried.load()
        finally:
            tried.close()
    except GpuplanError as error:
        return str(error)
    return None


def _builtin(name: str) -> Builtin:
    import onnx

    source = ModelSource(builtin=typing.cast(Any, name))
    role = deployment.role(source)
    made = importlib.import_module(model_files.builtin_module(name))
    serialised: bytes = made.model()
    weights = onnx.load_from_string(serialised).graph.initializer
    about = " ".join((made.__doc__ or "").split("\n\n")[0].split())
    return Builtin(
        name=name,
        about=about.removeprefix(f"`{name}`: "),
        role=role,
        endpoint=ENDPOINTS[role],
        parameters=sum(_product(weight.dims) for weight in weights),
        size_bytes=len(serialised),
        context_tokens_max=deployment.window_of(source),
    )


def _graph(path: Path) -> Any:
    import onnx
    from google.protobuf.message import DecodeError

    allowed = "the path of a .onnx file"
    if not path.is_file():
        raise InputError("no such file", key="MODEL", value=str(path), allowed=allowed)
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except (DecodeError, ValueError):
        raise InputError("not an ONNX model", key="MODEL", value=str(path), allowed=allowed) from None
    except OSError as error:
        raise InputError(f"cannot read: {error.strerror}", key="MODEL", value=str(path)) from None
    if not graph.node:
        raise InputError("not an ONNX model: it has no nodes", key="MODEL", value=str(path), allowed=allowed)
    return graph


def _fed(graph: Any) -> list[Any]:
    """The inputs that a caller gives: older exporters list the weights among them."""
    weights = {weight.name for weight in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def _tensor(value: Any) -> Tensor:
    import onnx

    kind = value.type.tensor_type
    shape = [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in kind.shape.dim]
    return Tensor(value.name, onnx.TensorProto.DataType.Name(kind.elem_type).lower(), shape)


def _product(dims: Any) -> int:
    product = 1
    for dim in dims:
        product *= int(dim)
    return product
