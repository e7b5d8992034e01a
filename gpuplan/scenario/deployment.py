"""What answers: cards, the slices they are cut into, and the replicas that run on them.

`resolve` turns the file's `deployment` into a `Deployment` whose every replica has a slice of its own. It raises
InputError for what cannot be: a layout the card does not allow, a slice that is not there, a model that does not fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import msgspec

from gpuplan.errors import InputError
from gpuplan.hardware import catalog, mig, profiles, roofline, shapes
from gpuplan.scenario import engine as engines
from gpuplan.scenario import faults, onnx_files
from gpuplan.scenario.demand import (
    AdmissionSpec,
    AutoscaleSpec,
    BatchingSpec,
    BreakerSpec,
    DeploymentSpec,
    MigProfileSpec,
    ModelSource,
    ReplicaSpec,
    Scenario,
)
from gpuplan.scenario.demand import Role as Role
from gpuplan.scenario.engine import BUILT_IN, Engine
from gpuplan.scenario.faults import Fault

CPU = "cpu"
VERSION_MARK = "#"
PROFILED_TOKENS_MAX = 1 << 20
"""A model that is known by its measurements alone has no window: this bounds what a request may say."""

SAID_ELSEWHERE = frozenset({"price_per_hour", "idle_power_w"})
"""What stands as assumed where it is used: beside the price, and with emulated power."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A GPU instance, a whole card, or (with `profile` None) the host's CPU."""

    gpu_index: int
    profile: mig.Profile | None
    start: int

    @property
    def name(self) -> str:
        return self.profile.name if self.profile else CPU

    @property
    def id(self) -> str:
        if self.profile is None:
            return CPU
        return f"gpu{self.gpu_index}/{self.name}@{self.start}"


@dataclass(frozen=True, slots=True)
class Replica:
    """One copy of a model on one slice, which `processes` copies share. `kv_tokens_max` is None for a model without a
    KV cache; `weights_kv_tokens` is how many tokens of KV cache a second version of the model would displace. With
    `tensor_parallel` it has as many whole cards, of which `slice` is the first."""

    id: str
    model: str
    role: Role
    slice: Slice
    kv_tokens_max: int | None
    processes: int = 1
    weights_kv_tokens: int = 0
    worker: Literal["process", "thread"] = "process"
    threads: int | None = None
    tensor_parallel: int = 1


@dataclass(frozen=True, slots=True)
class Deployment:
    """The supply side: `gpu` is None for the host's CPU. `layouts` holds each card's profile names. `traffic_classes`
    are those told apart: the scenario's and those with rules of their own. Replicas in `standby` are started when the
    autoscaler asks for them and nobody else is on their slice. `faults` are those to be injected."""

    gpu: catalog.Gpu | None
    price_per_hour: float
    layouts: tuple[tuple[str, ...], ...]
    slices: tuple[Slice, ...]
    replicas: tuple[Replica, ...]
    batching: Mapping[str, BatchingSpec]
    autoscale: AutoscaleSpec
    models: Mapping[str, ModelSource]
    admission: AdmissionSpec = field(default_factory=AdmissionSpec)
    breakers: BreakerSpec = field(default_factory=BreakerSpec)
    traffic_classes: tuple[str, ...] = ()
    standby: tuple[Replica, ...] = ()
    faults: tuple[Fault, ...] = ()
    engine: Engine = BUILT_IN

    @property
    def gpu_name(self) -> str:
        return self.gpu.name if self.gpu else CPU

    def every_replica(self) -> tuple[Replica, ...]:
        """Those that serve from the start, and those that stand by."""
        return (*self.replicas, *self.standby)

    def replicas_of(self, model: str) -> list[Replica]:
        return [replica for replica in self.replicas if replica.model == model]

    def with_batching(self, model: str, batching: BatchingSpec) -> Deployment:
        """The same deployment with another batching rule for one model."""
        return replace(self, batching={**self.batching, model: batching})


def place_of(replica_id: str) -> str:
    """The deployment's replica in whose place a version of it runs: `chat-0#2` is the second of `chat-0`."""
    return replica_id.partition(VERSION_MARK)[0]


def role(source: ModelSource) -> Role:
    """What a request to this model gets back: a stream of tokens or one answer. Of an ONNX file its task decides, of
    every other model its shape."""
    if source.onnx is not None:
        return onnx_files.ROLES[source.task or "classify"]
    shape = shape_of(source)
    return shape.role if shape else "classifier"


