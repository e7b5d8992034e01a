"""YAML with the comments that say which numbers are the plan's and which are the reader's to fill in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gpuplan.export.names import shown
from gpuplan.export.reading import Plan


def head(plan: Plan, what: str, *, from_plan: Iterable[str], fill_in: Iterable[str]) -> list[str]:
    """The comment lines that open a file, for any format whose comments begin with `#`."""
    return [
        f"# {what} Made by gpuplan from the plan of {shown(plan['scenario'], 80)}; nothing was applied.",
        *(f"# From the plan: {shown(line, 400)}" for line in from_plan),
        *(f"# Fill in: {shown(line, 400)}" for line in fill_in),
    ]


def written(comments: Sequence[str], *documents: tuple[Sequence[str], Any]) -> str:
    """The comments, then each document after its own, apart by `---`."""
    import yaml

    lines = list(comments)
    for i, (own, document) in enumerate(documents):
        if i:
            lines.append("---")
        lines += own
        lines += yaml.dump(document, Dumper=_blocks(), sort_keys=False, width=10**6, allow_unicode=True).splitlines()
    return "\n".join(lines) + "\n"


def _blocks() -> Any:
    """A safe dumper that writes text of several lines as a block, line by line."""
    import yaml

    class Blocks(yaml.SafeDumper):
        pass

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Blocks.add_representer(str, text)
    return Blocks
