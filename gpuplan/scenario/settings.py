"""`--set KEY=VALUE`: a value of a scenario file replaced from the command line, before the file is checked.

The key is a dotted path into the file, list entries by number or by their `name` (`traffic.0.arrivals.rate`,
`traffic.chat.arrivals.rate`); the value is YAML. An empty value takes the key away. Paths in values are relative to the
file, as those in it are.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

from gpuplan.errors import InputError
from gpuplan.scenario import text
from gpuplan.scenario.build import join

FLAG = "--set"


def apply(data: Any, settings: Iterable[str]) -> list[str]:
    """Puts the settings into the file's plain data, and gives their keys as errors name them (`traffic[0].name`).

    Raises InputError for one that is no KEY=VALUE, or whose key leads nowhere.
    """
    return [_apply(data, setting) for setting in settings]


def set_by(key: str, keys: Iterable[str], in_file: Container[str]) -> bool:
    """Whether what stands at `key` comes from one of the settings with these keys, and not from the file."""
    return any(_under(key, k) or (_under(k, key) and key not in in_file) for k in keys)


def _under(key: str, other: str) -> bool:
    return key == other or key.startswith((f"{other}.", f"{other}["))


def _apply(data: Any, setting: str) -> str:
    path, equals, written = setting.partition("=")
    rest = path.strip().replace("[", ".").replace("]", "")
    if not equals or not rest:
        raise InputError("not KEY=VALUE", key=FLAG, value=setting, allowed="e.g. deployment.gpu=h100-80gb")
    value, key = text.value(written, key=f"{FLAG} {path.strip()}"), ""
    while True:
        name, rest = _step(data, rest, setting)
        key = f"{key}[{name}]" if isinstance(data, list) else join(key, str(name))
        if not rest:
            break
        if isinstance(data, dict) and data.get(name) is None:
            data[name] = {}
        data = data[name]
    if value is not None:
        data[name] = value
    elif isinstance(data, dict):
        data.pop(name, None)
    else:
        del data[name]
    return key


def _step(data: Any, path: str, setting: str) -> tuple[str | int, str]:
    """The next key of a path, and what is left of it. A key that is there may hold dots itself."""
    name, _, rest = path.partition(".")
    if isinstance(data, dict):
        here = [key for key in data if path == key or path.startswith(f"{key}.")]
        if here:
            name = max(here, key=len)
            rest = path[len(name) + 1 :]
        return name, rest
    if not isinstance(data, list):
        raise InputError(f"nothing is under a plain value ({data!r})", key=FLAG, value=setting, allowed="a shorter key")
    names = [str(entry["name"]) for entry in data if isinstance(entry, dict) and "name" in entry]
    if name in names:
        return next(i for i, e in enumerate(data) if isinstance(e, dict) and str(e.get("name")) == name), rest
    if not (name.isascii() and name.isdigit() and int(name) < len(data)):
        known = [f"0 to {len(data) - 1}"] if data else []
        raise InputError(f"no entry {name!r}", key=FLAG, value=setting, allowed=", ".join([*known, *names]) or "none")
    return int(name), rest