def window_of(source: ModelSource) -> int:
    """The most tokens a sequence may have, prompt and output together."""
    if source.onnx is not None:
        return source.context_tokens_max or onnx_files.default_window(source.task or "classify")
    if source.profiled is not None:
        return PROFILED_TOKENS_MAX
    shape = shape_of(source)
    assert shape is not None, "whatever is no ONNX file has a shape"
    return shape.context_tokens_max


def shape_of(source: ModelSource) -> shapes.ModelShape | None:
    """The shape by which a model is emulated and planned. Of an ONNX file it is what its `config.json` says (for its
    memory; its speed has to be measured all the same), and None where there is none."""
    if isinstance(source.shape, str):
        raise InputError("a path is read where the scenario file is", key="models", value=source.shape)
    spec = source.onnx_shape if source.onnx is not None else source.shape
    if spec is not None:
        sizes = {**msgspec.structs.asdict(spec), "kv_heads": spec.kv_heads or spec.heads}
        return shapes.ModelShape(**{**sizes, "role": role(source)} if source.onnx is not None else sizes)
    name = source.emulate or source.builtin
    return shapes.shape(name) if name else None


def card_of(spec: DeploymentSpec) -> catalog.Gpu | None:
    """The deployment's card, with the MIG profiles that the file gives for it; None for the host's CPU."""
    if spec.gpu.lower() == CPU:
        return None
    card = catalog.gpu(spec.gpu)
    rows = spec.mig_profiles
    if not rows:
        return card
    reach = max(max(row.starts, default=0) + row.width for row in rows)
    cells = card.profiles[0].cells if card.profiles else reach
    return replace(card, profiles=tuple(_profile(row, cells, i) for i, row in enumerate(rows)))


def differences(spec: DeploymentSpec) -> list[str]:
    """What the deployment's card is taken to be otherwise than the catalogue has it, in a sentence each."""
    card = card_of(spec)
    if card is None or not spec.mig_profiles:
        return []
    told = mig.differences(catalog.gpu(spec.gpu).profiles, card.profiles)
    return [f"{card.name} as it reports itself: {sentence}" for sentence in told]


def assumptions(deployment: Deployment) -> list[str]:
    """What nobody has confirmed of the card and the slices in use, a sentence each."""
    card = deployment.gpu
    if card is None:
        return []
    owners: dict[str, frozenset[str]] = {card.name: card.assumed - SAID_ELSEWHERE}
    for part in deployment.slices:
        if part.profile is not None and part.profile.assumed:
            owners[f"{card.name} {part.name}"] = part.profile.assumed
    return [
        f"{owner}: {', '.join(sorted(catalog.WORDS.get(field, field) for field in fields))} assumed, not confirmed"
        for owner, fields in owners.items()
        if fields
    ]


def profile_rows(seen: Iterable[mig.Profile]) -> list[MigProfileSpec]:
    """Profiles as the rows of `deployment.mig_profiles`, so that a run keeps what its card reported."""
    return [
        MigProfileSpec(
            name=p.name,
            slices=p.slices,
            width=p.width,
            starts=list(p.starts),
            count_max=p.count_max,
            memory_gib=p.memory_bytes / catalog.GIB,
            sm_count=p.sm_count,
            cells=p.cells,
            profile_id=p.profile_id,
        )
        for p in seen
    ]


def resolve(scenario: Scenario) -> Deployment:
    """The scenario's own deployment, with the faults that it is to suffer."""
    own = build(scenario.deployment, scenario.models)
    ids = {model: [r.id for r in own.replicas_of(model)] for model in own.models}
    names = dict.fromkeys([*(c.name for c in scenario.traffic), *own.admission.classes])
    injected = faults.resolve(scenario.faults, ids, seed=scenario.seed)
    return replace(own, traffic_classes=tuple(names), faults=injected)


