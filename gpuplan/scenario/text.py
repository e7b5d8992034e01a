"""YAML as plain data, and the line of every key.

`read` takes a file and gives its value with a map from dotted keys to lines. Safe by construction: no tags, no
duplicate or merged keys, bounded size, depth and number of values (aliases are counted as often as they are used).
Raises InputError with file, line and key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpuplan.errors import InputError
from gpuplan.scenario.build import join

FILE_BYTES_MAX = 1 << 20
NODES_MAX = 100_000
NESTING_MAX = 50


def read(path: Path) -> tuple[Any, dict[str, int]]:
    """The file's value in plain dicts, lists and scalars, and the line of every dotted key."""
    found = documents(path)
    if len(found) > 1:
        raise InputError("not valid YAML: another document", file=str(path), line=found[1][1][""], allowed="one")
    return found[0] if found else (None, {})


def documents(path: Path) -> list[tuple[Any, dict[str, int]]]:
    """The same of every document of a file, those that `---` sets apart."""
    import yaml

    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise InputError("file is too large", file=str(path), allowed=f"{FILE_BYTES_MAX} bytes")
        nodes = list(yaml.compose_all(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"cannot read: {reason}", file=str(path)) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise InputError(f"not valid YAML: {error.problem}", file=str(path), line=line) from None
    except (yaml.YAMLError, RecursionError):
        raise InputError("not valid YAML", file=str(path)) from None
    found = []
    for node in nodes:
        walk = _Walk(path)
        found.append((walk.value(node, "", 0), walk.lines))
    return found


def value(written: str, *, key: str) -> Any:
    """One value as it would stand in a file, under the same rules. Raises InputError naming the key."""
    import yaml

    try:
        node = yaml.compose(written, Loader=yaml.SafeLoader) if len(written) <= FILE_BYTES_MAX else None
    except (yaml.YAMLError, RecursionError):
        raise InputError("not valid YAML", key=key, value=written) from None
    return _Walk(None).value(node, key, 0) if node is not None else None


class _Walk:
    """From YAML nodes to plain values, counting them and noting where each key stands."""

    def __init__(self, path: Path | None) -> None:
        import yaml

        self._file = str(path) if path is not None else ""
        self._scalars = yaml.SafeLoader("")
        self._left = NODES_MAX
        self.lines: dict[str, int] = {}

    def value(self, node: Any, key: str, depth: int) -> Any:
        import yaml

        self._left -= 1
        if self._left < 0 or depth > NESTING_MAX:
            raise self._error("too many or too deeply nested values", node)
        self.lines.setdefault(key, _line(node))
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self._mapping(node, key, depth)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.value(item, f"{key}[{i}]", depth + 1) for i, item in enumerate(node.value)]
        return self._scalar(node, key)

    def _mapping(self, node: Any, key: str, depth: int) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            inner = join(key, str(self._scalar(key_node, key)))
            name = inner[len(key) + 1 :] if key else inner
            if name in mapping:
                raise self._error("the key stands twice", key_node, inner)
            self.lines[inner] = _line(key_node)
            mapping[name] = self.value(value_node, inner, depth + 1)
        return mapping

    def _scalar(self, node: Any, key: str) -> Any:
        import yaml

        try:
            if isinstance(node, yaml.ScalarNode):
                return self._scalars.construct_object(node)
        except (yaml.YAMLError, ValueError):
            pass
        raise self._error("not a plain value", node, key, "no tag; text, a number, true, false, a list or a mapping")

    def _error(self, problem: str, node: Any, key: str = "", allowed: str = "") -> InputError:
        line = _line(node) if self._file else None
        return InputError(problem, file=self._file, line=line, key=key, allowed=allowed)


def _line(node: Any) -> int:
    return int(node.start_mark.line) + 1


def line_of(key: str, lines: dict[str, int]) -> int | None:
    """The line of `key`, or of the nearest enclosing key that stands in the file."""
    while key and key not in lines:
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return lines.get(key)
