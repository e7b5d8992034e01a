"""The display of a bench that is running: one line that moves in a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gpuplan.load.bench import Progress

PLAIN_EVERY_S = 5.0


class LiveDisplay:
    """A context manager; give `update` to the bench as its `on_tick`. `quiet` shows nothing."""

    def __init__(self, name: str, *, quiet: bool = False) -> None:
        self._name, self._quiet = name, quiet
        self._console = Console(file=sys.stderr)
        self._live: Live | None = None
        self._plain_due_s = 0.0

    def __enter__(self) -> LiveDisplay:
        if not self._quiet and self._console.is_terminal:
            self._live = Live(Text(f"{self._name}: starting the target"), console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def update(self, progress: Progress) -> None:
        """Shows where the bench stands."""
        if self._live:
            self._live.update(_moving(self._name, progress), refresh=True)
        elif not self._quiet and time.monotonic() >= self._plain_due_s:
            self._plain_due_s = time.monotonic() + PLAIN_EVERY_S
            self._console.print(Text(_line(self._name, progress)), soft_wrap=True)


def _moving(name: str, p: Progress) -> Group:
    head = Table.grid(padding=(0, 2))
    head.add_row(
        Text(name, style="bold"),
        ProgressBar(total=p.duration_s, completed=min(p.elapsed_s, p.duration_s), width=30),
        f"{min(p.elapsed_s, p.duration_s):.0f} / {p.duration_s:.0f} s",
    )
    figures = Table.grid(padding=(0, 2))
    figures.add_row("sent", "rate", "in flight", "ended", "failed", "E2E p50", "E2E p95")
    figures.add_row(*_cells(p))
    return Group(head, figures)


def _line(name: str, p: Progress) -> str:
    sent, rate, in_flight, ended, failed, p50, p95 = _cells(p)
    return (
        f"{name}: {p.elapsed_s:.0f}/{p.duration_s:.0f} s, sent {sent} ({rate}), in flight {in_flight}, "
        f"ended {ended}, failed {failed}, E2E p50 {p50}, p95 {p95}"
    )


def _cells(p: Progress) -> tuple[str, ...]:
    rate = p.sent / p.elapsed_s if p.elapsed_s > 0 else 0.0
    return (
        f"{p.sent}/{p.requests}",
        f"{rate:.1f}/s",
        str(p.in_flight),
        str(p.ended),
        str(p.failed),
        "-" if p.e2el_ms_p50 is None else f"{p.e2el_ms_p50:.0f} ms",
        "-" if p.e2el_ms_p95 is None else f"{p.e2el_ms_p95:.0f} ms",
    )