def build(spec: DeploymentSpec, models: Mapping[str, ModelSource]) -> Deployment:
    """Places every slice and gives each replica one. Raises InputError naming the key that cannot be met."""
    layout: tuple[str, ...]
    gpu = card_of(spec)
    if gpu is None:
        if spec.mig:
            raise InputError("a CPU has no MIG slices", key="deployment.mig", value=spec.mig, allowed="leave it out")
        layout = (CPU,)
        slices = tuple(Slice(0, None, 0) for replica in _replica_specs(spec, gpu, models) for _ in range(replica.count))
    else:
        slices = tuple(part for i in range(spec.count) for part in _cut(gpu, i, spec.mig))
        layout = tuple(part.name for part in slices if part.gpu_index == 0)
    price = spec.price_per_hour if spec.price_per_hour is not None else gpu.price_per_hour if gpu else 0.0
    engine = engines.engine_of(spec.engine)
    _check_engine(engine, gpu, models)
    decoders = {name: role(source) == "decoder" for name, source in models.items()}
    batching = engines.batching_of(spec.engine, gpu, decoders, spec.batching)
    free = list(slices)
    replicas = _assign(_replica_specs(spec, gpu, models), gpu, models, batching, free, engine)
    return Deployment(
        gpu=gpu,
        price_per_hour=price,
        layouts=(layout,) * spec.count,
        slices=slices,
        replicas=replicas,
        batching=batching,
        autoscale=spec.autoscale,
        models=dict(models),
        admission=spec.admission,
        breakers=spec.breakers,
        standby=_standby(spec.autoscale, gpu, models, batching, replicas, free, engine),
        engine=engine,
    )


def describe(deployment: Deployment) -> dict[str, object]:
    """The deployment as `run.json` keeps it."""
    return {
        "gpu": deployment.gpu_name,
        "layouts": [list(layout) for layout in deployment.layouts],
        "slices": [{"id": s.id, "profile": s.name, "gpu": s.gpu_index, "start": s.start} for s in deployment.slices],
        "replicas": [
            {"id": r.id, "model": r.model, "slice": r.slice.id, "kv_tokens_max": r.kv_tokens_max}
            for r in deployment.replicas
        ],
        "batching": {name: msgspec.structs.asdict(rule) for name, rule in deployment.batching.items()},
        "engine": asdict(deployment.engine),
        "price_per_hour": deployment.price_per_hour,
    }


def _cut(gpu: catalog.Gpu, index: int, names: list[str]) -> list[Slice]:
    if not names:
        return [Slice(index, mig.whole(gpu), 0)]
    return [Slice(index, placed.profile, placed.start) for placed in mig.place(gpu, names)]


def _replica_specs(
    spec: DeploymentSpec, gpu: catalog.Gpu | None, models: Mapping[str, ModelSource]
) -> list[ReplicaSpec]:
    """The replicas asked for; with none named, one of every model, the largest model on the largest slice."""
    if spec.replicas:
        return spec.replicas
    if gpu is None:
        return [ReplicaSpec(model=name, slice=CPU) for name in models]
    free = sorted(
        (part.profile for part in _cut(gpu, 0, spec.mig) if part.profile),
        key=lambda p: (p.memory_bytes, p.sm_count),
        reverse=True,
    )
    by_size = sorted(models, key=lambda name: -(s.weights_bytes if (s := shape_of(models[name])) else 0))
    if len(by_size) > len(free):
        raise InputError(
            f"{len(by_size)} models and {len(free)} slice(s): cut the card or name the replicas",
            key="deployment.replicas",
            allowed="a mig layout with a slice for every model",
        )
    return [ReplicaSpec(model=name, slice=part.name) for name, part in zip(by_size, free, strict=False)]


def _assign(
    specs: list[ReplicaSpec],
    gpu: catalog.Gpu | None,
    models: Mapping[str, ModelSource],
    batching: Mapping[str, BatchingSpec],
    free: list[Slice],
    engine: Engine,
) -> tuple[Replica, ...]:
    replicas: list[Replica] = []
    for i, spec in enumerate(specs):
        key = f"deployment.replicas[{i}]"
        if spec.model not in models:
            raise InputError("no such model", key=f"{key}.model", value=spec.model, allowed=", ".join(models))
        source = models[spec.model]
        on_cpu = all(part.profile is None for part in free) and bool(free)
        wanted = CPU if on_cpu and spec.slice == mig.WHOLE else _slice_name(gpu, spec.slice)
        for _ in range(spec.count):
            part = next((part for part in free if part.name == wanted), None)
            if part is None:
                have = ", ".join(sorted({p.name for p in free})) or "no slice is left"
                raise InputError("no such slice is free in the layout", key=f"{key}.slice", value=wanted, allowed=have)
            free.remove(part)
            ways = engine.tensor_parallel if role(source) == "decoder" else 1
            if ways > 1:
                _join_cards(part, free, ways, spec)
            kv_tokens_max = _kv_tokens(source, part, spec, batching[spec.model], key, engine)
            for _ in range(spec.processes):
                number = sum(1 for r in replicas if r.model == spec.model)
                name = f"{spec.model}-{number}"
                replicas.append(
                    Replica(
                        id=name,
                        model=spec.model,
                        role=role(source),
                        slice=part,
                        kv_tokens_max=kv_tokens_max,
                        processes=spec.processes,
                        weights_kv_tokens=_weights_kv_tokens(source) if kv_tokens_max and part.profile else 0,
                        worker=spec.worker,
                        threads=spec.threads,
                        tensor_parallel=ways,
                    )
                )
    return tuple(replicas)


