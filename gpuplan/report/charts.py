"""Charts as inline SVG: a Run's rows, its summary or a plan's evidence in, `Chart`s out; what has no data gives none.

Rules: every number comes from `record.summary` or from rows as they are; text of users stays out of the drawing (the
page writes title and legend as HTML, which wraps and is escaped); ink is `currentColor` and series are CSS variables,
so one drawing serves light, dark and paper; same input, same bytes; no pyplot, and one lock around matplotlib's
global settings, so any thread may draw.
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import escape

from gpuplan.record import summary
from gpuplan.record.run import Run
from gpuplan.record.summary import Summary
from gpuplan.report.words import METRICS
from gpuplan.scenario.demand import quantile_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Series = Mapping[str, tuple[Floats, Floats]]

CLASSES_DRAWN = 12
"""More classes than this stand in the tables only: a page of fifty curves answers nothing."""
SERIES_DRAWN = 6
POINTS = 300
"""Per line: more than a chart has pixels to show."""

_WIDTH_IN = 4.6  # 331 points: text of 10 is 10 CSS pixels on a phone, and grows with the column
_INK = "#010101"  # not black, which matplotlib leaves out of its markup
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#777777", "#a08000")  # Okabe and Ito's, the yellow darkened
_DASHES = ("solid", "dashed", "dotted")  # a second cue beside colour, and CSS border styles for the page's legend
_LOCK = threading.Lock()
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gpuplan",
    "text.parse_math": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _INK,
    "grid.alpha": 0.14,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True, slots=True)
class Mark:
    """How a line is drawn, for the legend: `colour` counts from 1 (`--series-1`), `dash` is a CSS border style."""

    colour: int
    dash: str
    label: str


@dataclass(frozen=True, slots=True)
class Chart:
    """`svg` is safe markup; the rest is plain text, to be escaped where it is written."""

    title: str
    svg: str
    legend: tuple[Mark, ...] = ()
    note: str = ""


# --- what is drawn ------------------------------------------------------------------------------------------------


def over_time(run: Run, figures: Summary) -> list[Chart]:
    """Requests per second asked and completed, requests in flight, and each model's queue."""
    rows, end_s = run.requests, run.meta.measured_s
    if rows.empty:
        return []
    bin_s = _bin_s(end_s)
    edges_s = np.arange(0.0, end_s + bin_s, bin_s)
    completed = rows[rows["status"] == "completed"]
    rates = {
        "scheduled": (edges_s[:-1], summary.rate_per_s(_times(rows, "scheduled_s"), edges_s)),
        "completed": (edges_s[:-1], summary.rate_per_s(_times(completed, "done_s"), edges_s)),
    }
    grid_s = np.linspace(0.0, end_s, POINTS)
    flying = {"in flight": (grid_s, summary.in_flight(rows, grid_s))}
    depths = {m: summary.queue_depth(rows, m, grid_s) for m in figures["models"]}
    queues = {m: (grid_s, depth) for m, depth in depths.items() if depth is not None}
    return [
        _lines(run, "rate", f"Requests per second, in steps of {bin_s:g} s", rates, steps=True),
        _lines(run, "flight", "Requests sent and not yet answered", flying),
        *([_lines(run, "queue", "Requests waiting in the model's queue", queues)] if queues else []),
    ]


def of_telemetry(run: Run) -> list[Chart]:
    """Utilisation, memory, power and clock of each card over time; nothing where nothing was read."""
    wanted: tuple[tuple[str, str, float, Callable[[float], str] | None], ...] = (
        ("gpu_utilization", "GPU utilisation", 1.0, _percent),
        ("memory_utilization", "GPU memory utilisation", 1.0, _percent),
        ("memory_used_bytes", "GPU memory used, GiB", 1 / 2**30, None),
        ("power_w", "GPU power, W", 1.0, None),
        ("sm_clock_mhz", "SM clock, MHz", 1.0, None),
    )
    charts = []
    for column, title, factor, label in wanted:
        series = {
            name: (_thin(times), _thin(values) * factor)
            for name, (times, values) in summary.telemetry_series(run, column).items()
        }
        if series:
            charts.append(_lines(run, column, f"{title} ({run.meta.telemetry_source})", series, label=label))
    return charts


def of_latency(run: Run, figures: Summary) -> list[tuple[str, Chart]]:
    """For each of the busiest classes, the share of its requests answered within a time, and the limits asked."""
    counted = summary.counted(run)
    names = sorted(figures["classes"], key=lambda n: -figures["classes"][n]["requests"])[:CLASSES_DRAWN]
    charts = []
    for i, name in enumerate(n for n in figures["classes"] if n in names):
        mine = counted[counted["traffic_class"] == name]
        chart = _distribution(f"ecdf-{i}", name, mine, figures["classes"][name])
        if chart is not None:
            charts.append((name, chart))
    return charts


