"""A driver to ask: pynvml itself, its real ctypes calls, and a library that plays what a test scripts."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import pynvml
import pytest

from .nvml_fake import compiled

Play = Callable[[str], None]


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled library; skips where it cannot be made."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the fake driver is built for Linux only")
    library = compiled(tmp_path_factory.mktemp("nvml"))
    if library is None:
        pytest.skip("no C compiler on this machine")
    return library


@pytest.fixture
def play(fake_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    """Gives NVML a script to play, from its next initialisation on. Whatever library was loaded comes back after."""
    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(fake_library)))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})

    def script(text: str) -> None:
        file = tmp_path / "nvml.txt"
        file.write_text(text)
        monkeypatch.setenv("NVML_FAKE", str(file))

    return script