def _standby(
    spec: AutoscaleSpec,
    gpu: catalog.Gpu | None,
    models: Mapping[str, ModelSource],
    batching: Mapping[str, BatchingSpec],
    replicas: tuple[Replica, ...],
    free: list[Slice],
    engine: Engine,
) -> tuple[Replica, ...]:
    """The replicas that may be started: each model's like its first one, on the slices that are left. A slice may have
    several models stand by; whoever is started first has it."""
    standby: list[Replica] = []
    for name, rule in spec.models.items():
        key = f"deployment.autoscale.models.{name}"
        mine = [r for r in replicas if r.model == name]
        if not mine:
            raise InputError("no replica to make others like", key=key, allowed="a model with a replica")
        if not rule.min_replicas <= len(mine) <= rule.max_replicas:
            raise InputError(
                f"{name} starts with {len(mine)}",
                key=f"{key}.max_replicas" if len(mine) > rule.max_replicas else f"{key}.min_replicas",
                value=rule.max_replicas if len(mine) > rule.max_replicas else rule.min_replicas,
                allowed="min_replicas <= the replicas named <= max_replicas",
            )
        more = rule.max_replicas - len(mine)
        first = mine[0]
        if first.tensor_parallel > 1 and more:
            raise InputError(
                "a model on several cards does not come and go", key=key, allowed="tensor_parallel_size: 1"
            )
        if gpu is None:
            places = [first.slice] * more
        else:
            wanted = _slice_name(gpu, rule.slice) if rule.slice else first.slice.name
            places = [part for part in free if part.name == wanted][:more]
            if more and not places:
                have = ", ".join(sorted({part.name for part in free})) or "none"
                raise InputError(
                    f"no {wanted} is left in the layout", key=f"{key}.max_replicas", value=rule.max_replicas,
                    allowed=f"{len(mine)}, or a layout with more slices (left: {have})",
                )  # fmt: skip
        numbers = range(len(mine), len(mine) + len(places))
        for number, part in zip(numbers, places, strict=True):
            like = ReplicaSpec(model=name, slice=part.name)
            kv_tokens_max = first.kv_tokens_max
            if part.name != first.slice.name or first.processes > 1:
                kv_tokens_max = _kv_tokens(models[name], part, like, batching[name], key, engine)
            standby.append(replace(first, id=f"{name}-{number}", slice=part, processes=1, kv_tokens_max=kv_tokens_max))
    return tuple(standby)


def _check_engine(engine: Engine, gpu: catalog.Gpu | None, models: Mapping[str, ModelSource]) -> None:
    """What vLLM would not serve, and what nobody could say how fast it would."""
    if engine.name == "gpuplan":
        return
    if gpu is None:
        raise InputError(f"{engine.name} is emulated on a GPU, and this is a CPU", key="deployment.engine",
                         value=engine.name, allowed="gpuplan, or a card in deployment.gpu")  # fmt: skip
    for name, source in models.items():
        model = shape_of(source)
        if role(source) != "decoder":
            continue
        if not source.emulated or model is None:
            raise InputError(f"{name} is served by gpuplan's own engine", key="deployment.engine", value=engine.name,
                             allowed="gpuplan, or models that are emulated")  # fmt: skip
        if model.heads % engine.tensor_parallel:
            raise InputError(f"must divide {model.name}'s {model.heads} attention heads",
                             key="deployment.engine.tensor_parallel_size", value=engine.tensor_parallel,
                             allowed=f"a divisor of {model.heads}")  # fmt: skip


