"""The answer in the terminal: what `report.html` says first, in about thirty lines.

Takes a Run, its summary and its plan, and prints; computes nothing. Texts of users are `Text`, never rich's markup.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpuplan.record.run import Run
from gpuplan.record.summary import Summary
from gpuplan.report import words

CLASSES_SHOWN = 20
SEED_ROWS_SHOWN = 24
LINES_SHOWN = 6
"""Of each part of the plan: a hundred models would push the answer off the screen."""


def print_summary(run: Run, summary: Summary, plan: dict[str, Any] | None, console: Console) -> None:
    """Prints classes, origin, and the plan with its cost and its error."""
    for line in _alarms(run, summary):
        console.print(_text(line, "bold red"))
    console.print(_classes(summary))
    hidden = len(summary["classes"]) - CLASSES_SHOWN
    if hidden > 0:
        console.print(Text(f"and {hidden} more classes: see the report", style="dim"))
    console.print(_origin(run))
    console.print()
    if summary.get("seeds"):
        _print_seeds(run, summary, console)
    if not plan:
        console.print(Text("no plan was made"))
        return
    console.print(_text(plan["verdict"], "bold" if plan["meets_slos"] else "bold red"))
    facts = Table.grid(padding=(0, 2))
    for label, fact in _facts(plan):
        facts.add_row(Text(label, style="dim"), _text(fact))
    console.print(facts)


def _print_seeds(run: Run, summary: Summary, console: Console) -> None:
    told, rows = summary["seeds"], words.seed_rows(summary)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(f"over {told['count']} seeds", overflow="fold")
    table.add_column("mean", justify="right")
    table.add_column(f"{words.share(told['confidence'])} confidence interval", justify="right")
    for row in rows[:SEED_ROWS_SHOWN]:
        table.add_row(_text(row.figure), row.mean, row.interval)
    console.print(table)
    hidden = len(rows) - SEED_ROWS_SHOWN
    more = f"; {hidden} more figures in the report" if hidden > 0 else ""
    met = f"all SLOs met on {told['met_slos']} of {told['count']} seeds"
    console.print(Text(f"{met}; the table above them is of seed {run.meta.seed}{more}", style="dim"))
    console.print()


def _alarms(run: Run, summary: Summary) -> Iterator[str]:
    if run.meta.failure:
        yield f"the run failed: {run.meta.failure}"
    if run.meta.interrupted:
        yield f"interrupted after {words.number(run.meta.measured_s)} s: figures are of what was answered by then"
    if not summary["overall"]["requests"]:
        yield "no request was counted"


def _classes(summary: Summary) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    streams = any(figures["ttft_ms"]["p50"] is not None for figures in summary["classes"].values())
    latencies: list[tuple[str, str, tuple[str, ...]]] = [("E2E ms", "e2el_ms", ("p50", "p95"))]
    if streams:
        latencies = [("TTFT ms", "ttft_ms", ("p50", "p95")), ("TPOT ms", "tpot_ms", ("p95",)), *latencies]
    table.add_column("class", overflow="fold")
    for heading in ("asked", "ok", "errors"):
        table.add_column(heading, justify="right")
    for heading, _, statistics in latencies:
        table.add_column(f"{heading}\n{'/'.join(statistics)}", justify="right")
    for heading in ("goodput\n/s", "within\nSLOs"):
        table.add_column(heading, justify="right")
    table.add_column("SLO")
    for name, figures in list(summary["classes"].items())[:CLASSES_SHOWN]:
        table.add_row(
            _text(name),
            words.count(figures["requests"]),
            words.count(figures["completed"]),
            words.count(figures["rejected"] + sum(figures["errors"].values())),
            *("/".join(words.ms(figures[metric][s]) for s in statistics) for _, metric, statistics in latencies),
            words.number(figures["goodput"]),
            words.share(figures["slo_attainment"]),
            _verdict(figures["slos"]),
        )
    return table


def _verdict(slos: list[dict[str, Any]]) -> Text:
    missed = [v for v in slos if v["met"] is False]
    if missed:
        what = ", ".join(f"{words.METRICS[v['metric']]} {v['statistic']} > {words.general(v['limit_ms'])}"
                         if v["value_ms"] is not None and v["value_ms"] > v["limit_ms"]
                         else f"{words.METRICS[v['metric']]} {v['statistic']}" for v in missed)  # fmt: skip
        return _text(f"missed: {what}", "red")
    if not slos:
        return Text("none asked", style="dim")
    return Text("met", style="green") if any(v["met"] for v in slos) else Text(words.DASH)


def _origin(run: Run) -> Text:
    parts = [f"{source['badge']}: {', '.join(source['models'])}" for source in words.sources(run.meta)]
    line = f"{'; '.join(parts)}; telemetry: {run.meta.telemetry_source}"
    return _text(f"{line}. No figure here was measured on a GPU." if words.no_gpu(run.meta) else line, "yellow")


def _facts(plan: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    proven = (
        "proven least" if plan["proven_optimal"] else f"gap {words.share(plan['optimality_gap'])}, not proven least"
    )
    cost, least = words.money(plan["cost_per_hour"]), words.money(plan["lower_bound_cost_per_hour"])
    yield "cost", f"{cost}/h, at least {least}/h ({proven})" if plan["gpus_needed"] else "the host itself"
    for layout in plan["mig"]["layouts"]:
        yield "layout", f"{layout['count']} x {layout['gpu']}: {' + '.join(layout['profiles'])}"
    if not plan["mig"]["layouts"]:
        yield "layout", "none: the plan is for the host's CPU"
    for row in plan["replicas"][:LINES_SHOWN]:
        yield "replicas", f"{row['count']} x {row['model']} on {row['slice']}"
    for name, rule in list(plan["batching"].items())[:LINES_SHOWN]:
        delay = words.general(rule["max_queue_delay_ms"])
        yield "batching", f"{name}: up to {rule['max_batch_size']}, wait {delay} ms, queue {rule['max_queue_size']}"
    for name, rule in list(plan["autoscale"].items())[:LINES_SHOWN]:
        up, down = words.general(rule["scale_up_at"]), words.general(rule["scale_down_at"])
        metric = rule["metric"].replace("_", " ")
        yield "autoscale", f"{name}: up at {up}, down at {down} {metric}, {rule['min_replicas']}-{rule['max_replicas']}"
    tested = plan.get("backtest")
    if tested:
        median, worst = words.number(tested["median_percent"]), words.number(tested["worst_percent"])
        yield "backtest", f"predictions of this very run off by {median} % (median), {worst} % at worst"
    else:
        yield "backtest", "none: nothing was measured that a prediction could be held against"


def _text(line: str, style: str = "") -> Text:
    """Text of users and servers: no markup, and no control characters, which a terminal would obey."""
    return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line), style=style)
