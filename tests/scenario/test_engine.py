"""`deployment.engine` and `traffic[].shared_prefix`: defaults, what follows from them, and what cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpuplan.errors import InputError
from gpuplan.scenario import deployment, files
from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.deployment import Deployment
from gpuplan.scenario.engine import BUILT_IN, Engine
from gpuplan.scenario.schedule import ScheduledRequest, build_schedule


def data(engine: Any = "vllm", *, model: str = "llama-3-8b", prefix: Any = None, **supply: Any) -> dict[str, Any]:
    traffic = {
        "name": "talk",
        "model": "chat",
        "arrivals": {"process": "poisson", "rate": 20},
        "prompt_tokens": 100,
        "output_tokens": 10,
        **({"shared_prefix": prefix} if prefix else {}),
    }
    return {
        "name": "served",
        "models": {"chat": {"emulate": model}},
        "traffic": [traffic],
        "deployment": {"gpu": "h100", "engine": engine, **supply},
    }


def resolved(*args: Any, **kwargs: Any) -> Deployment:
    scenario = files.build(data(*args, **kwargs), Scenario)
    files.check(scenario)
    return deployment.resolve(scenario)


@pytest.mark.parametrize(
    ("gpu", "sequences", "tokens"),
    [
        ("h100", 1024, 8192),
        ("h200", 1024, 8192),
        ("a100-80gb", 256, 2048),  # large, but large steps slowed it
        ("l40s", 256, 2048),
    ],
)
def test_limits_are_vllm_s_own(gpu: str, sequences: int, tokens: int) -> None:
    supply = resolved(gpu=gpu)
    rule = supply.batching["chat"]
    assert (rule.max_batch_size, rule.max_batch_tokens) == (sequences, tokens)
    assert supply.engine == Engine("vllm", 1, 16, None, 0.9, True, True)


def test_limits_that_are_given() -> None:
    keys = {"max_num_seqs": 128, "max_num_batched_tokens": 4096, "num_gpu_blocks_override": 1000, "block_size": 32}
    supply = resolved({"kind": "vllm", **keys, "enable_prefix_caching": False, "async_scheduling": False})
    rule, (replica,) = supply.batching["chat"], supply.replicas
    assert (rule.max_batch_size, rule.max_batch_tokens, replica.kv_tokens_max) == (128, 4096, 32_000)
    assert not supply.engine.prefix_caching and not supply.engine.schedules_ahead


def test_the_built_in_engine_is_the_usual_one() -> None:
    assert resolved("gpuplan").engine == resolved({"kind": "gpuplan"}).engine == BUILT_IN
    assert resolved("gpuplan").batching["chat"].max_batch_size == 32


def test_kv_cache_is_what_the_memory_leaves_in_whole_blocks() -> None:
    half, usual = resolved({"kind": "vllm", "gpu_memory_utilization": 0.5}), resolved()
    tokens = [supply.replicas[0].kv_tokens_max or 0 for supply in (half, usual)]
    assert all(n % 16 == 0 for n in tokens)
    assert (tokens[1] - tokens[0]) * 131_072 == pytest.approx(0.4 * 80 * 2**30, rel=0.001)


def test_a_replica_has_several_cards() -> None:
    supply = resolved({"kind": "vllm", "tensor_parallel_size": 4}, model="llama-3-70b", count=8,
                      replicas=[{"model": "chat", "count": 2}])  # fmt: skip
    assert [r.tensor_parallel for r in supply.replicas] == [4, 4]
    assert [r.slice.gpu_index for r in supply.replicas] == [0, 4]


PROBLEMS: list[tuple[dict[str, Any], str, str]] = [
    ({"engine": "vlm"}, "deployment.engine", "(got 'vlm'); allowed: gpuplan, vllm"),
    ({"engine": {}}, "deployment.engine.kind", "missing"),
    ({"engine": {"kind": "vllm", "max_num_seq": 1}}, "deployment.engine.max_num_seq", "unknown key; allowed: async_"),
    ({"engine": {"kind": "vllm", "max_num_seqs": 0}}, "deployment.engine.max_num_seqs", "allowed: int >= 1"),
    (
        {"engine": {"kind": "vllm", "gpu_memory_utilization": 90}},
        "deployment.engine.gpu_memory_utilization",
        "(got 90); allowed: float <= 1",
    ),
    ({"gpu": "cpu"}, "deployment.engine", "vllm is emulated on a GPU, and this is a CPU"),
    ({"model": "llama-3-70b"}, "deployment.replicas[0].slice", "does not fit: each card needs 132"),
    (
        {"engine": {"kind": "vllm", "tensor_parallel_size": 4}},
        "deployment.engine.tensor_parallel_size",
        "chat finds 1 whole card(s) left (got 4); allowed: a deployment.count",
    ),
    (
        {"engine": {"kind": "vllm", "tensor_parallel_size": 3}, "count": 3},
        "deployment.engine.tensor_parallel_size",
        "must divide llama-3-8b's 32 attention heads (got 3)",
    ),
    (
        {"engine": {"kind": "vllm", "tensor_parallel_size": 2}, "mig": ["3g.40gb", "3g.40gb"]},
        "deployment.engine.tensor_parallel_size",
        "needs whole cards",
    ),
    (
        {"batching": {"chat": {"max_batch_size": 8}}},
        "deployment.batching.chat",
        "vllm has limits of its own; allowed: deployment.engine.max_num_seqs",
    ),
    (
        {"replicas": [{"model": "chat", "kv_cache_tokens": 99}]},
        "deployment.replicas[0].kv_cache_tokens",
        "vllm has its own (got 99); allowed: leave it out",
    ),
    ({"prefix": {"tokens": 101}}, "traffic[0].shared_prefix.tokens", "longer than the prompts (got 101); allowed: at"),
    ({"prefix": {"tokens": 0}}, "traffic[0].shared_prefix.tokens", "allowed: int >= 1"),
    ({"prefix": {"tokens": 9, "share": 0}}, "traffic[0].shared_prefix.share", "allowed: float > 0"),
]


@pytest.mark.parametrize(("changes", "key", "said"), PROBLEMS)
def test_what_cannot_be_is_said_with_key_value_and_what_is_allowed(
    changes: dict[str, Any], key: str, said: str
) -> None:
    with pytest.raises(InputError) as caught:
        resolved(**changes)
    assert caught.value.key == key
    assert said in str(caught.value)


def test_a_built_in_decoder_is_not_vllm_s(tmp_path: Path) -> None:
    own = data()
    own["models"] = {"chat": {"builtin": "tiny-chat"}}
    with pytest.raises(InputError, match="chat is served by gpuplan's own engine"):
        files.check(files.build(own, Scenario))


def test_a_model_without_a_cache_has_no_prefix() -> None:
    own = data("gpuplan", model="bert-base", prefix={"tokens": 9})
    del own["traffic"][0]["output_tokens"]
    with pytest.raises(InputError, match="chat keeps nothing of a prompt"):
        files.check(files.build(own, Scenario))


# --- prompts that begin alike -------------------------------------------------------------------------------------


def requests(prefix: dict[str, Any] | None) -> tuple[ScheduledRequest, ...]:
    return build_schedule(files.build(data(prefix=prefix), Scenario)).requests


def test_prompts_begin_as_their_group_does() -> None:
    spans = [r.spans for r in requests({"tokens": 30, "groups": 3})]
    assert set(spans) == {((f"talk/{i}", 30),) for i in range(3)}


def test_prompts_come_again() -> None:
    spans = {r.spans for r in requests({"tokens": 30, "groups": 2, "prompts_per_group": 2})}
    assert spans == {((f"talk/{g}", 30), (f"talk/{g}/{p}", 70)) for g in range(2) for p in range(2)}


def test_a_share_of_them_has_none_and_a_prompt_that_is_all_prefix_has_no_rest() -> None:
    some = [r.spans for r in requests({"tokens": 100, "prompts_per_group": 2, "share": 0.25})]
    assert set(some) == {(), (("talk/0", 100),)}
    assert sum(map(bool, some)) / len(some) == pytest.approx(0.25, abs=0.05)


def test_a_prefix_changes_nothing_else() -> None:
    plain = [(r.scheduled_s, r.prompt_tokens, r.output_tokens) for r in requests(None)]
    assert plain == [(r.scheduled_s, r.prompt_tokens, r.output_tokens) for r in requests({"tokens": 9, "groups": 4})]