def _join_cards(first: Slice, free: list[Slice], ways: int, spec: ReplicaSpec) -> None:
    """Takes the other cards of a replica that has several, all of them whole."""
    key = "deployment.engine.tensor_parallel_size"
    if first.name != mig.WHOLE or spec.processes > 1:
        raise InputError("needs whole cards, each with one process", key=key, value=ways, allowed="1")
    if len(free) < ways - 1:
        raise InputError(f"{spec.model} finds {len(free) + 1} whole card(s) left", key=key, value=ways,
                         allowed="a deployment.count with as many cards for each replica")  # fmt: skip
    del free[: ways - 1]


def _slice_name(gpu: catalog.Gpu | None, name: str) -> str:
    """The name that the card's profile has, where another driver's was written; any other word as it is."""
    if gpu is None or not gpu.profiles or profiles.parsed(name) is None:
        return name
    try:
        return mig.profile(gpu, name).name
    except InputError:
        return name  # no slice has it, which is said with the slices that are there


def _profile(row: MigProfileSpec, cells: int, index: int) -> mig.Profile:
    key = f"deployment.mig_profiles[{index}]"
    named = profiles.parsed(row.name)
    if named is None:
        raise InputError("no name of a MIG profile", key=f"{key}.name", value=row.name, allowed="e.g. 3g.40gb")
    cells = row.cells or cells
    if not row.starts or max(row.starts) + row.width > cells:
        raise InputError(
            "does not lie on the card", key=f"{key}.starts", value=row.starts, allowed=f"cells 0 to {cells - row.width}"
        )
    return mig.Profile(
        name=row.name,
        slices=row.slices,
        width=row.width,
        starts=tuple(row.starts),
        count_max=row.count_max,
        memory_bytes=round(row.memory_gib * catalog.GIB),
        sm_count=row.sm_count,
        cells=cells,
        suffix=named[2],
        profile_id=row.profile_id,
    )


def _kv_tokens(
    source: ModelSource, part: Slice, spec: ReplicaSpec, batching: BatchingSpec, key: str, engine: Engine
) -> int | None:
    """The KV cache of one replica in tokens; None for a model that keeps none."""
    model = shape_of(source)
    if engine.block_size is not None and model is not None and part.profile is not None and role(source) == "decoder":
        if spec.kv_cache_tokens is not None or spec.processes > 1:
            field = "processes" if spec.kv_cache_tokens is None else "kv_cache_tokens"
            raise InputError(f"{engine.name} has its own", key=f"{key}.{field}", value=getattr(spec, field),
                             allowed="leave it out, or deployment.engine.num_gpu_blocks_override")  # fmt: skip
        return engine.kv_tokens(model, part.profile, key=f"{key}.slice")
    if model and source.emulated and part.profile is None:
        raise InputError(
            f"{model.name} is emulated on a GPU, and this is a CPU", key="deployment.gpu", allowed="a card's name"
        )
    held = _kv_held(model, part.profile, spec, key) if model and part.profile else None
    if role(source) != "decoder":
        if spec.kv_cache_tokens is not None:
            raise InputError(
                f"{spec.model} keeps no KV cache",
                key=f"{key}.kv_cache_tokens",
                value=spec.kv_cache_tokens,
                allowed="leave it out",
            )
        return None
    if spec.kv_cache_tokens is not None and held is not None:
        return min(spec.kv_cache_tokens, held)
    return spec.kv_cache_tokens or held or batching.max_batch_size * window_of(source)


def _kv_held(model: shapes.ModelShape, part: profiles.Profile, spec: ReplicaSpec, key: str) -> int:
    """What the slice's memory leaves beside the weights, in tokens, for each of the processes that share it."""
    tokens = roofline.kv_capacity_tokens(model, part, processes=spec.processes)
    if tokens < 1:
        need = (model.weights_bytes + roofline.RUNTIME_MEMORY_BYTES) / catalog.GIB
        have = part.memory_bytes / spec.processes / catalog.GIB
        owner = "the slice" if spec.processes == 1 else f"each of {spec.processes} processes"
        raise InputError(
            f"{model.name} does not fit: it needs {need:.1f} GiB before any KV cache, {owner} has {have:.1f} GiB",
            key=f"{key}.slice",
            value=part.name,
            allowed="a slice with more memory",
        )
    return tokens


def _weights_kv_tokens(source: ModelSource) -> int:
    """Tokens of KV cache that take as much memory as the model's weights and runtime do; 0 where it has no shape."""
    model = shape_of(source)
    if model is None or not model.kv_bytes_per_token:
        return 0
    return roofline.memory_used_bytes(model, 0) // model.kv_bytes_per_token
