"""Scenario files: from YAML to a checked `Scenario`, and every error with its file, line and key.

`load` reads safely (no tags, no duplicate keys, bounded size and nesting), `build` fills the structs of `demand` by
their types, `check` holds what types cannot say. Paths in a file are relative to the file.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from gpuplan.errors import InputError
from gpuplan.hardware import shapes
from gpuplan.scenario import demand, deployment
from gpuplan.scenario.demand import Scenario

FILE_BYTES_MAX = 1 << 20
NODES_MAX = 100_000
NESTING_MAX = 50

T = TypeVar("T")


def load(path: Path, *, gpu_auto: Callable[[], str | None] | None = None) -> Scenario:
    """The checked scenario in `path`. `gpu_auto` tells what `deployment.gpu: auto` stands for on this machine.

    Raises InputError with file, line, key, value and what is allowed.
    """
    data, lines = _read_yaml(path)
    try:
        scenario = _with_absolute_paths(build(data, Scenario), path.resolve().parent)
        if scenario.deployment.gpu.lower() == "auto":
            here = gpu_auto() if gpu_auto else None
            if here is None:
                raise InputError(
                    "no known NVIDIA card in this machine",
                    key="deployment.gpu",
                    value="auto",
                    allowed="a card's name or cpu",
                )
            scenario = msgspec.structs.replace(
                scenario, deployment=msgspec.structs.replace(scenario.deployment, gpu=here)
            )
        check(scenario)
    except InputError as error:
        error.file = str(path)
        error.line = _line_of(error.key, lines)
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
        _exactly_one(source, f"models.{name}")
        if source.emulate is not None:
            shapes.shape(source.emulate, key=f"models.{name}.emulate")
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
    if isinstance(traffic.arrivals, demand.Trace) and not Path(traffic.arrivals.file).is_file():
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


def _exactly_one(section: demand.Section, key: str) -> None:
    names = section.__struct_fields__
    if sum(getattr(section, name) is not None for name in names) != 1:
        raise InputError("needs exactly one key", key=key, allowed=" or ".join(names))


def _with_absolute_paths(scenario: Scenario, folder: Path) -> Scenario:
    def absolute(name: str) -> str:
        return str((folder / name).resolve())

    models = {
        name: msgspec.structs.replace(source, onnx=absolute(source.onnx)) if source.onnx else source
        for name, source in scenario.models.items()
    }
    traffic = [
        msgspec.structs.replace(c, arrivals=msgspec.structs.replace(c.arrivals, file=absolute(c.arrivals.file)))
        if isinstance(c.arrivals, demand.Trace)
        else c
        for c in scenario.traffic
    ]
    return msgspec.structs.replace(scenario, models=models, traffic=traffic)


# --- filling structs by their types -------------------------------------------------------------------------------


def build(data: Any, kind: type[T], key: str = "") -> T:
    """`data` (plain dicts, lists, scalars) as a `kind`. Raises InputError with the dotted key of what is wrong."""
    filled: T = _build(data, kind, key)
    return filled


def _build(data: Any, kind: Any, key: str) -> Any:
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return _build_struct(data, kind, key)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict:
        _expect_mapping(data, key)
        return {
            _leaf(name, arguments[0], f"{key}.{name}"): _build(value, arguments[1], f"{key}.{name}")
            for name, value in data.items()
        }
    if origin is list:
        if not isinstance(data, list):
            raise InputError("needs a list", key=key, value=data)
        return [_build(item, arguments[0], f"{key}[{i}]") for i, item in enumerate(data)]
    if origin in (typing.Union, types.UnionType):
        return _build_union(data, arguments, key)
    return _leaf(data, kind, key)


def _build_struct(data: Any, kind: type[msgspec.Struct], key: str) -> Any:
    _expect_mapping(data, key)
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    tag_field = kind.__struct_config__.tag_field
    for name in data:
        if name not in fields and name != tag_field:
            raise InputError("unknown key", key=_join(key, str(name)), allowed=", ".join(sorted(fields)))
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _build(data[name], hints[name], _join(key, name))
        elif field.required:
            raise InputError("missing", key=_join(key, name))
    return kind(**values)


def _build_union(data: Any, options: tuple[Any, ...], key: str) -> Any:
    structs = [o for o in options if isinstance(o, type) and issubclass(o, msgspec.Struct)]
    tagged = {str(o.__struct_config__.tag): o for o in structs if o.__struct_config__.tag is not None}
    if tagged:
        _expect_mapping(data, key)
        tag_field = next(iter(tagged.values())).__struct_config__.tag_field or ""
        chosen = tagged.get(str(data.get(tag_field)))
        if chosen is None:
            raise InputError(
                "missing or unknown", key=_join(key, tag_field), value=data.get(tag_field), allowed=", ".join(tagged)
            )
        return _build_struct(data, chosen, key)
    if data is None and type(None) in options:
        return None
    if structs and isinstance(data, dict):
        return _build_struct(data, structs[0], key)
    scalars = [o for o in options if o not in structs and o is not type(None)]
    if not scalars:
        _expect_mapping(data, key)
    return _build(data, scalars[0], key)


_DURATION = re.compile(r"^\s*([0-9]*\.?[0-9]+)\s*(ms|s|m|h)\s*$")
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def duration_s(text: str) -> float:
    """Seconds in `250ms`, `60s`, `5m`, `1h` or a bare number of seconds. Raises ValueError for anything else."""
    match = _DURATION.match(text)
    return float(match[1]) * _SECONDS[match[2]] if match else float(text)


def _leaf(data: Any, kind: Any, key: str) -> Any:
    constraints = [m for m in typing.get_args(kind)[1:] if isinstance(m, msgspec.Meta)] if typing.get_args(kind) else []
    if any((meta.extra or {}).get("duration") for meta in constraints) and isinstance(data, str):
        try:
            data = duration_s(data)
        except ValueError:
            raise InputError("not a duration", key=key, value=data, allowed="e.g. 250ms, 60s, 5m, 1h") from None
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        wanted = str(error).split(" - at ")[0].replace("`", "")
        raise InputError("invalid value", key=key, value=data, allowed=wanted.removeprefix("Expected ")) from None


def _expect_mapping(data: Any, key: str) -> None:
    if not isinstance(data, dict):
        raise InputError("needs a mapping", key=key, value=data)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


# --- YAML with line numbers ---------------------------------------------------------------------------------------


def _read_yaml(path: Path) -> tuple[Any, dict[str, int]]:
    import yaml

    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise InputError("file is too large", file=str(path), allowed=f"{FILE_BYTES_MAX} bytes")
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"cannot read: {reason}", file=str(path)) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise InputError(f"not valid YAML: {error.problem}", file=str(path), line=line) from None
    except (yaml.YAMLError, RecursionError):
        raise InputError("not valid YAML", file=str(path)) from None
    lines: dict[str, int] = {}
    budget = [NODES_MAX]
    constructor = yaml.SafeLoader("")

    def plain(node: Any, key: str, depth: int) -> Any:
        budget[0] -= 1
        line = node.start_mark.line + 1 if node is not None else None
        if budget[0] < 0 or depth > NESTING_MAX:
            raise InputError("too many or too deeply nested values", file=str(path), line=line)
        if node is not None:
            lines.setdefault(key, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            mapping: dict[Any, Any] = {}
            for key_node, value_node in node.value:
                name = str(constructor.construct_object(key_node))
                inner = _join(key, name)
                if name in mapping:
                    raise InputError(
                        "the key stands twice", file=str(path), line=key_node.start_mark.line + 1, key=inner
                    )
                lines[inner] = key_node.start_mark.line + 1
                mapping[name] = plain(value_node, inner, depth + 1)
            return mapping
        if isinstance(node, yaml.SequenceNode):
            return [plain(item, f"{key}[{i}]", depth + 1) for i, item in enumerate(node.value)]
        try:
            return constructor.construct_object(node) if node is not None else None
        except (yaml.YAMLError, ValueError):
            raise InputError("not a plain value", file=str(path), line=line, key=key) from None

    return plain(node, "", 0), lines


def _line_of(key: str, lines: dict[str, int]) -> int | None:
    """The line of `key`, or of the nearest enclosing key that stands in the file."""
    while key and key not in lines:
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return lines.get(key)
