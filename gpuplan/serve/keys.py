"""API keys from a file: a YAML mapping of names to keys.

A name says whose requests they are, in rate limits and records; the key itself is never told, not in an error either.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gpuplan.errors import InputError
from gpuplan.scenario import text

LENGTH_MIN = 8
DEFAULT = "default"
"""The name of the key that is not from a file."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # as `demand.Name`


def load(path: Path) -> dict[str, str]:
    """The keys by name. Raises InputError with the file, the line and the name."""
    data, lines = text.read(path)
    try:
        return _checked(data)
    except InputError as error:
        error.file, error.line = str(path), text.line_of(error.key, lines)
        raise


def together(file: dict[str, str], one: str | None) -> dict[str, str]:
    """The keys of a file, and the one that was given by itself. Raises InputError when they are at odds."""
    if one is None:
        return file
    if DEFAULT in file or one in file.values():
        raise InputError("stands in the file, too", key="--api-key", allowed=f"a key of its own, named {DEFAULT}")
    return {**file, DEFAULT: one}


def _checked(data: Any) -> dict[str, str]:
    if not isinstance(data, dict) or not data:
        raise InputError("needs a mapping", allowed="names and their keys")
    owners: dict[str, str] = {}
    for name, key in data.items():
        if not _NAME.fullmatch(name):
            raise InputError("not a name", key=name, allowed="letters, digits, '.', '_' and '-', at most 128")
        if not isinstance(key, str):
            raise InputError("the key is no text", key=name, allowed="a text; a number in quotes")
        if len(key) < LENGTH_MIN or not key.isascii() or not key.isprintable() or " " in key:
            raise InputError(
                "not a usable key", key=name, allowed=f"at least {LENGTH_MIN} printable ASCII characters, no spaces"
            )
        if key in owners:
            raise InputError(f"has the key of {owners[key]}", key=name, allowed="a key of its own")
        owners[key] = name
    return {name: key for key, name in owners.items()}
