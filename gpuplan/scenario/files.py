"""Scenario files: from YAML to a checked `Scenario`, and every error with its file, line and key.

`load` reads the text (`text`), fills the structs of `demand` (`build`), and `check` holds what types cannot say. Paths
in a file are relative to the file, and absolute afterwards: another process may read the result from another folder.
A model's `config.json` is read once, here: the scenario that a run keeps holds what it said.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from gpuplan.errors import InputError
from gpuplan.hardware import catalog, mig, shapes
from gpuplan.hardware.profiles import Profile
from gpuplan.scenario import demand, deployment, faults, onnx_files, text
from gpuplan.scenario import engine as engines
from gpuplan.scenario.build import build
from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.onnx_files import CONFIG_CHARS_MAX
from gpuplan.scenario.settings import FLAG, apply, set_by

SOURCES = ("builtin", "onnx", "emulate", "shape", "profiled")
"""What a model is, of which it is exactly one."""

CardsHere = Callable[[], Mapping[str, tuple[Profile, ...]]]
"""The catalogue's names of this machine's cards, and the MIG profiles that each reports."""


def load(path: Path, *, settings: Sequence[str] = (), cards_here: CardsHere = dict) -> Scenario:
    """The checked scenario in `path`, with these KEY=VALUE put into it first. Of `cards_here` the first is what
    `deployment.gpu: auto` stands for, and what a card itself says of its MIG profiles wins over the catalogue: it
    becomes `deployment.mig_profiles`.

    Raises InputError with file, line, key, value and what is allowed.
    """
    data, lines = text.read(path)
    keys = apply(data, settings)
    try:
        scenario = _with_shapes(_with_absolute_paths(build(data, Scenario), path.resolve().parent))
        scenario = msgspec.structs.replace(scenario, deployment=_on_this_machine(scenario.deployment, cards_here))
        check(scenario)
    except InputError as error:
        if set_by(error.key, keys, lines):
            error.file = FLAG
        else:
            error.file, error.line = str(path), text.line_of(error.key, lines)
        raise
    return scenario


def from_builtins(data: dict[str, Any]) -> Scenario:
    """The scenario embedded in a run folder (already checked when it was written)."""
    return build(data, Scenario)


def to_builtins(scenario: Scenario) -> dict[str, Any]:
    """Plain dicts and lists, as `build` reads them."""
    plain: dict[str, Any] = msgspec.to_builtins(scenario)
    return plain


def check(scenario: Scenario) -> None:
    """What the types cannot say. Raises InputError for the first rule broken."""
    for name, source in scenario.models.items():
        _exactly_one(source, f"models.{name}", SOURCES)
        for field in ("task", "context_tokens_max", "onnx_shape"):
            if source.onnx is None and getattr(source, field) is not None:
                raise InputError("belongs to an ONNX file", key=f"models.{name}.{field}", allowed="only beside onnx")
        if source.profiled is not None and scenario.profiles is None:
            raise InputError("there is no table", key=f"models.{name}.profiled", allowed="beside profiles: table.csv")
        if source.onnx_shape is not None:
            _check_shape(source.onnx_shape, f"models.{name}.onnx_shape")
        if source.emulate is not None:
            shapes.shape(source.emulate, key=f"models.{name}.emulate")
        if isinstance(source.shape, demand.ShapeSpec):
            _check_shape(source.shape, f"models.{name}.shape")
    if scenario.profiles is not None and not os.path.isfile(scenario.profiles):
        raise InputError("no such file", key="profiles", value=scenario.profiles)
    seen: set[str] = set()
    for i, traffic in enumerate(scenario.traffic):
        _check_class(scenario, traffic, f"traffic[{i}]")
        if traffic.name in seen:
            raise InputError("two classes of one name", key=f"traffic[{i}].name", value=traffic.name)
        seen.add(traffic.name)
    for name in scenario.models if scenario.traffic else ():
        if not scenario.traffic_of(name):
            raise InputError(
                "no traffic class uses this model", key=f"models.{name}", allowed="remove it or send it traffic"
            )
    if scenario.duration <= 0:
        raise InputError("must be above zero", key="duration", value=scenario.duration, allowed="e.g. 60s")
    if scenario.warmup >= scenario.duration:
        raise InputError(
            "nothing is left to measure",
            key="warmup",
            value=scenario.warmup,
            allowed=f"less than duration ({scenario.duration:g} s)",
        )
    for name in scenario.deployment.batching:
        if name not in scenario.models:
            raise InputError("no such model", key=f"deployment.batching.{name}", allowed=", ".join(scenario.models))
        engine = engines.spec_of(scenario.deployment.engine).kind
        if engine != "gpuplan" and deployment.role(scenario.models[name]) == "decoder":
            raise InputError(f"{engine} has limits of its own", key=f"deployment.batching.{name}",
                             allowed="deployment.engine.max_num_seqs and max_num_batched_tokens")  # fmt: skip
    for name, rule in scenario.deployment.autoscale.models.items():
        key = f"deployment.autoscale.models.{name}"
        if name not in scenario.models:
            raise InputError("no such model", key=key, value=name, allowed=", ".join(scenario.models))
        _check_autoscale(rule, key)
    _check_admission(scenario.deployment.admission)
    breakers = scenario.deployment.breakers
    if breakers.open_max < breakers.open:
        raise InputError(
            "is below open",
            key="deployment.breakers.open_max",
            value=breakers.open_max,
            allowed=f"at least {breakers.open:g} s",
        )
    for i, fault in enumerate(scenario.faults):
        _check_fault(fault, f"faults[{i}]")
    resolved = deployment.resolve(scenario)
    for i, traffic in enumerate(scenario.traffic):
        if not resolved.replicas_of(traffic.model):
            raise InputError(
                f"no replica serves {traffic.model}",
                key=f"traffic[{i}].model",
                value=traffic.model,
                allowed="add it to deployment.replicas",
            )


def _check_class(scenario: Scenario, traffic: demand.TrafficClass, key: str) -> None:
    if traffic.model not in scenario.models:
        raise InputError("no such model", key=f"{key}.model", value=traffic.model, allowed=", ".join(scenario.models))
    trace = isinstance(traffic.arrivals, demand.Trace)
    if isinstance(traffic.arrivals, demand.Trace) and not os.path.isfile(traffic.arrivals.file):
        raise InputError("no such file", key=f"{key}.arrivals.file", value=traffic.arrivals.file)
    decoder = deployment.role(scenario.models[traffic.model]) == "decoder"
    for field, needed in (("prompt_tokens", True), ("output_tokens", decoder)):
        lengths = getattr(traffic, field)
        if lengths is None and needed and not trace:
            raise InputError("missing", key=f"{key}.{field}", allowed="a number of tokens or a distribution")
        if lengths is not None and field == "output_tokens" and not decoder:
            raise InputError(f"{traffic.model} gives no tokens", key=f"{key}.{field}", allowed="leave it out")
        if isinstance(lengths, demand.Lengths):
            _check_lengths(lengths, f"{key}.{field}")
    if traffic.shared_prefix is not None:
        _check_prefix(traffic, traffic.shared_prefix, decoder, f"{key}.shared_prefix")
    for metric, limits in traffic.slo.items():
        if metric not in demand.SLO_METRICS:
            raise InputError("unknown metric", key=f"{key}.slo", value=metric, allowed=", ".join(demand.SLO_METRICS))
        if metric in ("ttft_ms", "tpot_ms", "itl_ms") and not decoder:
            raise InputError(f"{traffic.model} streams no tokens", key=f"{key}.slo.{metric}", allowed="e2el_ms")
        for statistic in limits:
            if statistic not in demand.SLO_STATISTICS:
                raise InputError(
                    "unknown statistic",
                    key=f"{key}.slo.{metric}",
                    value=statistic,
                    allowed=", ".join(demand.SLO_STATISTICS),
                )


def _check_prefix(traffic: demand.TrafficClass, prefix: demand.SharedPrefix, decoder: bool, key: str) -> None:
    if not decoder:
        raise InputError(f"{traffic.model} keeps nothing of a prompt", key=key, allowed="leave it out")
    if isinstance(traffic.prompt_tokens, int) and prefix.tokens > traffic.prompt_tokens:
        raise InputError(
            "is longer than the prompts",
            key=f"{key}.tokens",
            value=prefix.tokens,
            allowed=f"at most prompt_tokens ({traffic.prompt_tokens})",
        )


def _check_fault(fault: demand.FaultSpec, key: str) -> None:
    _exactly_one(fault, key, ("replica", "model"))
    _exactly_one(fault, key, faults.KINDS)
    instant = next((name for name in ("crash", "hang") if getattr(fault, name) is not None), None)
    if instant and fault.lasting is not None:
        raise InputError(f"a {instant} has no length", key=f"{key}.for", value=fault.lasting, allowed="leave it out")


def _check_autoscale(rule: demand.AutoscaleRule, key: str) -> None:
    if rule.min_replicas > rule.max_replicas:
        raise InputError(
            "is above max_replicas",
            key=f"{key}.min_replicas",
            value=rule.min_replicas,
            allowed=f"at most {rule.max_replicas}",
        )
    for signal in ("", "kv_", "load_"):
        up, down = getattr(rule, f"{signal}scale_up_at"), getattr(rule, f"{signal}scale_down_at")
        if down >= up:  # replicas would come and go for ever
            raise InputError(
                f"is not below {signal}scale_up_at",
                key=f"{key}.{signal}scale_down_at",
                value=down,
                allowed=f"less than {up:g}",
            )


def _check_admission(spec: demand.AdmissionSpec) -> None:
    """A live server may be asked by classes that the scenario does not send, so any class may have rules."""
    rules = {f"classes.{name}.rate_limit": rules.rate_limit for name, rules in spec.classes.items()}
    for where, limit in {**rules, "per_key": spec.per_key}.items():
        if limit is not None and limit.requests_per_s is None and limit.tokens_per_s is None:
            raise InputError(
                "limits nothing", key=f"deployment.admission.{where}", allowed="requests_per_s or tokens_per_s, or both"
            )


def _check_shape(shape: demand.ShapeSpec, key: str) -> None:
    if shape.head_size is None and shape.hidden % shape.heads:
        raise InputError(
            "must divide hidden", key=f"{key}.heads", value=shape.heads, allowed=f"a divisor of {shape.hidden}"
        )
    if shape.kv_heads is not None and shape.heads % shape.kv_heads:
        raise InputError(
            "must divide heads", key=f"{key}.kv_heads", value=shape.kv_heads, allowed=f"a divisor of {shape.heads}"
        )
    if not min(shape.experts, 1) <= shape.experts_per_token <= shape.experts:
        raise InputError(
            "does not fit the experts",
            key=f"{key}.experts_per_token",
            value=shape.experts_per_token,
            allowed=f"1 to {shape.experts}" if shape.experts else "0 without experts",
        )


def _check_lengths(lengths: demand.Lengths, key: str) -> None:
    _exactly_one(lengths, key)
    if lengths.uniform and lengths.uniform.min > lengths.uniform.max:
        raise InputError(
            "min is above max",
            key=f"{key}.uniform",
            value=lengths.uniform.min,
            allowed=f"at most {lengths.uniform.max}",
        )
    if lengths.lognormal and lengths.lognormal.p95 < lengths.lognormal.p50:
        raise InputError(
            "p95 is below p50",
            key=f"{key}.lognormal",
            value=lengths.lognormal.p95,
            allowed=f"at least {lengths.lognormal.p50:g}",
        )
    if lengths.quantiles is not None:
        try:
            demand.quantile_points(lengths.quantiles)
        except (ValueError, IndexError) as error:
            raise InputError(
                str(error), key=f"{key}.quantiles", allowed="min, pNN..., max with rising values"
            ) from None


def _exactly_one(section: demand.Section, key: str, names: tuple[str, ...] = ()) -> None:
    names = names or section.__struct_fields__
    if sum(getattr(section, name) is not None for name in names) != 1:
        raise InputError("needs exactly one key", key=key, allowed=" or ".join(names))


def _with_absolute_paths(scenario: Scenario, folder: Path) -> Scenario:
    def absolute(name: str) -> str:
        return os.path.abspath(folder / name)

    def located(source: demand.ModelSource) -> demand.ModelSource:
        if isinstance(source.shape, str):
            return msgspec.structs.replace(source, shape=absolute(source.shape))
        return msgspec.structs.replace(source, onnx=absolute(source.onnx)) if source.onnx else source

    models = {name: located(source) for name, source in scenario.models.items()}
    traffic = [
        msgspec.structs.replace(c, arrivals=msgspec.structs.replace(c.arrivals, file=absolute(c.arrivals.file)))
        if isinstance(c.arrivals, demand.Trace)
        else c
        for c in scenario.traffic
    ]
    profiles = absolute(scenario.profiles) if scenario.profiles is not None else None
    return msgspec.structs.replace(scenario, models=models, traffic=traffic, profiles=profiles)


def _on_this_machine(spec: demand.DeploymentSpec, cards_here: CardsHere) -> demand.DeploymentSpec:
    if spec.gpu.lower() == deployment.CPU:
        return spec
    here = cards_here()
    if spec.gpu.lower() == "auto":
        if not here:
            raise InputError(
                "no known NVIDIA card in this machine",
                key="deployment.gpu",
                value="auto",
                allowed="a card's name or cpu",
            )
        spec = msgspec.structs.replace(spec, gpu=next(iter(here)))
    card = catalog.gpu(spec.gpu)
    seen = here.get(card.name, ())
    if seen and not spec.mig_profiles and mig.differences(card.profiles, seen):
        spec = msgspec.structs.replace(spec, mig_profiles=deployment.profile_rows(seen))
    return spec


def _with_shapes(scenario: Scenario) -> Scenario:
    """Every `shape: path` replaced by the shape that the `config.json` there (a file, or in a folder) describes, and
    what stands beside an ONNX file told with it."""

    def told(source: demand.ModelSource, key: str) -> demand.ModelSource:
        if isinstance(source.shape, str):
            source = msgspec.structs.replace(source, shape=_spec(source.shape, f"{key}.shape"))
        return onnx_files.filled(source, key=key) if source.onnx is not None else source

    models = {name: told(source, f"models.{name}") for name, source in scenario.models.items()}
    return msgspec.structs.replace(scenario, models=models)


def _spec(path: str, key: str) -> demand.ShapeSpec:
    return build(dataclasses.asdict(_shape_in(Path(path), key)), demand.ShapeSpec, key)


def shape_named(name: str, *, key: str) -> shapes.ModelShape:
    """The shape of that name, or the one that a `config.json` (a file, or in a folder) of that path describes."""
    # A known name is no path, whatever lies in the folder; everything with a separator or an ending is one.
    if name.lower() not in shapes.SHAPES and (os.sep in name or name.endswith(".json")):
        return _shape_in(Path(name), key)
    return shapes.shape(name, key=key)


def _shape_in(path: Path, key: str) -> shapes.ModelShape:
    try:
        path = path / "config.json" if path.is_dir() else path
        with path.open(encoding="utf-8") as file:
            config = json.loads(file.read(CONFIG_CHARS_MAX))
    except OSError as error:
        raise InputError(f"cannot read: {error.strerror}", key=key, value=str(path)) from None
    except (ValueError, RecursionError):
        raise InputError("not JSON", key=key, value=str(path), allowed="a Hugging Face config.json") from None
    if not isinstance(config, dict):
        raise InputError("needs a mapping", key=key, value=str(path), allowed="a Hugging Face config.json")
    return shapes.from_config(config, key=key)
