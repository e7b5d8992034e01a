"""An ONNX Runtime session opened right, and its failures in words.

The provider asked for is the provider that runs, or `open_session` raises: ONNX Runtime by itself falls back to the CPU
without a word, at session creation and again when a GPU fails in mid-run, so both are checked and switched off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msgspec import Struct

from gpuplan.errors import RunError
from gpuplan.scenario.deployment import Role
from gpuplan.serve.engines import OutOfMemory

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"

# What ONNX Runtime and CUDA say when memory is short (bfc_arena.cc, cuda_call.cc); there is no class for it.
_OUT_OF_MEMORY = (
    "Failed to allocate memory for requested buffer",
    "is smaller than requested bytes of",
    "Failed to find a free memory block",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "bad allocation",
)


class EngineSpec(Struct, frozen=True, kw_only=True):
    """All that an engine is built from, as plain data: a worker process gets it over its socket.

    `source` is `builtin:NAME` or the path of an ONNX file; `tokens_max` the longest sequence it may hold, prompt and
    output together; `memory_bytes_max` bounds the arena on CUDA; `device` is what CUDA may see (`CUDA_VISIBLE_DEVICES`)
    and `cores` where a worker's threads may run, empty for anywhere.
    """

    source: str
    role: Role
    provider: str = CPU_PROVIDER
    threads: int = 1
    memory_bytes_max: int | None = None
    max_batch_size: int = 32
    tokens_max: int = 2048
    device: str | None = None
    cores: tuple[int, ...] = ()


def open_session(model: Path | bytes, spec: EngineSpec) -> Any:
    """An `onnxruntime.InferenceSession` on `spec.provider`, with its threads and memory. Raises RunError."""
    import onnxruntime as ort

    # Without this, asking for CUDA on a machine without it prints to stderr past the session's own log level.
    ort.set_default_logger_severity(4)
    options = ort.SessionOptions()
    options.intra_op_num_threads = spec.threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    source = str(model) if isinstance(model, Path) else model
    try:
        session = ort.InferenceSession(source, options, providers=[_provider(spec)])
    except Exception as error:  # onnxruntime's exceptions derive from Exception one by one
        raise RunError(f"cannot load the model: {first_line(error)}") from None
    session.disable_fallback()
    runs_on = session.get_providers()[0]
    if runs_on != spec.provider:
        raise RunError(f"{spec.provider} was asked for and is not available here ({runs_on} is)")
    return session


@contextlib.contextmanager
def memory_watched() -> Iterator[None]:
    """Turns ONNX Runtime's many ways to say that memory is short into OutOfMemory."""
    try:
        yield
    except MemoryError as error:
        raise OutOfMemory(first_line(error)) from None
    except Exception as error:
        if any(words in str(error) for words in _OUT_OF_MEMORY):
            raise OutOfMemory(first_line(error)) from None
        raise


def described(spec: EngineSpec) -> str:
    """What runs, for logs and reports."""
    import onnxruntime as ort

    return f"ONNX Runtime {ort.__version__}, {spec.provider}"


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _provider(spec: EngineSpec) -> Any:
    if spec.provider == CPU_PROVIDER:
        return spec.provider
    # kSameAsRequested: the default doubles the arena at every step, which a slice has no room for.
    options = {"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_use_max_workspace": "0"}
    if spec.memory_bytes_max is not None:
        options["gpu_mem_limit"] = str(spec.memory_bytes_max)
    return (spec.provider, options)
