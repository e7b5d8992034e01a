"""What `/metrics` says, in Prometheus' text form. Labels come from the deployment, never from a request."""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gpuplan.policy.core import ServingCore
from gpuplan.policy.vocabulary import Action, Arrive, Cancel, Complete, Event, Fail, Reject, RunStep, StepDone
from gpuplan.record.recorder import Sample
from gpuplan.scenario.deployment import Deployment, place_of
from gpuplan.serve.lag import LoopLag
from gpuplan.telemetry.prometheus import OWN

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
STALE_S = 5.0
"""A reading of a card that is older is not shown: the card may be gone."""
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """Counts a core's decisions (give it every one), keeps the last readings of the cards, and reads the core's queues
    when scraped."""

    def __init__(self, deployment: Deployment) -> None:
        self._model_of = {r.id: r.model for r in deployment.replicas}
        self._open: dict[int, tuple[str, float]] = {}  # request: model, arrival
        self._steps: dict[str, tuple[RunStep, float]] = {}
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"gpuplan_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"gpuplan_{name}", text, ("model",), buckets=buckets, registry=self.registry)

        self._requests = counter("requests", "Requests ended, by outcome.", "model", "outcome")
        self._tokens = counter("generation_tokens", "Tokens generated.", "model")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens taken in.", "model")
        self._batch_size = histogram("batch_size", "Sequences in a step.", tuple(map(float, _SIZES)))
        self._step = histogram("step_seconds", "Duration of a step.", _SECONDS)
        self._first_token = histogram("time_to_first_token_seconds", "From arrival to the first token.", _SECONDS)
        self._cards = _Cards()
        self.registry.register(self._cards)
        self._latency = histogram("e2e_request_latency_seconds", "From arrival to the end.", _SECONDS)

    def watch(self, core: ServingCore, deployment: Deployment, lag: LoopLag) -> None:
        """Exposes the core's queues and the event loop's lag as gauges."""
        self.registry.register(_Queues(core, deployment))
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
                self._open[event.request_id] = (event.model, now_s)
                self._prompt_tokens.labels(event.model).inc(event.prompt_tokens)
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
                    self._ended(request_id, reason, now_s)
                case Fail(request_id=request_id):
                    self._ended(request_id, "failed", now_s)

    def _step_done(self, event: StepDone, now_s: float) -> None:
        step, started_s = self._steps.pop(event.replica_id, (None, 0.0))
        if step is None:
            return
        model = self._model_of[place_of(step.replica_id)]
        self._step.labels(model).observe(now_s - started_s)
        self._batch_size.labels(model).observe(len(step.prefills) + len(step.decodes))
        self._tokens.labels(model).inc(step.load.samples)
        for prefill in step.prefills:
            if prefill.last and (known := self._open.get(prefill.request_id)):
                self._first_token.labels(model).observe(now_s - known[1])

    def _ended(self, request_id: int, outcome: str, now_s: float) -> None:
        model, arrived_s = self._open.pop(request_id, (None, 0.0))
        if model is not None:
            self._requests.labels(model, outcome).inc()
            if outcome == "completed":
                self._latency.labels(model).observe(now_s - arrived_s)


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


class _Queues(Collector):
    """Gauges read from the core at the moment of the scrape."""

    def __init__(self, core: ServingCore, deployment: Deployment) -> None:
        self._core = core
        self._models = sorted({r.model for r in deployment.replicas})

    def collect(self) -> Iterable[Metric]:
        waiting = GaugeMetricFamily("gpuplan_requests_waiting", "Requests in a model's queue.", labels=["model"])
        running = GaugeMetricFamily("gpuplan_requests_running", "Requests on a model's replicas.", labels=["model"])
        for model in self._models:
            waiting.add_metric([model], self._core.waiting(model))
            running.add_metric([model], self._core.running(model))
        return (waiting, running)
