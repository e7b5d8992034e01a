"""Scenario files: good ones load, bad ones say file, line, key and what is allowed, on one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gpuplan.errors import InputError
from gpuplan.scenario import build, demand, deployment, files
from tests.conftest import REPOSITORY

GOOD = """\
name: base
seed: 1
duration: 10s
warmup: 1s
models:
  chat: {emulate: llama-3-8b}
traffic:
  - name: talk
    model: chat
    arrivals: {process: poisson, rate: 2}
    prompt_tokens: 100
    output_tokens: {lognormal: {p50: 10, p95: 40}}
    slo: {ttft_ms: {p95: 500}}
deployment:
  gpu: a100-80gb
  mig: [3g.40gb, 2g.20gb]
  replicas: [{model: chat, slice: 3g.40gb}]
"""

EXAMPLE = """\
name: chat-and-code
seed: 7
duration: 60s
warmup: 5s
models:
  sentiment: {builtin: sentiment}
  assistant: {emulate: llama-3-8b}
traffic:
  - name: mood                             # cheap and many
    model: sentiment
    arrivals: {process: poisson, rate: 40}
    prompt_tokens: {lognormal: {p50: 24, p95: 80}}
    slo: {e2el_ms: {p95: 50}}
  - name: codegen                          # few and expensive
    model: assistant
    arrivals: {process: gamma, rate: 2, burstiness: 2.0}
    prompt_tokens: {lognormal: {p50: 1469, p95: 6200}}
    output_tokens: {lognormal: {p50: 13, p95: 100}}
    slo: {ttft_ms: {p95: 500}, tpot_ms: {p95: 50}}
deployment:
  gpu: a100-80gb
  mig: [3g.40gb, 2g.20gb, 1g.10gb, 1g.10gb]
  replicas: [{model: assistant, slice: 3g.40gb}, {model: sentiment, slice: 1g.10gb, count: 2}]
  batching: {assistant: {max_batch_size: 32}, sentiment: {max_batch_size: 64, max_queue_delay: 2ms}}
  autoscale: {cold_start: 45s, max_gpus: 8}
"""

SCENARIOS = sorted((REPOSITORY / "scenarios").glob("*.yaml"))


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "scenario.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def problem(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        files.load(path)
    return caught.value


# --- good files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_the_examples_load_and_come_back_from_plain_data(path: Path) -> None:
    scenario = files.load(path)
    assert files.from_builtins(files.to_builtins(scenario)) == scenario
    assert path.read_text().startswith("# Shows "), "the first line says what it shows"


def test_the_quickstart_is_among_the_examples() -> None:
    assert "quickstart" in [path.stem for path in SCENARIOS]


def test_the_documented_example_means_what_it_says(tmp_path: Path) -> None:
    scenario = files.load(written(tmp_path, EXAMPLE))
    assert (scenario.duration, scenario.warmup) == (60.0, 5.0)
    assert scenario.deployment.batching["sentiment"].max_queue_delay == pytest.approx(0.002)
    assert scenario.deployment.autoscale.cold_start == 45.0
    assert scenario.traffic[1].limits_ms() == {"ttft_ms": 500.0, "tpot_ms": 50.0}
    supply = deployment.resolve(scenario)
    assert [r.id for r in supply.replicas] == ["assistant-0", "sentiment-0", "sentiment-1"]
    assert [r.slice.name for r in supply.replicas] == ["3g.40gb", "1g.10gb", "1g.10gb"]
    assert len({r.slice.id for r in supply.replicas}) == 3, "a slice of its own for each"
    assert [r.kv_tokens_max is None for r in supply.replicas] == [False, True, True]
    assert supply.price_per_hour == pytest.approx(3.67)
    assert files.from_builtins(files.to_builtins(scenario)) == scenario


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("250ms", 0.25), ("60s", 60.0), ("5m", 300.0), ("1h", 3600.0), ("1.5 s", 1.5), (".5s", 0.5), ("12", 12.0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert build.duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "5 parsecs", "1h30m", "5 S", "ms5"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        build.duration_s(text)


def test_the_largest_model_goes_to_the_largest_slice_when_no_replica_is_named(tmp_path: Path) -> None:
    text = EXAMPLE.replace(
        "  replicas: [{model: assistant, slice: 3g.40gb}, {model: sentiment, slice: 1g.10gb, count: 2}]\n", ""
    )
    supply = deployment.resolve(files.load(written(tmp_path, text)))
    assert [(r.model, r.slice.name) for r in supply.replicas] == [("assistant", "3g.40gb"), ("sentiment", "2g.20gb")]


def test_two_cards_have_the_layout_twice(tmp_path: Path) -> None:
    text = GOOD.replace("a100-80gb", "a100-80gb\n  count: 2").replace("3g.40gb}]", "3g.40gb, count: 2}]")
    supply = deployment.resolve(files.load(written(tmp_path, text)))
    assert supply.layouts == (("3g.40gb", "2g.20gb"),) * 2
    assert [r.slice.gpu_index for r in supply.replicas] == [0, 1]


def test_paths_are_relative_to_the_file_and_auto_asks_the_machine(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("arrived_at_s,prompt_tokens,output_tokens\n0,5,5\n")
    text = GOOD.replace("process: poisson, rate: 2", "process: trace, file: trace.csv").replace("a100-80gb", "auto")
    scenario = files.load(written(tmp_path, text), cards_here=lambda: {"a100-80gb": ()})
    assert getattr(scenario.traffic[0].arrivals, "file", "") == str((tmp_path / "trace.csv").resolve())
    assert scenario.deployment.gpu == "a100-80gb"


FAULTS = """\
faults:
  - {at: 1s, replica: chat-1, crash: {back_after: 500ms}}
  - {at: 2s, for: 1m, model: chat, slow: {factor: 5}}
  - {at: 3s, replica: chat-0, hang: {}}
