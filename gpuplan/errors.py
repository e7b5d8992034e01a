"""The two ways a command can end badly. Raised anywhere, turned into an exit code only by `cli`.

`InputError` (exit code 2): the user can mend it. It names what is wrong (`key`, `value`) and what would be right
(`allowed`); `scenario.files` adds the file and the line.
`RunError` (exit code 1): the input was fine and the work failed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GpuplanError(Exception):
    """Base of both; its text is one line that a user can act on."""

    exit_code = 1


class RunError(GpuplanError):
    """The run itself failed: a server that died, a target that does not answer."""


class InputError(GpuplanError):
    """Bad input. `key` is a dotted path such as `traffic[0].arrivals.rate`."""

    exit_code = 2

    def __init__(
        self,
        problem: str,
        *,
        key: str = "",
        value: object = None,
        allowed: str = "",
        file: str = "",
        line: int | None = None,
    ) -> None:
        self.problem, self.key, self.value, self.allowed = problem, key, value, allowed
        self.file, self.line = file, line
        super().__init__(problem)

    def __str__(self) -> str:
        where = self.file + (f":{self.line}" if self.line is not None else "")
        parts = [part for part in (where, self.key) if part]
        text = ": ".join([*parts, self.problem])
        if self.value is not None:
            text += f" (got {_short(self.value)})"
        if self.allowed:
            text += f"; allowed: {self.allowed}"
        # One line, whatever a file or a server put into it.
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def unknown_name(what: str, name: str, known: Iterable[str], *, key: str = "") -> InputError:
    """An InputError for a name that is not in a table, with the nearest known names first."""
    names = sorted(known)
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? known: {', '.join(names)}" if near else ", ".join(names)
    return InputError(f"unknown {what}", key=key, value=name, allowed=hint)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
