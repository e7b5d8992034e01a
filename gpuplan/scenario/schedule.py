"""When each request is due and how long it is: the whole list, before the first one is sent.

Takes a Scenario, gives a Schedule. Deterministic by seed: every class has one generator for arrivals and one for
lengths, so adding a class, or changing one's lengths, leaves the others' arrivals as they were. Ties in time go by
class order in the file.
"""

from __future__ import annotations

import bisect
import math
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from gpuplan.errors import InputError
from gpuplan.scenario import demand, traces
from gpuplan.scenario.demand import Lengths, Scenario, TrafficClass
from gpuplan.scenario.deployment import role, window_of

Spans = tuple[tuple[str, int], ...]
"""The parts that a prompt begins with as others do: a name and its tokens each."""


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """A request due at `scheduled_s` after the start. `output_tokens` is 0 for a model that streams none. Its client
    hangs up `abandon_s` after it was sent; None for one that waits. `spans` are the parts that its prompt begins with
    as others of the class do: a name and its tokens each."""

    index: int
    scheduled_s: float
    traffic_class: str
    model: str
    prompt_tokens: int
    output_tokens: int
    abandon_s: float | None = None
    spans: Spans = ()


REQUESTS_MAX = 5_000_000
"""Of one run: some gigabytes of rows, and hours of a load generator."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """All requests in order of time. `clipped` counts drawn lengths that were cut to the model's context window."""

    requests: Sequence[ScheduledRequest]
    duration_s: float
    clipped: int = 0


class Columns(Sequence[ScheduledRequest]):
    """Requests as columns, 18 bytes each: made when they are looked at. Numbered from 0 in their order.

    `kinds` are the (traffic class, model) that `kind` counts from 0; `abandon_s` has those alone who hang up, `spans`
    those whose prompts begin as others do.
    """

    def __init__(self, kinds: Sequence[tuple[str, str]]) -> None:
        self.kinds = tuple(kinds)
        self.scheduled_s = array("d")
        self.kind = array("H")
        self.prompt_tokens = array("i")
        self.output_tokens = array("i")
        self.abandon_s: dict[int, float] = {}
        self.spans: dict[int, Spans] = {}

    @classmethod
    def of(cls, requests: Iterable[ScheduledRequest]) -> Columns:
        """These requests, which have to be numbered from 0 in their order."""
        if isinstance(requests, Columns):
            return requests
        kinds: dict[tuple[str, str], int] = {}
        columns = cls(())
        for r in requests:
            kind = kinds.setdefault((r.traffic_class, r.model), len(kinds))
            if r.abandon_s is not None:
                columns.abandon_s[len(columns)] = r.abandon_s
            if r.spans:
                columns.spans[len(columns)] = r.spans
            columns.append(r.scheduled_s, kind, r.prompt_tokens, r.output_tokens)
        columns.kinds = tuple(kinds)
        return columns

    def append(self, scheduled_s: float, kind: int, prompt_tokens: int, output_tokens: int) -> None:
        self.scheduled_s.append(scheduled_s)
        self.kind.append(kind)
        self.prompt_tokens.append(prompt_tokens)
        self.output_tokens.append(output_tokens)

    def __len__(self) -> int:
        return len(self.scheduled_s)

    @overload
    def __getitem__(self, at: int) -> ScheduledRequest: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[ScheduledRequest]: ...

    def __getitem__(self, at: int | slice) -> ScheduledRequest | Sequence[ScheduledRequest]:
        if isinstance(at, slice):
            return tuple(self[i] for i in range(*at.indices(len(self))))
        i = range(len(self))[at]
        traffic_class, model = self.kinds[self.kind[i]]
        tokens = (self.prompt_tokens[i], self.output_tokens[i])
        rest = (self.abandon_s.get(i), self.spans.get(i, ()))
        return ScheduledRequest(i, self.scheduled_s[i], traffic_class, model, *tokens, *rest)


