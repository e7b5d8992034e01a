"""A scenario's arrivals as a sketch in the terminal: requests per second over time, a row for each class."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.schedule import Schedule, ScheduledRequest

_BARS = " ▁▂▃▄▅▆▇█"


def print_preview(scenario: Scenario, schedule: Schedule, console: Console, width: int) -> None:
    """Draws `width` bins over the duration; every row is scaled to its own peak, which stands beside it."""
    table = Table("class", "requests", "mean / s", "peak / s", "prompt p50", "output p50", box=None, padding=(0, 2))
    sketches = []
    bin_s = schedule.duration_s / width
    for traffic in scenario.traffic:
        mine = [r for r in schedule.requests if r.traffic_class == traffic.name]
        counts = [0] * width
        for request in mine:
            counts[min(int(request.scheduled_s / bin_s), width - 1)] += 1
        peak = max(counts)
        table.add_row(
            Text(traffic.name),
            str(len(mine)),
            f"{len(mine) / schedule.duration_s:.2f}",
            f"{peak / bin_s:.2f}",
            _median(mine, "prompt_tokens"),
            _median(mine, "output_tokens"),
        )
        bars = "".join(_BARS[-(-count * (len(_BARS) - 1) // peak)] if peak else " " for count in counts)
        sketches.append(Text.assemble("|", bars, "| ", traffic.name))
    console.print(table)
    console.print()
    for sketch in sketches:
        console.print(sketch, soft_wrap=True)
    console.print(Text(f" 0 s{schedule.duration_s:>{max(width - 5, 1)}.0f} s"), soft_wrap=True)
    if schedule.clipped:
        console.print(f"{schedule.clipped} drawn lengths were cut to the model's context window")


def _median(requests: list[ScheduledRequest], field: str) -> str:
    values = sorted(getattr(r, field) for r in requests)
    return str(values[len(values) // 2]) if values else "-"