def of_scaling(model: str, scaling: Mapping[str, Any], index: int) -> Chart | None:
    """Behind a threshold: what waits, and how many SLOs are met, at multiples of the scenario's rate."""
    rows = [r for r in scaling.get("evidence") or [] if r.get("queue_depth_per_replica") is not None]
    if not rows:
        return None
    factors = np.array([r["rate_factor"] for r in rows], dtype=np.float64)
    waiting = np.array([r["queue_depth_per_replica"] for r in rows], dtype=np.float64)
    met = np.array([bool(r["meets_slos"]) for r in rows])
    shares = np.array([np.nan if r["slo_attainment"] is None else r["slo_attainment"] for r in rows])
    up = scaling.get("scale_up_at")

    def paint(figure: Figure) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True)
        for axes, values, colour in ((top, waiting, _COLOURS[0]), (bottom, shares, _COLOURS[2])):
            axes.plot(factors, values, color=colour)
            axes.plot(factors[met], values[met], "o", color=colour, markersize=5)
            axes.plot(factors[~met], values[~met], "X", color=_COLOURS[1], markersize=7)
        if up is not None:
            top.axhline(up, color=_INK, linestyle="dashed", linewidth=1)
        top.set_ylim(bottom=0)
        top.set_ylabel("waiting")
        bottom.set_ylabel("within SLOs")
        bottom.set_ylim(min(0.9, float(np.nanmin(shares, initial=1.0)) - 0.05), 1.03)
        _format(bottom.yaxis, _percent)
        _log_ticks(bottom, float(factors.min()), float(factors.max()), lambda v: f"{v:g} ×")

    held = [f"{f:g}" for f, ok in zip(factors, met, strict=True) if ok]
    alt = f"Simulated loads for {model}: SLOs hold at {', '.join(held) or 'none'} times the rate."
    note = "Dashed: scale up at. A cross: at this load an SLO was missed."
    return _chart(f"scale-{index}", f"{model}: waiting per replica, and requests within their SLOs", alt, paint,
                  height_in=2.9, note=note)  # fmt: skip


# --- kinds of chart -----------------------------------------------------------------------------------------------


def _lines(
    run: Run,
    key: str,
    title: str,
    series: Series,
    *,
    label: Callable[[float], str] | None = None,
    steps: bool = False,
) -> Chart:
    """Lines over the run's time, those that peak highest; the warm-up is shaded and the schedule's end marked."""
    highest = sorted(series, key=lambda n: -float(np.max(series[n][1], initial=0.0)))[:SERIES_DRAWN]
    drawn = {name: series[name] for name in series if name in highest}
    marks = _marks(drawn)
    end_s, warmup_s = run.meta.measured_s, float(run.meta.scenario.get("warmup", 0.0))

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for mark, (times, values) in zip(marks, drawn.values(), strict=True):
            axes.plot(
                times,
                values,
                color=_COLOURS[mark.colour - 1],
                linestyle=mark.dash,
                drawstyle="steps-post" if steps else "default",
            )
        if warmup_s:
            axes.axvspan(0, min(warmup_s, end_s), color=_INK, alpha=0.07, linewidth=0)
        if run.meta.duration_s < end_s * 0.995:
            axes.axvline(run.meta.duration_s, color=_INK, linestyle="dotted", linewidth=1)
        top = max(float(np.max(v, initial=0.0)) for _, v in drawn.values())
        axes.set_ylim(0, 1.02 if label is _percent else top * 1.08 or 1)
        axes.set_xlim(0, max(end_s, 1e-3))
        axes.set_xlabel("seconds since the start")
        _format(axes.yaxis, label or (lambda v: f"{v:,.6g}"))

    peaks = "; ".join(f"{name}: at most {np.max(v, initial=0.0):.3g}" for name, (_, v) in drawn.items())
    note = f"{len(drawn)} of {len(series)} shown: those that peak highest." if len(drawn) < len(series) else ""
    return _chart(key, title, f"{title} over time. {peaks}.", paint, marks=marks, note=note)


