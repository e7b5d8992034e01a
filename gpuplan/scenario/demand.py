"""What is asked: the traffic classes of a scenario, their arrivals, lengths and SLOs.

These structs are the scenario file's shape, key by key: `build.build` reads them by their types, so a new key is a
new field here and nothing else. Durations are seconds, lengths tokens, rates requests per second.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from gpuplan.hardware.engines import EngineName

Duration = Annotated[float, Meta(ge=0.0, extra={"duration": True})]
"""Seconds; in a file also `250ms`, `60s`, `5m`, `1h`."""
QueueDelay = Annotated[float, Meta(ge=0.0, le=60.0, extra={"duration": True})]
"""A duration that somebody waits: a minute is beyond every client's patience."""
Rate = Annotated[float, Meta(gt=0.0, le=1e6)]
Count = Annotated[int, Meta(ge=1, le=10_000_000)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]

Role = Literal["decoder", "classifier", "embedder"]
"""What a request gets back: a stream of tokens, a label, or a vector."""
Task = Literal["classify", "embed", "generate"]


class Section(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A mapping in the file whose unknown keys are errors."""


# --- arrivals -----------------------------------------------------------------------------------------------------


class Constant(Section, frozen=True, tag_field="process", tag="constant"):
    """Equal gaps of 1 / rate."""

    rate: Rate


class Poisson(Section, frozen=True, tag_field="process", tag="poisson"):
    """Independent arrivals: exponential gaps."""

    rate: Rate


class Gamma(Section, frozen=True, tag_field="process", tag="gamma"):
    """Gamma gaps with shape = burstiness, as vLLM's and AIPerf's load generators mean it: 1 is Poisson, less is
    burstier, more is steadier."""

    rate: Rate
    burstiness: Annotated[float, Meta(ge=0.01, le=1e6)] = 1.0


class Trace(Section, frozen=True, tag_field="process", tag="trace"):
    """Recorded arrivals and lengths, from a CSV that `gpuplan scenario import` wrote."""

    file: str


Arrivals = Constant | Poisson | Gamma | Trace


# --- lengths ------------------------------------------------------------------------------------------------------


class Uniform(Section, frozen=True):
    """Whole numbers from `min` to `max`, both included."""

    min: Count
    max: Count


class Lognormal(Section, frozen=True):
    """A lognormal through its median and 95th percentile."""

    p50: Annotated[float, Meta(gt=0.0)]
    p95: Annotated[float, Meta(gt=0.0)]
    max: Count | None = None


class Lengths(Section, frozen=True):
    """Exactly one of its keys. `quantiles` maps min, pNN and max to values, joined by straight lines."""

    uniform: Uniform | None = None
    lognormal: Lognormal | None = None
    quantiles: dict[str, Annotated[float, Meta(ge=1.0)]] | None = None


# --- the classes --------------------------------------------------------------------------------------------------

SLO_METRICS = ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms")
SLO_STATISTICS = ("mean", "p50", "p90", "p95", "p99", "p999", "max")


class AbandonSpec(Section, frozen=True):
    """Clients that hang up `after` so long if their answer is not complete, and which share of all they are."""

    share: Annotated[float, Meta(gt=0.0, le=1.0)]
    after: Annotated[float, Meta(gt=0.0, le=3600.0, extra={"duration": True})]


class SharedPrefix(Section, frozen=True):
    """The first `tokens` of the class's prompts, which requests of one of `groups` have in common (a system prompt).
    With `prompts_per_group` the rest repeats too: there are so many prompts in each group and no others, as
    inference-perf's `shared_prefix` sends them. `share` of the class's requests have a prefix, the others none."""

    tokens: Count
    groups: Count = 1
    prompts_per_group: Count | None = None
    share: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0


class TrafficClass(Section, frozen=True):
    """One kind of request: where it goes, when, how long, and how fast it must be answered."""

    name: Name
    model: Name
    arrivals: Arrivals
    prompt_tokens: Count | Lengths | None = None
    output_tokens: Count | Lengths | None = None
    shared_prefix: SharedPrefix | None = None
    slo: dict[str, dict[str, Annotated[float, Meta(gt=0.0)]]] = {}
    abandon: AbandonSpec | None = None

    def limits_ms(self) -> dict[str, float]:
        """Per metric, the limit that one request must keep to count as good: the loosest of its percentiles."""
        return {metric: max(limits.values()) for metric, limits in self.slo.items()}


class ShapeSpec(Section, frozen=True):
    """A transformer by its numbers: the fields of `hardware.shapes.ModelShape`. `kv_heads` left out: as `heads`."""

    layers: Count
    hidden: Count
    heads: Count
    ffn: Count
    vocabulary: Count
    context_tokens_max: Count
    role: Role = "decoder"
    kv_heads: Count | None = None
    gated_ffn: bool = True
    head_size: Count | None = None
    tied_embeddings: bool = False
    bytes_per_element: Annotated[float, Meta(ge=0.5, le=4.0)] = 2
    kv_bytes_per_element: Annotated[float, Meta(ge=0.5, le=4.0)] = 2
    experts: Annotated[int, Meta(ge=0)] = 0
    experts_per_token: Annotated[int, Meta(ge=0)] = 0
    shared_ffn: Annotated[int, Meta(ge=0)] = 0
    name: Annotated[str, Meta(min_length=1, max_length=128)] = "own"


BuiltinName = Literal["sentiment", "embed", "tiny-chat"]


class ModelSource(Section, frozen=True):
    """Exactly one of: `builtin` (a model the package makes itself), `onnx` (a file), `emulate` (a known shape's name),
    `shape` (one's own, or the path of a Hugging Face `config.json`, which `files.load` replaces by what it says),
    `profiled` (a model of the scenario's table of measurements, of which nothing else is known).

    The other keys belong to `onnx`. `files.load` fills those left out from what stands beside the file: what a request
    gets back, the window in tokens (prompt and output together), and the transformer by its numbers.
    """

    builtin: BuiltinName | None = None
    onnx: str | None = None
    emulate: str | None = None
    shape: ShapeSpec | str | None = None
    profiled: str | None = None
    task: Task | None = None
    context_tokens_max: Count | None = None
    onnx_shape: ShapeSpec | None = None

    @property
    def emulated(self) -> bool:
        """Whether nothing but a shape is known of the model."""
        return self.emulate is not None or self.shape is not None


class BatchingSpec(Section, frozen=True):
    """How large a batch may grow and how long it may wait for company.

    `max_batch_tokens` bounds the prompt tokens of one decoder step, so that a long prompt is prefilled in chunks
    and does not stall the tokens of others (vLLM's default with chunked prefill is 2048). A step that takes longer than
    `step_timeout` is taken for hung, and its worker process is killed. With `step_time_target` fewer run at once than
    `max_batch_size` where steps (the gaps between a decoder's tokens) would take longer than that.
    """

    max_batch_size: Annotated[int, Meta(ge=1, le=4096)] = 32
    max_queue_delay: QueueDelay = 0.0
    max_queue_size: Annotated[int, Meta(ge=1, le=1_000_000)] = 256
    max_batch_tokens: Annotated[int, Meta(ge=16, le=1_000_000)] = 2048
    step_timeout: Annotated[float, Meta(ge=0.1, le=3600.0, extra={"duration": True})] = 60.0
    step_time_target: Annotated[float, Meta(gt=0.0, le=3600.0, extra={"duration": True})] | None = None


class ReplicaSpec(Section, frozen=True):
    """A model on `count` slices of that profile, in each of them `processes` copies that share it (MPS).

    `worker` is where ONNX Runtime runs, a process for each replica or a thread of the server; `threads` how many of the
    CPU's cores each replica computes with, left out: an equal share of them.

    `kv_cache_tokens` is a decoder's KV cache, of each copy; left out: what the slice's memory leaves beside the weights
    where they are known, otherwise (and on the CPU) `max_batch_size` times the context window.
    """

    model: Name
    slice: str = "whole"
    count: Annotated[int, Meta(ge=1, le=1024)] = 1
    processes: Annotated[int, Meta(ge=1, le=48)] = 1
    worker: Literal["process", "thread"] = "process"
    threads: Annotated[int, Meta(ge=1, le=1024)] | None = None
    kv_cache_tokens: Annotated[int, Meta(ge=1, le=1_000_000_000)] | None = None


class EngineSpec(Section, frozen=True):
    """How decoders are served, with the names of vLLM's arguments. What is left out is as vLLM has it where it serves
    an API on that card. `max_num_batched_tokens` bounds all tokens of a step, prompts' and decodes'.
    `num_gpu_blocks_override` is the KV cache in blocks of `block_size` tokens; left out: what `gpu_memory_utilization`
    of the cards' memory leaves beside the weights. A replica has `tensor_parallel_size` whole cards."""

    kind: EngineName
    max_num_seqs: Annotated[int, Meta(ge=1, le=4096)] | None = None
    max_num_batched_tokens: Annotated[int, Meta(ge=16, le=1_000_000)] | None = None
    gpu_memory_utilization: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.9
    block_size: Annotated[int, Meta(ge=1, le=256)] = 16
    num_gpu_blocks_override: Count | None = None
    enable_prefix_caching: bool = True
    async_scheduling: bool = True
    tensor_parallel_size: Annotated[int, Meta(ge=1, le=64)] = 1


# --- who is let in ------------------------------------------------------------------------------------------------


class RateLimit(Section, frozen=True):
    """A token bucket: so many requests and tokens (prompt and output together) a second, and at once as many as come
    in `burst`."""

    requests_per_s: Rate | None = None
    tokens_per_s: Annotated[float, Meta(gt=0.0, le=1e9)] | None = None
    burst: Annotated[float, Meta(gt=0.0, le=3600.0, extra={"duration": True})] = 1.0


class ClassSpec(Section, frozen=True):
    """How requests of one traffic class are treated. Priority 0 goes first (a lower number is served earlier, as in
    vLLM); `max_queue_size` bounds those that wait; `deadline` runs from a request's arrival to the end of its answer.
    """

    priority: Annotated[int, Meta(ge=0, le=9)] = 0
    max_queue_size: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    deadline: Annotated[float, Meta(gt=0.0, le=86_400.0, extra={"duration": True})] | None = None
    rate_limit: RateLimit | None = None


class AdmissionSpec(Section, frozen=True):
    """Who is let in, and in which order the waiting go. `classes` are named as the scenario's traffic classes; a live
    request names its own in the header `X-Traffic-Class`. `per_key` limits each API key. Whoever has waited for
    `ageing` counts as one priority higher, and so on until it is at the front."""

    classes: dict[Name, ClassSpec] = {}
    per_key: RateLimit | None = None
    ageing: Annotated[float, Meta(gt=0.0, le=3600.0, extra={"duration": True})] = 10.0


class BreakerSpec(Section, frozen=True):
    """When a replica, or a model as a whole, is taken for broken: after so many failures in a row, or when of the last
    `window` outcomes this share has failed, or (a replica that has a sound neighbour) when its steps take `slow_factor`
    times as long as they should. It is tried again, with one request, after `open`, and twice as long after each
    failure of that (Nygard, Release It!, 2007)."""

    consecutive_failures: Annotated[int, Meta(ge=1, le=1000)] = 5
    failure_rate: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.5
    window: Annotated[int, Meta(ge=1, le=10_000)] = 50
    slow_factor: Annotated[float, Meta(gt=1.0, le=1000.0)] = 4.0
    open: Annotated[float, Meta(gt=0.0, le=3600.0, extra={"duration": True})] = 5.0
    open_max: Annotated[float, Meta(gt=0.0, le=86_400.0, extra={"duration": True})] = 60.0


# --- what answers -------------------------------------------------------------------------------------------------


class AutoscaleRule(Section, frozen=True):
    """How many replicas of one model there are, and when that changes. New ones stand on free slices like the model's
    first (or on those named by `slice`).

    Thresholds: requests waiting per replica (`scale_up_at`, `scale_down_at`), the share of the KV cache in use, and the
    share of the replicas' time that what arrives asks for. Any of them scales up; down it goes only below all. A change
    within `tolerance` of what is there is none. Up goes what the whole of `scale_up_window` asked for (left out: a
    fifth of the cold start, at least 3 s), down what none of `stabilization_window` needed (the windows of Kubernetes'
    Horizontal Pod Autoscaler); `cooldown` passes before each step down and before a step up that follows one. With
    `min_replicas` 0, the last one goes after `scale_to_zero_after` without a request.
    """

    max_replicas: Annotated[int, Meta(ge=1, le=1024)]
    min_replicas: Annotated[int, Meta(ge=0, le=1024)] = 1
    slice: str | None = None
    metric: Literal["queue_depth_per_replica"] = "queue_depth_per_replica"
    scale_up_at: Annotated[float, Meta(gt=0.0, le=1e6)] = 4.0
    scale_down_at: Annotated[float, Meta(ge=0.0, le=1e6)] = 0.5
    kv_scale_up_at: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.9
    kv_scale_down_at: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.6
    load_scale_up_at: Annotated[float, Meta(gt=0.0, le=10.0)] = 0.9
    load_scale_down_at: Annotated[float, Meta(ge=0.0, le=10.0)] = 0.6
    tolerance: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.1
    scale_up_window: Annotated[float, Meta(ge=0.0, le=3600.0, extra={"duration": True})] | None = None
    stabilization_window: Annotated[float, Meta(ge=0.0, le=86_400.0, extra={"duration": True})] = 300.0
    cooldown: Annotated[float, Meta(ge=0.0, le=86_400.0, extra={"duration": True})] = 15.0
    step_up_max: Annotated[int, Meta(ge=1, le=1024)] = 4
    step_down_max: Annotated[int, Meta(ge=1, le=1024)] = 1
    scale_to_zero_after: Annotated[float, Meta(ge=0.0, le=86_400.0, extra={"duration": True})] = 300.0


class AutoscaleSpec(Section, frozen=True):
    """`cold_start` is the time from asking for a replica until it serves; it is looked every `interval` whether
    replicas are to come or go. Models not named in `models` keep the replicas that they have."""

    cold_start: Duration = 45.0
    max_gpus: Annotated[int, Meta(ge=1, le=1024)] = 8
    interval: Annotated[float, Meta(ge=0.1, le=600.0, extra={"duration": True})] = 1.0
    models: dict[Name, AutoscaleRule] = {}


Cells = Annotated[int, Meta(ge=1, le=64)]


class MigProfileSpec(Section, frozen=True):
    """A MIG profile as a real card reports it. `cells` are the whole card's; left out: as the catalogue has them."""

    name: str
    slices: Cells
    width: Cells
    starts: list[Annotated[int, Meta(ge=0, lt=64)]]
    count_max: Cells
    memory_gib: Annotated[float, Meta(gt=0.0, le=1_000_000.0)]
    sm_count: Count
    cells: Cells | None = None
    profile_id: Annotated[int, Meta(ge=0)] | None = None


class DeploymentSpec(Section, frozen=True):
    """The file's `deployment`: `count` cards of one kind, each cut by `mig` (left out: not cut).

    `mig_profiles` win over the catalogue's: what NVML said of the card that a run was measured on.
    """

    gpu: str
    count: Annotated[int, Meta(ge=1, le=1024)] = 1
    mig: list[str] = []
    mig_profiles: list[MigProfileSpec] = []
    replicas: list[ReplicaSpec] = []
    batching: dict[str, BatchingSpec] = {}
    autoscale: AutoscaleSpec = AutoscaleSpec()
    admission: AdmissionSpec = AdmissionSpec()
    breakers: BreakerSpec = BreakerSpec()
    engine: EngineName | EngineSpec = "gpuplan"
    price_per_hour: Annotated[float, Meta(ge=0.0)] | None = None


# --- what goes wrong ----------------------------------------------------------------------------------------------


class CrashFault(Section, frozen=True):
    """The replica dies with all that it runs. It is loaded again after `back_after`; left out: never."""

    back_after: Duration | None = None


class HangFault(Section, frozen=True):
    """The replica's next step never ends. After its model's `step_timeout` it is lost with all that it runs, and loaded
    again after `back_after`."""

    back_after: Duration = 0.0


class SlowFault(Section, frozen=True):
    """Its steps take so many times as long."""

    factor: Annotated[float, Meta(gt=1.0, le=1000.0)]


class NanFault(Section, frozen=True):
    """For this share of the requests that it gives a first token, or their one answer, the model gives no numbers."""

    share: Annotated[float, Meta(gt=0.0, le=1.0)]


class OutOfMemoryFault(Section, frozen=True):
    """It has no memory for a step of more than so many requests."""

    above_batch: Annotated[int, Meta(ge=1, le=4096)]


FaultKind = CrashFault | HangFault | SlowFault | NanFault | OutOfMemoryFault


class FaultSpec(Section, frozen=True):
    """One thing that goes wrong, on one replica or (`model`) on all of a model's. `at` counts from the first request;
    `for`, how long it lasts, is not for a crash or a hang; left out: to the end."""

    at: Duration
    lasting: Annotated[float, Meta(gt=0.0, extra={"duration": True})] | None = field(default=None, name="for")
    replica: str | None = None
    model: str | None = None
    crash: CrashFault | None = None
    hang: HangFault | None = None
    slow: SlowFault | None = None
    nan: NanFault | None = None
    out_of_memory: OutOfMemoryFault | None = None


class Scenario(Section, frozen=True):
    """A scenario file. `duration` is how long requests are sent; those sent in `warmup` are left out of summaries.
    `profiles` is a table of step times that were measured elsewhere (`sim.profiles` reads it)."""

    name: Name
    models: dict[Name, ModelSource]
    deployment: DeploymentSpec
    traffic: list[TrafficClass] = []
    seed: Annotated[int, Meta(ge=0)] = 0
    duration: Duration = 60.0
    warmup: Duration = 0.0
    faults: list[FaultSpec] = []
    profiles: str | None = None

    def traffic_of(self, model: str) -> list[TrafficClass]:
        """The classes that ask for `model`, in file order."""
        return [c for c in self.traffic if c.model == model]


def mean_tokens(lengths: int | Lengths | None) -> float:
    """The mean of a length distribution (for estimates; schedules draw from the distribution itself)."""
    import math

    match lengths:
        case None:
            return 0.0
        case int():
            return float(lengths)
        case Lengths(uniform=Uniform(min=low, max=high)):
            return (low + high) / 2
        case Lengths(lognormal=Lognormal(p50=p50, p95=p95)):
            return p50 * math.exp(lognormal_sigma(p50, p95) ** 2 / 2)
        case Lengths(quantiles=dict() as quantiles):
            points = quantile_points(quantiles)
            return sum((q1 - q0) * (v0 + v1) / 2 for (q0, v0), (q1, v1) in itertools.pairwise(points))
    raise AssertionError("a Lengths has exactly one kind: files.check sees to it")


def lognormal_sigma(p50: float, p95: float) -> float:
    """The sigma of the lognormal with that median and 95th percentile (1.6449 is the normal's 95 % point)."""
    import math

    return math.log(p95 / p50) / 1.6448536269514722


def quantile_points(quantiles: dict[str, Any]) -> list[tuple[float, float]]:
    """`{min: 3, p50: 100, max: 9000}` as sorted (probability, value) points.

    Raises ValueError for a key that is not min, max or pNN (p999 is 0.999).
    """
    points = sorted((quantile_of(key), float(value)) for key, value in quantiles.items())
    if not {"min", "max"} <= set(quantiles):
        raise ValueError("needs min and max")
    if any(v0 > v1 for (_, v0), (_, v1) in itertools.pairwise(points)):
        raise ValueError("values must not fall as the percentile rises")
    return points


def quantile_of(key: str) -> float:
    """The probability that `min`, `pNN` or `max` names. Raises ValueError for other words."""
    if key in ("min", "max"):
        return float(key == "max")
    if not key.startswith("p") or not key[1:].replace(".", "", 1).isdigit():
        raise ValueError(f"{key!r} is not min, max or pNN")
    digits = key[1:]
    if digits == "100":
        raise ValueError("p100 is the maximum: write max")
    return float(digits) / 100 if "." in digits or len(digits) <= 2 else float(f"0.{digits}")