"""


def test_faults_are_known_to_the_deployment_by_replica(tmp_path: Path) -> None:
    scenario = files.load(
        written(
            tmp_path,
            GOOD.replace("[3g.40gb, 2g.20gb]", "[3g.40gb]\n  count: 2").replace("40gb}]", "40gb, count: 2}]") + FAULTS,
        )
    )
    told = [(f.replica_id, f.at_s, f.until_s, f.kind) for f in deployment.resolve(scenario).faults]
    slow = demand.SlowFault(5.0)
    assert told == [
        ("chat-1", 1.0, float("inf"), demand.CrashFault(0.5)),
        ("chat-0", 2.0, 62.0, slow),
        ("chat-1", 2.0, 62.0, slow),
        ("chat-0", 3.0, float("inf"), demand.HangFault(0.0)),
    ]
    plain = files.to_builtins(scenario)
    assert plain["faults"][1] == {"at": 2.0, "for": 60.0, "model": "chat", "slow": {"factor": 5.0}}
    assert files.from_builtins(plain) == scenario
    assert "faults" not in files.to_builtins(files.load(written(tmp_path, GOOD)))


# --- bad files ----------------------------------------------------------------------------------------------------

# (what stands in the good file, what stands there instead, line, key, a part of the message)
REPLACED = [
    ("duration: 10s", "draution: 10s", 3, "draution", "unknown key; allowed: deployment, duration,"),
    ("rate: 2", "rate: -2", 10, "traffic[0].arrivals.rate", "(got -2); allowed: float > 0"),
    ("rate: 2", "rate: .nan", 10, "traffic[0].arrivals.rate", "(got nan); allowed: float > 0"),
    ("rate: 2", "rate: fast", 10, "traffic[0].arrivals.rate", "(got 'fast'); allowed: float"),
    ("rate: 2", "rate: true", 10, "traffic[0].arrivals.rate", "(got True); allowed: float"),
    ("rate: 2", "rate: 2, burstiness: 2", 10, "traffic[0].arrivals.burstiness", "allowed: rate"),  # gamma's key
    (
        "poisson, rate: 2",
        "gamma, rate: 2, burstiness: 1.0e-9",
        10,
        "traffic[0].arrivals.burstiness",
        "allowed: float >= 0.01",
    ),
    ("poisson", "sine", 10, "traffic[0].arrivals.process", "allowed: constant, poisson, gamma, trace"),
    ("process: poisson, ", "", 10, "traffic[0].arrivals.process", "allowed: constant, poisson"),
    ("seed: 1", "seed: 1.5", 2, "seed", "(got 1.5); allowed: int"),
    ("seed: 1", "seed: [1]", 2, "seed", "(got [1]); allowed: int"),
    ("seed: 1", "seed: -1", 2, "seed", "(got -1); allowed: int >= 0"),
    ("duration: 10s", "duration: 10 parsecs", 3, "duration", "(got '10 parsecs'); allowed: e.g. 250ms, 60s"),
    (
        "slice: 3g.40gb}]",
        "slice: 3g.40gb}]\n  batching: {chat: {max_queue_delay: 2h}}",
        18,
        "deployment.batching.chat.max_queue_delay",
        "allowed: float <= 60",
    ),
    ("duration: 10s", "duration: 0", 3, "duration", "allowed: e.g. 60s"),
    ("duration: 10s", "duration: .inf", 3, "duration", "allowed: "),  # would never end
    ("warmup: 1s", "warmup: 10s", 4, "warmup", "nothing is left to measure (got 10.0); allowed: less than duration"),
    ("name: base", "name: ../base", 1, "name", "allowed: str matching"),  # it names a folder
    ("name: base", "name: 2025-01-05", 1, "name", "allowed: str"),  # a date
    (
        "name: base",
        "name: !!python/object:os.system {}",
        1,
        "name",
        "not a plain value; allowed: no tag",
    ),  # no object is ever made
    ("seed: 1", "traffic: 5", 7, "traffic", "stands twice"),  # never the last one wins
    ("  chat: {", "  idle: {emulate: bert-base}\n  chat: {", 6, "models.idle", "no traffic class uses this model"),
    ("llama-3-8b", "llama-8b", 6, "models.chat.emulate", "allowed: did you mean llama-3-8b"),
    ("emulate: llama-3-8b", "", 6, "models.chat", "exactly one key; allowed: builtin or onnx or emulate"),
    ("llama-3-8b", "llama-3-8b, onnx: m.onnx", 6, "models.chat", "exactly one key; allowed: builtin or onnx"),
    ("emulate: llama-3-8b", "builtin: mood", 6, "models.chat.builtin", "(got 'mood'); allowed: sentiment"),
    ("    model: chat", "    model: talker", 9, "traffic[0].model", "no such model (got 'talker'); allowed: chat"),
    ("slice: 3g.40gb", "slice: 4g.40gb", 17, "deployment.replicas[0].slice", "allowed: 2g.20gb, 3g.40gb"),
    ("slice: 3g.40gb", "slice: 3g.40gb, count: 2", 17, "deployment.replicas[0].slice", "allowed: 2g.20gb"),
    ("{model: chat, s", "{model: talker, s", 17, "deployment.replicas[0].model", "no such model (got 'talker')"),
    ("3g.40gb, 2g.20gb", "4g.40gb, 4g.40gb", 16, "deployment.mig[1]", "does not fit beside 4g.40gb"),
    ("3g.40gb, 2g.20gb", "3g.40gb, 3g.20gb", 16, "deployment.mig[1]", "unknown MIG profile of a100-80gb"),
    ("3g.40gb, 2g.20gb", "3g.40gb, 2", 16, "deployment.mig[1]", "allowed: str"),
    ("a100-80gb", "a1000", 15, "deployment.gpu", "allowed: did you mean a100-80gb"),
    ("a100-80gb", "auto", 15, "deployment.gpu", "allowed: a card's name or cpu"),  # no card here was asked for
    ("a100-80gb", "cpu", 16, "deployment.mig", "a CPU has no MIG slices"),
    ("a100-80gb", "l4", 16, "deployment.mig[0]", "l4 has no MIG"),
    ("slice: 3g.40gb", "slice: 2g.20gb}, {model: chat, slice: 2g.20gb", 17, "deployment.replicas[1].slice", "allowed:"),
    ("llama-3-8b", "llama-2-70b", 17, "deployment.replicas[0].slice", "needs 129.6 GiB before any KV cache"),
    ("prompt_tokens: 100", "prompt_tokens: 0", 11, "traffic[0].prompt_tokens", "allowed: int >= 1"),
    ("prompt_tokens: 100", "prompt_tokens: lots", 11, "traffic[0].prompt_tokens", "allowed: int"),
    ("    prompt_tokens: 100\n", "", 8, "traffic[0].prompt_tokens", "missing; allowed: a number of tokens"),
    ("p95: 40", "p95: 4", 12, "traffic[0].output_tokens.lognormal", "p95 is below p50 (got 4.0); allowed: at least 10"),
    ("p95: 40", "p95: .inf", 12, "traffic[0].output_tokens.lognormal", "allowed: "),  # draws nothing finite
    ("100", "{uniform: {min: 5, max: 2}}", 11, "traffic[0].prompt_tokens.uniform", "allowed: at most 2"),
    ("100", "{quantiles: {p50: 5}}", 11, "traffic[0].prompt_tokens.quantiles", "needs min and max; allowed: "),
    ("100", "{quantiles: {min: 5, max: 2}}", 11, "traffic[0].prompt_tokens.quantiles", "must not fall"),
    ("100", "{quantiles: {min: 1, q9: 2, max: 3}}", 11, "traffic[0].prompt_tokens.quantiles", "'q9' is not min"),
    ("100", "{quantiles: {min: 1, max: .nan}}", 11, "traffic[0].prompt_tokens.quantiles", "allowed: "),
    ("100", "{quantiles: {min: -9, max: 5}}", 11, "traffic[0].prompt_tokens.quantiles", "allowed: "),
    ("100", "{quantiles: {}}", 11, "traffic[0].prompt_tokens.quantiles", "needs min and max"),
    ("100", "{uniform: {min: 1, max: 2}, quantiles: {}}", 11, "traffic[0].prompt_tokens", "needs exactly one key"),
    ("ttft_ms", "ttft", 13, "traffic[0].slo", "unknown metric (got 'ttft'); allowed: ttft_ms, tpot_ms"),
    ("p95: 500", "p96: 500", 13, "traffic[0].slo.ttft_ms", "unknown statistic (got 'p96'); allowed: mean, p50"),
    ("p95: 500", "p95: 0", 13, "traffic[0].slo.ttft_ms.p95", "allowed: float > 0"),
    ("{p95: 500}", "500", 13, "traffic[0].slo.ttft_ms", "needs a mapping (got 500)"),
    ("process: poisson, rate: 2", "process: trace, file: a.csv", 10, "traffic[0].arrivals.file", "no such file"),
    ("process: poisson, rate: 2", 'process: trace, file: "a\\0"', 10, "traffic[0].arrivals.file", "a"),  # a NUL
    (
        "  replicas",
        "  batching: {mood: {}}\n  replicas",
        17,
        "deployment.batching.mood",
        "no such model; allowed: chat",
    ),
    (
        "  replicas",
        "  batching: {chat: {max_batch_size: 0}}\n  replicas",
        17,
        "deployment.batching.chat.max_batch_size",
        ">= 1",
    ),
    *(
        ("warmup: 1s", f"faults: [{{at: 2s, {fault}}}]", 4, f"faults[0]{key}", said)
        for fault, key, said in (
            ("replica: chat-1, crash: {}", ".replica", "no such replica (got 'chat-1'); allowed: chat-0"),
            ("replica: chat, crash: {}", ".replica", "no such replica (got 'chat'); allowed: chat-0"),
            ("model: mood, crash: {}", ".model", "no replica serves it (got 'mood'); allowed: chat"),
            ("crash: {}", "", "needs exactly one key; allowed: replica or model"),
            ("model: chat, replica: chat-0, crash: {}", "", "needs exactly one key; allowed: replica or model"),
            ("model: chat", "", "needs exactly one key; allowed: crash or hang or slow or nan or out_of_memory"),
            ("model: chat, crash: {}, hang: {}", "", "needs exactly one key; allowed: crash or hang or"),
            ("model: chat, crash: yes", ".crash", "needs a mapping (got True)"),
            ("model: chat, crash: {after: 3s}", ".crash.after", "unknown key; allowed: back_after"),
            ("model: chat, crash: {back_after: -3s}", ".crash.back_after", "(got '-3s'); allowed: e.g. 250ms"),
            ("model: chat, for: 3s, crash: {}", ".for", "a crash has no length (got 3.0); allowed: leave it out"),
            ("model: chat, for: 3s, hang: {}", ".for", "a hang has no length (got 3.0); allowed: leave it out"),
            ("model: chat, for: 0s, slow: {factor: 2}", ".for", "(got 0.0); allowed: float > 0"),
            ("model: chat, slow: {factor: 1}", ".slow.factor", "(got 1); allowed: float > 1"),
            ("model: chat, nan: {share: 0}", ".nan.share", "(got 0); allowed: float > 0"),
            ("model: chat, nan: {share: 1.1}", ".nan.share", "(got 1.1); allowed: float <= 1"),
            ("model: chat, out_of_memory: {}", ".out_of_memory.above_batch", "missing"),
            (
                "model: chat, out_of_memory: {above_batch: 0}",
                ".out_of_memory.above_batch",
                "(got 0); allowed: int >= 1",
            ),
            ("model: chat, flood: {}", ".flood", "allowed: at, crash, for, hang, model, nan, out_of_memory, replica"),
        )
    ),
    ("warmup: 1s", "faults: [{model: chat, crash: {}}]", 4, "faults[0].at", "missing"),
    (
        "  replicas",
        "  autoscale: {models: {mood: {max_replicas: 2}}}\n  replicas",
        17,
        "deployment.autoscale.models.mood",
        "no such model (got 'mood'); allowed: chat",
    ),
    (
        "  replicas",
        "  autoscale: {models: {chat: {max_replicas: 1, min_replicas: 2}}}\n  replicas",
        17,
        "deployment.autoscale.models.chat.min_replicas",
        "is above max_replicas (got 2); allowed: at most 1",
    ),
    (
        "  replicas",
        "  autoscale: {models: {chat: {max_replicas: 1, scale_down_at: 4}}}\n  replicas",
        17,
        "deployment.autoscale.models.chat.scale_down_at",
        "is not below scale_up_at (got 4.0); allowed: less than 4",
    ),
    (
        "  replicas",
        "  autoscale: {models: {chat: {max_replicas: 1, kv_scale_up_at: 0.5}}}\n  replicas",
        17,
        "deployment.autoscale.models.chat.kv_scale_down_at",
        "is not below kv_scale_up_at (got 0.6); allowed: less than 0.5",
    ),
    (
        "  replicas",
        "  autoscale: {models: {chat: {max_replicas: 1, load_scale_down_at: 1}}}\n  replicas",
        17,
        "deployment.autoscale.models.chat.load_scale_down_at",
        "is not below load_scale_up_at (got 1.0); allowed: less than 0.9",
    ),
    (
        "  replicas",
        "  autoscale: {models: {chat: {min_replicas: 1}}}\n  replicas",
        17,
        "deployment.autoscale.models.chat.max_replicas",
        "missing",
    ),
    (
        "  replicas",
        "  autoscale: {models: {chat: {max_replicas: 2}}}\n  replicas",
        17,
        "deployment.autoscale.models.chat.max_replicas",
        "no 3g.40gb is left in the layout (got 2); allowed: 1, or a layout with more slices",
    ),
    (
        "  replicas",
        "  admission: {classes: {any: {rate_limit: {burst: 2s}}}}\n  replicas",
        17,
        "deployment.admission.classes.any.rate_limit",
        "limits nothing; allowed: requests_per_s or",
    ),
    (
        "  replicas",
        "  admission: {per_key: {}}\n  replicas",
        17,
        "deployment.admission.per_key",
        "limits nothing",
    ),
    (
        "  replicas",
        "  admission: {classes: {any: {priority: 10}}}\n  replicas",
        17,
        "deployment.admission.classes.any.priority",
        "(got 10); allowed: int <= 9",
    ),
    (
        "  replicas",
        "  breakers: {open: 90s}\n  replicas",
        17,
        "deployment.breakers.open_max",
        "is below open (got 60.0); allowed: at least 90 s",
    ),
    ("seed: 1", '"a\\nb": 1', 2, "a", "unknown key; allowed: "),  # on one line even so
]


@pytest.mark.parametrize(("good", "bad", "line", "key", "text"), REPLACED, ids=[row[1].strip() for row in REPLACED])
def test_a_bad_value_is_named_with_its_line(
    tmp_path: Path, good: str, bad: str, line: int, key: str, text: str
) -> None:
    path = written(tmp_path, GOOD.replace(good, bad, 1))
    error = problem(path)
    assert str(error).startswith(f"{path}:{line}: {key}")
    assert text in str(error)
    assert "\n" not in str(error)


EXAMPLES = [
    (page, example)
    for page in ("scenario.md", "serving.md")
    for example in re.findall(r"```yaml\n(deployment:.*?)```", (REPOSITORY / "docs" / page).read_text(), re.DOTALL)
]


@pytest.mark.parametrize(("page", "example"), EXAMPLES)
def test_the_examples_of_the_docs_are_sound(page: str, example: str, tmp_path: Path) -> None:
    if "gpu:" not in example:
        example = example.replace("deployment:\n", "deployment:\n  gpu: a100-80gb\n")
    models = "name: docs\nmodels: {mood: {emulate: bert-base}}\n"
    assert deployment.resolve(files.load(written(tmp_path, models + example))).replicas


@pytest.mark.parametrize(
    "example", re.findall(r"```yaml\n(name:.*?)```", (REPOSITORY / "docs" / "scenario.md").read_text(), re.DOTALL)
)
def test_the_whole_files_in_the_docs_are_sound(example: str, tmp_path: Path) -> None:
    assert deployment.resolve(files.load(written(tmp_path, example))).replicas


def test_the_docs_have_examples_of_scaling_and_of_admission() -> None:
    for page in ("scenario.md", "serving.md"):
        for key in ("autoscale:", "admission:"):
            assert any(key in example for where, example in EXAMPLES if where == page), (page, key)


def test_classes_that_no_traffic_has_may_have_rules(tmp_path: Path) -> None:
    rules = "  admission: {classes: {elsewhere: {priority: 1, deadline: 2s}}}\n"
    assert deployment.resolve(files.load(written(tmp_path, GOOD + rules))).traffic_classes == ("talk", "elsewhere")


def test_two_classes_of_one_name(tmp_path: Path) -> None:
    begin, end = GOOD.index("  - name: talk"), GOOD.index("deployment:")
    error = problem(written(tmp_path, GOOD[:end] + GOOD[begin:end] + GOOD[end:]))
    assert (error.line, error.key) == (14, "traffic[1].name")
    assert "two classes of one name (got 'talk')" in str(error)


def test_a_model_that_answers_once_has_no_tokens_to_ask_for(tmp_path: Path) -> None:
    text = GOOD.replace("llama-3-8b", "bert-base")
    assert problem(written(tmp_path, text)).key == "traffic[0].output_tokens"
    text = text.replace("    output_tokens: {lognormal: {p50: 10, p95: 40}}\n", "")
    error = problem(written(tmp_path, text))
    assert "traffic[0].slo.ttft_ms: chat streams no tokens; allowed: e2el_ms" in str(error)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)

UNREADABLE = [
    ("name: [\n", "not valid YAML"),
    ("name: base\n\tseed: 1\n", "not valid YAML"),  # a tab
    ("a: *nowhere\n", "undefined alias"),
    ("name: a\n---\nname: b\n", "another document"),
    ("name: a\nname: b\n", ":2: name: the key stands twice"),
    ("models: {a: {onnx: x, onnx: y}}\n", ":1: models.a.onnx: the key stands twice"),
    ("name: !!python/name:os.system x\n", ":1: name: not a plain value"),
    ("name: 2025-13-45\n", ":1: name: not a plain value"),  # looks like a date and is none
    ("models: !!python/object:os.system {a: {builtin: sentiment}}\n", ":1: models: "),  # a tag is never passed over
    ("x: " + "[" * 60 + "]" * 60, "deeply nested"),
    ("x: " + "[" * 5000 + "]" * 5000, "not valid YAML"),  # deeper than the parser's own stack
    (BOMB, "too many"),  # nine to the eighth values
    ("x: &x [*x]\n", "deeply nested"),  # a list in itself
    ("name: a\n<<: {seed: 2}\n", ":2: "),  # merge keys are not part of a plain file
    ("", "needs a mapping"),
    ("- a\n", ":1: needs a mapping"),
    ("just words", ":1: needs a mapping"),
    ("name: base\n", ": models: missing"),
    (b"\xff\xfe\x00", "not UTF-8 text"),
    (b"name: \x00", "not valid YAML"),
    ("x: " + "y" * (1 << 20), "file is too large; allowed: 1048576 bytes"),
]


@pytest.mark.parametrize(("text", "said"), UNREADABLE, ids=range(len(UNREADABLE)))
def test_a_file_that_is_none_says_so(tmp_path: Path, text: str | bytes, said: str) -> None:
    path = written(tmp_path, text)
    error = problem(path)
    assert str(error).startswith(str(path))
    assert said in str(error)
    assert "\n" not in str(error)


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    assert "cannot read: No such file" in str(problem(tmp_path / "none.yaml"))
    assert "cannot read: Is a directory" in str(problem(tmp_path))
