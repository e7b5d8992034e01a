"""Packing held against published plans, and how its time grows.

Four workloads and the plans published for them (ParvaGPU, SC'24: 2, 3, 5 and 7 GPUs) on an A100-80GB, from measured
profiles of 11 networks. Their rule: a measurement is usable when its latency is under 0.9 x SLO / 2, with up to 5
processes on a slice. Prints the GPUs published and needed, the bound of fractions (LP), the bound, whether that proves
the plan optimal, the seconds to that proof and to the plan with most headroom, and the factor by which all demands
could grow on it; then the same for harder workloads. Exits 1 when a published plan is better than one found, or a
published workload is not proven in a second.

    python benchmarks/mig_packing.py --data ../shared/data/mig-profiles [--published-only]

The table has traps. Throughput is per process. Zeros mean out of memory. Latencies are rounded to milliseconds, and the
rule is applied to them as they are printed. A row that is too fast is left out as an outlier: one with more than
FASTER_THAN_LARGER times the throughput of the same batch and processes on the next larger slice (more of a card is not
slower), or with more than FASTER_THAN_BATCHES times the geometric mean of its neighbours in batch size. A row that is
too slow does no harm: an option with less capacity is never chosen over a better one.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gpuplan.hardware.catalog import gpu
from gpuplan.plan.packing import pack
from gpuplan.plan.packing_terms import CardKind, Option, Packing, Question
from gpuplan.plan.programme import Limits

LATENCY_SHARE = 0.9 / 2
PROCESSES_MAX = 5
FASTER_THAN_LARGER = 1.15
FASTER_THAN_BATCHES = 1.4
SECONDS_MAX = 1.0
A100 = gpu("a100-80gb")
PROFILES = {1: "1g.10gb", 2: "2g.20gb", 3: "3g.40gb", 4: "4g.40gb", 7: "7g.80gb"}
SCALES = (1, 1.5, 2, 5, 10, 20, 50)


@dataclass(frozen=True, slots=True)
class Measured:
    """A row of the table. `capacity_per_s` is of all processes on the slice together."""

    model: str
    slices: int
    batch_size: int
    processes: int
    capacity_per_s: float
    latency_s: float


@dataclass(frozen=True, slots=True)
class Asked:
    """What a workload asks of a model."""

    model: str
    slo_s: float
    rate_per_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data" / "mig-profiles")
    parser.add_argument("--published-only", action="store_true", help="leave out the harder workloads")
    options = parser.parse_args()
    rows, dropped = measured(options.data)
    print(f"{len(rows)} measurements, {len(dropped)} more left out as outliers")
    for row, ratio in dropped:
        where = f"{row.model}, {row.slices}g, batch {row.batch_size}, {row.processes} processes"
        print(f"  {where}: {ratio}")
    pack(question(rows, [Asked("resnet50", 0.2, 1.0)]))  # what is imported on first use is no part of a solution's time
    failed = False
    counted = f"{'published':>9} {'GPUs':>5} {'LP':>7} {'bound':>6} {'proven':>7}"
    print(f"\n{'workload':34} {counted} {'proof s':>8} {'all s':>6} growth")
    gpus = published(options.data)
    asked = workloads(options.data)
    for name, workload in asked.items():
        plan = pack(question(rows, workload))
        worse = len(plan.cards) > gpus[name] or not plan.proven_optimal or plan.elapsed_s > SECONDS_MAX
        failed = failed or worse
        show(name, gpus[name], plan, "  <-- worse than published, unproven or slow" if worse else "")
    if not options.published_only:
        for name, harder in more(rows, asked):
            show(name, None, pack(harder, Limits(seconds=10.0)))
    sys.exit(failed)


def show(name: str, gpus: int | None, plan: Packing, note: str = "") -> None:
    """A line of the table; bounds are in GPUs where all cards are of one price."""
    price = max((card.kind.price_per_hour for card in plan.cards), default=1.0)
    found = f"{len(plan.cards):5} {plan.lp_bound_per_hour / price:7.2f} {plan.bound_per_hour / price:6.1f}"
    proven = "yes" if plan.proven_optimal else "no"
    times = f"{plan.proof_s:8.2f} {plan.elapsed_s:6.2f}"
    print(f"{name:34} {gpus or '-':>9} {found} {proven:>7} {times} {plan.growth:6.2f}{note}", flush=True)


def measured(folder: Path) -> tuple[list[Measured], list[tuple[Measured, str]]]:
    """Usable rows, and outliers with how they are too fast."""
    with (folder / "a100-80gb-models.csv").open(newline="") as file:
        rows = [
            Measured(
                row["model"],
                int(row["gpu_instance_slices"]),
                int(row["batch_size"]),
                int(row["processes"]),
                float(row["throughput_per_process_per_s"]) * int(row["processes"]),
                float(row["latency_s"]),
            )
            for row in csv.DictReader(file)
        ]
    rows = [row for row in rows if row.capacity_per_s > 0 and row.latency_s > 0 and row.processes <= PROCESSES_MAX]
    by_place = {(row.model, row.slices, row.batch_size, row.processes): row for row in rows}
    judged = [(row, _too_fast(row, by_place)) for row in rows]
    return [row for row, why in judged if not why], [(row, why) for row, why in judged if why]


def _too_fast(row: Measured, by_place: Mapping[tuple[str, int, int, int], Measured]) -> str:
    """Why a row is an outlier, empty for one that is not."""
    here = (row.model, row.slices, row.batch_size, row.processes)
    sizes = list(PROFILES)
    for slices in sizes[sizes.index(row.slices) + 1 :]:
        larger = by_place.get((row.model, slices, *here[2:]))
        if larger is not None:
            if row.capacity_per_s > FASTER_THAN_LARGER * larger.capacity_per_s:
                return f"{row.capacity_per_s / larger.capacity_per_s:.2f} x the next larger slice"
            break
    smaller, greater = (
        by_place.get((*here[:2], batch, row.processes)) for batch in (row.batch_size // 2, row.batch_size * 2)
    )
    if smaller is not None and greater is not None:
        between = math.sqrt(smaller.capacity_per_s * greater.capacity_per_s)
        if row.capacity_per_s > FASTER_THAN_BATCHES * between:
            return f"{row.capacity_per_s / between:.2f} x its neighbours in batch size"
    return ""


def workloads(folder: Path) -> dict[str, list[Asked]]:
    """By name, what each of the published workloads asks."""
    found: dict[str, list[Asked]] = defaultdict(list)
    with (folder / "scenarios.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            found[row["scenario"]].append(
                Asked(row["model"], float(row["latency_slo_ms"]) / 1e3, float(row["rate_per_s"]))
            )
    return dict(found)


def published(folder: Path) -> dict[str, int]:
    """GPUs in the plan published for each workload."""
    with (folder / "published-plans.csv").open(newline="") as file:
        cards = {(row["scenario"], row["node"], row["gpu"]) for row in csv.DictReader(file)}
    names = [name for name, _, _ in cards]
    return {name: names.count(name) for name in sorted(set(names))}


def question(rows: list[Measured], workload: list[Asked], scale: float = 1.0) -> Question:
    """The cheapest A100s for a workload under the published rule. A network may be asked for by several services with
    an SLO each, which share no slice: `resnet50/2` is the second."""
    options = [
        Option(asked.model, A100.name, PROFILES[row.slices], row.capacity_per_s, row.processes, row.batch_size)
        for asked in workload
        for row in rows
        if row.model == asked.model.partition("/")[0] and row.latency_s < LATENCY_SHARE * asked.slo_s
    ]
    return Question({a.model: a.rate_per_s * scale for a in workload}, [CardKind(A100, 1.0)], options)


def more(rows: list[Measured], asked: dict[str, list[Asked]]) -> Iterator[tuple[str, Question]]:
    """Harder workloads: more demand, more services with SLOs of their own, two kinds of cards, losses to survive."""
    for name, workload in asked.items():
        for scale in SCALES[1:]:
            yield f"{name}, {len(workload)} services, x {scale:g}", question(rows, workload, scale)
    mixed = random.Random(1)
    for services in (22, 44, 88):
        hard = list(mixed_services(asked["S4"], services, mixed))
        for scale in (0.2, 1, 5):
            yield f"mixed SLOs, {services} services, x {scale:g}", question(rows, hard, scale)
    half = gpu("a100-40gb")
    for name in asked:
        one = question(rows, asked[name])
        names = dict(zip(PROFILES.values(), ("1g.5gb", "2g.10gb", "3g.20gb", "4g.20gb", "7g.40gb"), strict=True))
        others = [replace(o, gpu=half.name, profile=names[o.profile], capacity_per_s=0.9 * o.capacity_per_s) for o in
                  one.options if (o.batch_size or 0) <= 32]  # fmt: skip
        kinds = [CardKind(A100, 1.0), CardKind(half, 0.83)]
        yield f"{name}, and a card of 0.9 for 0.83", replace(one, kinds=kinds, options=[*one.options, *others])
    for name in asked:
        yield f"{name}, a lost replica survived", replace(question(rows, asked[name]), survive="replica")
    for name in asked:
        yield f"{name}, a lost card survived", replace(question(rows, asked[name]), survive="card")


def mixed_services(workload: list[Asked], count: int, dice: random.Random) -> Iterator[Asked]:
    """So many services, each of one of the networks, with 0.8 to 4 times its SLO and 2 to 150 % of its rate."""
    for i in range(count):
        one = workload[i % len(workload)]
        factor, share = dice.uniform(0.8, 4), dice.uniform(0.02, 1.5)
        yield Asked(f"{one.model}/{i // len(workload) + 1}", one.slo_s * factor, one.rate_per_s * share)


if __name__ == "__main__":
    main()