def build_schedule(scenario: Scenario, *, rate_scale: float = 1.0, speed: float = 1.0) -> Schedule:
    """The scenario's requests. `rate_scale` multiplies every rate; a trace has no rate, so it multiplies its speed.

    `speed` replays traces faster without touching the other processes.
    """
    rows: list[tuple[float, int, int, int, float | None, Spans]] = []
    clipped = 0
    for order, traffic in enumerate(scenario.traffic):
        source = scenario.models[traffic.model]
        window = window_of(source)
        decoder = role(source) == "decoder"
        leavers = random.Random(f"{scenario.seed}/{traffic.name}/abandon")  # noqa: S311 - not for secrets
        groups = random.Random(f"{scenario.seed}/{traffic.name}/prefix")  # noqa: S311 - not for secrets
        for time_s, prompt, output in _requests(scenario, traffic, rate_scale, speed):
            output = output if decoder else 0
            if prompt + output > window:
                clipped += 1
                prompt = min(prompt, window - 1 if decoder else window)
                output = min(output, window - prompt)
            leaves = traffic.abandon is not None and leavers.random() < traffic.abandon.share
            abandon_s = traffic.abandon.after if leaves and traffic.abandon else None
            rows.append((time_s, order, prompt, output, abandon_s, _spans(traffic, prompt, groups)))
            if len(rows) > REQUESTS_MAX:
                raise InputError(
                    "too many requests for one run",
                    key=f"traffic[{order}].arrivals",
                    allowed=f"up to {REQUESTS_MAX:,} in the duration",
                )
    rows.sort(key=lambda row: (row[0], row[1]))
    classes = scenario.traffic
    requests = tuple(
        ScheduledRequest(i, time_s, classes[order].name, classes[order].model, prompt, output, abandon_s, spans)
        for i, (time_s, order, prompt, output, abandon_s, spans) in enumerate(rows)
    )
    return Schedule(requests, scenario.duration, clipped)


def _requests(
    scenario: Scenario, traffic: TrafficClass, rate_scale: float, speed: float
) -> Iterator[tuple[float, int, int]]:
    lengths = random.Random(f"{scenario.seed}/{traffic.name}/lengths")  # noqa: S311 - not for secrets
    if isinstance(traffic.arrivals, demand.Trace):
        hurry = speed * rate_scale
        for row in traces.read(Path(traffic.arrivals.file)):
            if row.arrived_at_s / hurry >= scenario.duration:
                return
            prompt = draw(traffic.prompt_tokens, lengths) if traffic.prompt_tokens else row.prompt_tokens
            output = draw(traffic.output_tokens, lengths) if traffic.output_tokens else row.output_tokens
            yield row.arrived_at_s / hurry, prompt, output
        return
    for time_s in _arrivals(traffic.arrivals, scenario, traffic.name, rate_scale):
        yield time_s, draw(traffic.prompt_tokens, lengths), draw(traffic.output_tokens, lengths)


def _spans(traffic: TrafficClass, prompt_tokens: int, rng: random.Random) -> Spans:
    """What the prompt has in common with others of its class."""
    prefix = traffic.shared_prefix
    if prefix is None or (prefix.share < 1 and rng.random() >= prefix.share):
        return ()
    group = f"{traffic.name}/{rng.randrange(prefix.groups)}"
    shared = min(prefix.tokens, prompt_tokens)
    if prefix.prompts_per_group is None or shared == prompt_tokens:
        return ((group, shared),)
    return ((group, shared), (f"{group}/{rng.randrange(prefix.prompts_per_group)}", prompt_tokens - shared))


def _arrivals(
    process: demand.Constant | demand.Poisson | demand.Gamma, scenario: Scenario, name: str, rate_scale: float
) -> Iterator[float]:
    rng = random.Random(f"{scenario.seed}/{name}/arrivals")  # noqa: S311 - not for secrets
    rate = process.rate * rate_scale
    if isinstance(process, demand.Constant):
        yield from (i / rate for i in range(math.ceil(scenario.duration * rate)))
        return
    shape = process.burstiness if isinstance(process, demand.Gamma) else 1.0
    time_s = rng.gammavariate(shape, 1.0 / (rate * shape))
    while time_s < scenario.duration:
        yield time_s
        time_s += rng.gammavariate(shape, 1.0 / (rate * shape))


def draw(lengths: int | Lengths | None, rng: random.Random) -> int:
    """One length in tokens, at least 1; None (a model that streams nothing) is 0."""
    match lengths:
        case None:
            return 0
        case int():
            return lengths
        case Lengths(uniform=demand.Uniform(min=low, max=high)):
            return rng.randint(low, high)
        case Lengths(lognormal=demand.Lognormal(p50=p50, p95=p95, max=high_or_none)):
            value = rng.lognormvariate(math.log(p50), demand.lognormal_sigma(p50, p95))
            return max(1, round(min(value, high_or_none) if high_or_none else value))
        case Lengths(quantiles=dict() as quantiles):
            return max(1, round(_at(demand.quantile_points(quantiles), rng.random())))
    raise AssertionError("a Lengths has exactly one kind: files.check sees to it")


def _at(points: list[tuple[float, float]], q: float) -> float:
    """The value at probability `q` on the line through `points`."""
    i = max(1, min(bisect.bisect_left(points, (q, -math.inf)), len(points) - 1))
    (q0, v0), (q1, v1) = points[i - 1], points[i]
    return v0 + (v1 - v0) * (q - q0) / (q1 - q0)
