"""The display of a simulation that is running, when it takes long: a bar in a terminal, a line every few seconds
elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gpuplan.policy.vocabulary import Action, Event

EVENTS_EACH = 500
"""The clock is looked at after so many events."""
SHOWN_AFTER_S = 1.0
MOVING_EVERY_S = 0.2
PLAIN_EVERY_S = 5.0


class SimulationDisplay:
    """A context manager and an observer of the simulation. `seeds` are those simulated beside it; `quiet` shows
    nothing."""

    def __init__(self, name: str, *, duration_s: float, seeds: int = 0, quiet: bool = False) -> None:
        self._name, self._duration_s, self._seeds, self._quiet = name, duration_s, seeds, quiet
        self._console = Console(file=sys.stderr)
        self._live: Live | None = None
        self._events = self._seeds_done = 0
        self._at_s = 0.0
        self._due_s = time.monotonic() + SHOWN_AFTER_S

    def __enter__(self) -> SimulationDisplay:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def decided(self, event: Event, actions: list[Action], *, now_s: float) -> None:
        """Virtual time has come so far."""
        self._events += 1
        if self._events % EVENTS_EACH == 0:
            self._at_s = now_s
            self._show()

    def seed_done(self, done: int) -> None:
        """So many of the other seeds are done."""
        self._seeds_done = done
        self._show()

    def _show(self) -> None:
        if self._quiet or time.monotonic() < self._due_s:
            return
        moving = self._console.is_terminal
        self._due_s = time.monotonic() + (MOVING_EVERY_S if moving else PLAIN_EVERY_S)
        if not moving:
            self._console.print(Text(f"{self._name}: {self._words()}"), soft_wrap=True)
            return
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(self._bar(), refresh=True)

    def _words(self) -> str:
        at_s = min(self._at_s, self._duration_s)
        words = f"{at_s:,.0f} of {self._duration_s:,.0f} s simulated"
        return f"{words}, {self._seeds_done} of {self._seeds} other seeds done" if self._seeds else words

    def _bar(self) -> Group:
        row = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=self._duration_s, completed=min(self._at_s, self._duration_s), width=30)
        row.add_row(Text(self._name, style="bold"), bar, Text(self._words()))
        return Group(row)
