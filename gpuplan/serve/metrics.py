"""What `/metrics` says, in Prometheus' text form. Labels come from the deployment, never from a request."""

from __future__ import annotations

import itertools
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from gpuplan.policy.core import ServingCore
from gpuplan.policy.vocabulary import (
    Action,
    Arrive,
    BreakerState,
    Cancel,
    Complete,
    Event,
    Fail,
    Reject,
    RejectReason,
    RunStep,
    Scale,
    StepDone,
)
from gpuplan.record.recorder import Sample
from gpuplan.scenario.deployment import Deployment, place_of
from gpuplan.serve.lag import LoopLag
from gpuplan.telemetry.prometheus import OWN

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
STALE_S = 5.0
"""A reading of a card that is older is not shown: the card may be gone."""
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """Counts a core's decisions (give it every one), keeps the last readings of the cards, and reads what the core
    has in hand when scraped."""

    def __init__(self, deployment: Deployment) -> None:
        self._model_of = {r.id: r.model for r in deployment.every_replica()}
        self._open: dict[int, tuple[_Counts, float]] = {}  # request: its model's counts, arrival
        self._answered: set[int] = set()  # requests that have their first token: who gives way is read again
        self._steps: dict[str, tuple[RunStep, float]] = {}
        models = sorted({r.model for r in deployment.replicas})
        self._counts = {name: _Counts(name) for name in models}
        self._refused: Counter[str] = Counter(dict.fromkeys(get_args(RejectReason), 0))
        self._wanted = Counter(r.model for r in deployment.replicas)
        self._cards = _Cards()
        self.registry = CollectorRegistry()
        self.registry.register(_Counted(self._counts, self._refused))
        self.registry.register(self._cards)

    def watch(self, core: ServingCore, deployment: Deployment, lag: LoopLag) -> None:
        """Exposes the core's queues, replicas and breakers, and the event loop's lag, as gauges."""
        self.registry.register(_Now(core, self._wanted))
        late = Gauge("gpuplan_event_loop_lag_seconds", "How late the event loop last was.", registry=self.registry)
        late.set_function(lambda: lag.last_s)

    def sampled(self, samples: Iterable[Sample]) -> None:
        """Telemetry was read, in whatever thread."""
        self._cards.sampled(samples)

    def text(self) -> bytes:
        """The exposition of everything."""
        return generate_latest(self.registry)

    def decided(self, event: Event, actions: list[Action], *, now_s: float) -> None:
        """An event was handled at `now_s` and these actions came of it."""
        match event:
            case Arrive():
                counts = self._counts[event.model]
                counts.prompt_tokens += event.prompt_tokens
                self._open[event.request_id] = (counts, now_s)
            case StepDone():
                self._step_done(event, now_s)
            case Cancel():
                self._ended(event.request_id, "cancelled", now_s)
        for action in actions:
            match action:
                case RunStep():
                    self._steps[action.replica_id] = (action, now_s)
                case Complete(request_id=request_id):
                    self._ended(request_id, "completed", now_s)
                case Reject(request_id=request_id, reason=reason):
                    self._refused[reason] += 1
                    self._ended(request_id, reason, now_s)
                case Scale(model=model, replicas=replicas):
                    self._wanted[model] = replicas
                case Fail(request_id=request_id):
                    self._ended(request_id, "failed", now_s)

    def _step_done(self, event: StepDone, now_s: float) -> None:
        step, started_s = self._steps.pop(event.replica_id, (None, 0.0))
        if step is None:
            return
        counts = self._counts[self._model_of[place_of(step.replica_id)]]
        counts.step.observe(now_s - started_s)
        counts.batch_size.observe(len(step.prefills) + len(step.decodes))
        counts.tokens += step.load.samples
        for prefill in step.prefills:
            known = self._open.get(prefill.request_id)
            if prefill.last and known and prefill.request_id not in self._answered:
                counts.first_token.observe(now_s - known[1])
                self._answered.add(prefill.request_id)

    def _ended(self, request_id: int, outcome: str, now_s: float) -> None:
        self._answered.discard(request_id)
        known = self._open.pop(request_id, None)
        if known is not None:
            counts, arrived_s = known
            counts.ended[outcome] += 1
            if outcome == "completed":
                counts.latency.observe(now_s - arrived_s)