def _distribution(key: str, name: str, requests: pd.DataFrame, figures: Mapping[str, Any]) -> Chart | None:
    """Cumulative shares on a logarithmic axis. Failed requests never arrive, so their curve ends below 100 %: then a
    limit's marker lies under the curve exactly where the SLO is met."""
    asked = {v["metric"] for v in figures["slos"]}
    lost = len(requests) - figures["completed"]
    latencies = summary.latencies_ms(requests)
    values = {
        m: np.sort(latencies[m]) for m in summary.LATENCIES if len(latencies[m]) and (m != "itl_ms" or m in asked)
    }
    if not values:
        return None
    marks = _marks({METRICS[m]: m for m in values})
    limits = [v for v in figures["slos"] if v["metric"] in values]
    edges = [*(v["limit_ms"] for v in limits), *(float(x) for v in values.values() for x in (v[0], v[-1]))]
    low, high = max(min(edges) * 0.8, 0.01), max(max(edges) * 1.25, 0.02)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        _log_ticks(axes, low, high, _milliseconds)
        for mark, (metric, ordered) in zip(marks, values.items(), strict=True):
            colour = _COLOURS[mark.colour - 1]
            answered = figures["completed"] if metric == "itl_ms" else len(ordered)
            shares = np.arange(1, len(ordered) + 1) / len(ordered) * answered / (answered + lost)
            x = np.concatenate([ordered[:1], _thin(ordered), [high]]).clip(min=0.01)
            y = np.concatenate([[0.0], _thin(shares), shares[-1:]])
            axes.plot(x, y, color=colour, linestyle=mark.dash, drawstyle="steps-post")
            for verdict in (v for v in limits if v["metric"] == metric):
                axes.axvline(verdict["limit_ms"], color=colour, linewidth=0.9, alpha=0.75)
                if verdict["statistic"] != "mean":
                    axes.plot([verdict["limit_ms"]], [quantile_of(verdict["statistic"])], "D", color=colour, ms=5.5)
        axes.set_ylim(0, 1.03)
        axes.set_xlim(low, high)
        _format(axes.yaxis, _percent)

    facts = "; ".join(f"{METRICS[m]} p50 {_milliseconds(figures[m]['p50'])}, p95 {_milliseconds(figures[m]['p95'])}"
                      for m in values)  # fmt: skip
    bounds = "; ".join(f"{METRICS[v['metric']]} {v['statistic']} limit {_milliseconds(v['limit_ms'])}" for v in limits)
    note = "Vertical line: the SLO's limit; met where the curve passes above its diamond." if limits else ""
    if lost:
        note = f"{note} {lost} requests failed or were rejected: their share is missing at the top.".strip()
    alt = f"Share of {name} requests answered within a time. {facts}. {bounds}"
    return _chart(key, name, alt, paint, marks=marks, note=note, height_in=2.3)


def _marks(names: Mapping[str, Any]) -> tuple[Mark, ...]:
    return tuple(Mark(i % len(_COLOURS) + 1, _DASHES[i % len(_DASHES)], name) for i, name in enumerate(names))


# --- drawing ------------------------------------------------------------------------------------------------------


def _chart(
    key: str,
    title: str,
    alt: str,
    paint: Callable[[Figure], None],
    *,
    marks: Sequence[Mark] = (),
    note: str = "",
    height_in: float = 2.0,
) -> Chart:
    import matplotlib
    from matplotlib.figure import Figure

    out = io.StringIO()
    with _LOCK, matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own matplotlibrc says
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(_WIDTH_IN, height_in))
        paint(figure)
        # Fixed margins, wide enough for "within SLOs" and "100%": axes line up from chart to chart.
        below_in = 0.44 if any(axes.get_xlabel() for axes in figure.axes) else 0.28
        figure.subplots_adjust(0.155, below_in / height_in, 0.965, 1 - 0.1 / height_in, hspace=0.16)
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return Chart(title, _inline(out.getvalue(), key, alt), tuple(marks), note)


def _inline(svg: str, key: str, alt: str) -> str:
    """matplotlib's SVG file as an element of a page: ids of its own, the page's ink and font, no more digits than
    are seen. Changes tags only: in text, `<` and `>` are escaped."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<[^>]+>", lambda tag: _retouched(tag[0], key), svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', lambda m: _svg_tag(m[1], alt), svg, count=1)


def _svg_tag(view_box: str, alt: str) -> str:
    link = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {link} viewBox="{view_box}" role="img" aria-label="{escape(alt)}">'


def _retouched(tag: str, key: str) -> str:
    tag = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{key}-", tag)
    tag = re.sub(r"font: (\d+)px [^;\"]*", r"font-size: \1px", tag)  # one property or two: versions differ
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag)
    tag = re.sub(r"(\.\d\d)\d+", r"\1", tag)
    tag = tag.replace(_INK, "currentColor")
    for i, colour in enumerate(_COLOURS, start=1):
        tag = tag.replace(colour, f"var(--series-{i}, {colour})")
    return tag


def _format(axis: Any, label: Callable[[float], str]) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))


def _log_ticks(axes: Axes, low: float, high: float, label: Callable[[float], str]) -> None:
    """A logarithmic x axis with plain numbers, as many as fit."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_xscale("log")
    few = high / low > 90
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if few else (1, 2, 5), numticks=30))
    axes.xaxis.set_minor_locator(NullLocator())
    _format(axes.xaxis, label)


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _milliseconds(value: float) -> str:
    return f"{value / 1e3:.3g} s" if value >= 1e3 else f"{value:.3g} ms"


def _thin(values: Floats) -> Floats:
    """At most `POINTS` of the values, evenly spaced in rank, the first and last among them."""
    if len(values) <= POINTS:
        return values
    kept: Floats = values[np.linspace(0, len(values) - 1, POINTS).astype(np.int64)]
    return kept


def _bin_s(end_s: float) -> float:
    """A round width that gives some fifty bins."""
    widths = [0.1, 0.2, 0.5, *(float(w) for d in (1, 10, 100, 1000) for w in (d, 2 * d, 5 * d))]
    return next((w for w in widths if w >= end_s / 50), end_s / 50)


def _times(rows: pd.DataFrame, column: str) -> Floats:
    return rows[column].dropna().to_numpy(dtype=np.float64)