class _Histogram:
    """Observations by bucket. prometheus_client's own takes a lock for every bucket and look-up: several times the
    cost, on every request, where one event loop counts alone."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def told(self) -> tuple[list[tuple[str, float]], float]:
        """(upper bound, observations up to it) for each bucket, and the sum of all."""
        names = [*(repr(float(bound)) for bound in self._bounds), "+Inf"]
        return [*zip(names, itertools.accumulate(self._counts), strict=True)], self._sum


class _Counts:
    """What is counted for one model."""

    __slots__ = ("batch_size", "ended", "first_token", "latency", "model", "prompt_tokens", "step", "tokens")

    def __init__(self, model: str) -> None:
        self.model = model
        self.ended: Counter[str] = Counter()  # by outcome
        self.prompt_tokens = self.tokens = 0
        self.batch_size = _Histogram(_SIZES)
        self.step, self.first_token, self.latency = _Histogram(_SECONDS), _Histogram(_SECONDS), _Histogram(_SECONDS)


class _Counted(Collector):
    """The counts as Prometheus' families, made when scraped."""

    def __init__(self, counts: Mapping[str, _Counts], refused: Mapping[str, int]) -> None:
        self._counts, self._refused = counts, refused

    def collect(self) -> Iterable[Metric]:
        ended = CounterMetricFamily("gpuplan_requests", "Requests ended, by outcome.", labels=["model", "outcome"])
        refused = CounterMetricFamily(
            "gpuplan_refused", "Requests refused, at the door or when counted, by reason.", labels=["reason"]
        )
        generated = CounterMetricFamily("gpuplan_generation_tokens", "Tokens generated.", labels=["model"])
        taken = CounterMetricFamily("gpuplan_prompt_tokens", "Prompt tokens taken in.", labels=["model"])
        size = _family("batch_size", "Sequences in a step.")
        step = _family("step_seconds", "Duration of a step.")
        first = _family("time_to_first_token_seconds", "From arrival to the first token.")
        latency = _family("e2e_request_latency_seconds", "From arrival to the end.")
        for model, counts in self._counts.items():
            for outcome, number in sorted(counts.ended.items()):
                ended.add_metric([model, outcome], number)
            generated.add_metric([model], counts.tokens)
            taken.add_metric([model], counts.prompt_tokens)
            size.add_metric([model], *counts.batch_size.told())
            step.add_metric([model], *counts.step.told())
            first.add_metric([model], *counts.first_token.told())
            latency.add_metric([model], *counts.latency.told())
        for reason, number in self._refused.items():
            refused.add_metric([reason], number)
        return (ended, refused, generated, taken, size, step, first, latency)


def _family(name: str, text: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(f"gpuplan_{name}", text, labels=["model"])


class _Cards(Collector):
    """The last reading of each kind, of each card and slice, as gauges: what there is none of is left out."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str, str, str], tuple[float, float]] = {}  # metric, gpu, slice, source: time, value

    def sampled(self, samples: Iterable[Sample]) -> None:
        for sample in samples:
            for metric, column in OWN.items():
                value = getattr(sample, column)
                if value is not None:
                    self._last[metric, sample.gpu, sample.slice or "", sample.source] = (sample.time_s, value)

    def collect(self) -> Iterable[Metric]:
        gauges = {metric: GaugeMetricFamily(metric, f"Telemetry: {column}.", labels=["gpu", "slice", "source"])
                  for metric, column in OWN.items()}  # fmt: skip
        since_s = time.monotonic() - STALE_S
        for (metric, *labels), (time_s, value) in list(self._last.items()):
            if time_s >= since_s:
                gauges[metric].add_metric(labels, value)
        return [gauge for gauge in gauges.values() if gauge.samples]


class _Now(Collector):
    """Gauges read from the core at the moment of the scrape."""

    def __init__(self, core: ServingCore, wanted: Mapping[str, int]) -> None:
        self._core = core
        self._wanted = wanted

    def collect(self) -> Iterable[Metric]:
        waiting = _gauge("requests_waiting", "Requests in a model's queue.", "model")
        running = _gauge("requests_running", "Requests on a model's replicas.", "model")
        cache = _gauge("kv_cache_usage_ratio", "Share of the ready replicas' KV cache that is reserved.", "model")
        replicas = _gauge("replicas", "A model's replicas, by what they do.", "model", "state")
        wanted = _gauge("replicas_wanted", "Replicas that the autoscaler last asked for, or the file names.", "model")
        breaker = _gauge(
            "circuit_breaker_state", "Of a model, or a replica's place: 0 closed, 1 half-open, 2 open.", "name"
        )
        for model, number in sorted(self._wanted.items()):
            waiting.add_metric([model], self._core.waiting(model))
            running.add_metric([model], self._core.running(model))
            wanted.add_metric([model], number)
            for state, count in self._core.replicas(model).items():
                replicas.add_metric([model, state], count)
            if (usage := self._core.kv_usage(model)) is not None:
                cache.add_metric([model], usage)
        worst: dict[str, int] = {}  # by place: versions come and go, labels stay
        for name, tripped in self._core.breakers():
            worst[place_of(name)] = max(worst.get(place_of(name), 0), _BREAKER[tripped])
        for name, number in sorted(worst.items()):
            breaker.add_metric([name], number)
        return (waiting, running, cache, replicas, wanted, breaker)


_BREAKER: dict[BreakerState, int] = {"closed": 0, "half_open": 1, "open": 2}


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"gpuplan_{name}", text, labels=labels)
