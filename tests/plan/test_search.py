"""Plans: the document others rely on, and known truths by direction."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gpuplan.errors import RunError
from gpuplan.plan.search import make_plan
from gpuplan.plan.trials import _spec_of
from gpuplan.record import store, summary
from gpuplan.record.run import Run
from gpuplan.scenario import deployment, files
from gpuplan.scenario.demand import DeploymentSpec

from .conftest import scenario, simulated


@pytest.fixture(scope="module")
def plan(run: Run) -> dict[str, Any]:
    return make_plan(run)


def test_a_plan_has_the_keys_that_others_rely_on(plan: dict[str, Any]) -> None:
    wanted = {
        "gpus_needed", "fleet", "cost_per_hour", "lower_bound_cost_per_hour", "optimality_gap", "proven_optimal", "mig",
        "replicas", "batching", "autoscale", "predicted", "backtest", "alternatives",
    }  # fmt: skip
    assert wanted <= set(plan)
    assert set(plan["batching"]) == set(plan["autoscale"]) == {"mood", "chat"}
    assert {"metric", "scale_up_at", "scale_down_at", "cooldown_s", "stabilization_window_s", "min_replicas",
            "max_replicas"} <= set(plan["autoscale"]["chat"])  # fmt: skip
    json.dumps(plan, allow_nan=False)


def test_the_plan_can_be_built_as_it_stands_and_meets_its_slos(plan: dict[str, Any], run: Run) -> None:
    (layout,) = plan["mig"]["layouts"]
    cut = [] if layout["profiles"] == ["whole"] else layout["profiles"]
    replicas = [{k: r[k] for k in ("model", "slice", "count")} for r in plan["replicas"]]
    batching = {
        name: {"max_batch_size": b["max_batch_size"], "max_queue_delay": b["max_queue_delay_ms"] / 1e3,
               "max_queue_size": b["max_queue_size"]}
        for name, b in plan["batching"].items()
    }  # fmt: skip
    asked = scenario(
        duration=60.0, deployment={"gpu": "a100-80gb", "mig": cut, "replicas": replicas, "batching": batching}
    )
    assert isinstance(asked.deployment, DeploymentSpec)
    assert len(deployment.resolve(asked).replicas) == sum(r["count"] for r in plan["replicas"])
    again = summary.summarize(simulated(asked))
    assert plan["meets_slos"]
    assert again["meets_slos"]
    for metric in ("ttft_ms", "e2el_ms"):
        assert again["classes"]["chat"][metric] == pytest.approx(plan["predicted"]["classes"]["chat"][metric])


def test_rules_of_scaling_are_no_part_of_what_is_planned(plan: dict[str, Any]) -> None:
    """All the same scenario, but that `mood` may have one replica more."""
    rules = {"max_gpus": 2, "models": {"mood": {"max_replicas": 2, "slice": "1g.10gb"}}}
    supply = {
        "gpu": "a100-80gb",
        "mig": ["3g.40gb", "1g.10gb", "1g.10gb"],
        "replicas": [{"model": "chat", "slice": "3g.40gb"}, {"model": "mood", "slice": "1g.10gb"}],
        "autoscale": rules,
    }
    scaled = make_plan(simulated(scenario(deployment=supply)))
    for key in ("gpus_needed", "mig", "replicas", "batching"):
        assert scaled[key] == plan[key], key


def test_every_layout_is_accounted_for(plan: dict[str, Any]) -> None:
    named = {tuple(a["profiles"]) for a in plan["alternatives"]} | {tuple(plan["mig"]["layouts"][0]["profiles"])}
    assert len(named) == 29, "28 maximal layouts and the uncut card"
    assert all(a["reason"] for a in plan["alternatives"])
    assert plan["searched"]["layouts_valid"] == 77


def test_a_card_that_must_serve_two_models_is_cut(plan: dict[str, Any]) -> None:
    reasons = {tuple(a["profiles"]): a["reason"] for a in plan["alternatives"]}
    assert "2 models" in reasons[("whole",)]
    assert "memory for chat" in reasons[("1g.10gb",) * 7]
    assert plan["gpus_needed"] == 1
    assert plan["proven_optimal"]
    assert plan["optimality_gap"] == 0


def test_small_models_go_to_small_slices(plan: dict[str, Any]) -> None:
    widths = {p["model"]: p["width"] for p in plan["mig"]["layouts"][0]["placements"] if p["model"]}
    assert widths["mood"] < widths["chat"]


def test_more_load_needs_more_cards() -> None:
    heavy = scenario(
        traffic=[
            {"name": "chat", "model": "chat", "arrivals": {"process": "poisson", "rate": 20}, "prompt_tokens": 900,
             "output_tokens": 60, "slo": {"ttft_ms": {"p95": 1500}, "tpot_ms": {"p95": 70}}},
        ],
        models={"chat": {"emulate": "llama-3-8b"}},
        deployment={"gpu": "a100-80gb", "replicas": [{"model": "chat"}], "autoscale": {"max_gpus": 4}},
        duration=20.0,
    )  # fmt: skip
    plan = make_plan(simulated(heavy))
    assert plan["gpus_needed"] > 1
    assert plan["lower_bound_cost_per_hour"] <= plan["cost_per_hour"]
    assert plan["meets_slos"]
    assert len(plan["mig"]["layouts"][0]["placements"]) >= plan["gpus_needed"]


def test_an_slo_that_no_card_can_meet_is_said_to_be_missed() -> None:
    tight = scenario(
        models={"chat": {"emulate": "llama-3-8b"}},
        traffic=[
            {"name": "chat", "model": "chat", "arrivals": {"process": "constant", "rate": 1}, "prompt_tokens": 100,
             "output_tokens": 20, "slo": {"tpot_ms": {"p95": 1}}},
        ],
        deployment={"gpu": "a100-80gb", "replicas": [{"model": "chat"}], "autoscale": {"max_gpus": 1}},
        duration=10.0,
    )  # fmt: skip
    plan = make_plan(simulated(tight))
    assert not plan["meets_slos"]
    assert not plan["proven_optimal"]
    assert "chat TPOT p95" in plan["verdict"]
    assert any("max_gpus" in note for note in plan["notes"])


def test_a_model_that_was_never_measured_cannot_be_planned(tmp_path: Any) -> None:
    asked = scenario(
        models={"mood": {"builtin": "sentiment"}},
        traffic=[{"name": "m", "model": "mood", "arrivals": {"process": "poisson", "rate": 5}, "prompt_tokens": 9}],
        deployment={"gpu": "cpu"},
    )
    with pytest.raises(RunError, match="measure it first"):
        simulated(asked)


def test_a_plan_survives_the_run_folder(run: Run, plan: dict[str, Any], tmp_path: Any) -> None:
    store.write(run, store.prepare(tmp_path))
    again = make_plan(store.read(tmp_path))
    for key in ("verdict", "replicas", "batching", "autoscale", "alternatives"):
        assert again[key] == plan[key], key


def test_a_model_on_several_cards_has_no_layout_to_search() -> None:
    asked = scenario(
        models={"chat": {"emulate": "llama-3-70b"}},
        traffic=[{"name": "talk", "model": "chat", "arrivals": {"process": "poisson", "rate": 1},
                  "prompt_tokens": 50, "output_tokens": 5}],
        deployment={"gpu": "h100", "count": 2, "engine": {"kind": "vllm", "tensor_parallel_size": 2}},
        duration=5.0,
    )  # fmt: skip
    with pytest.raises(RunError, match="a plan cuts single cards"):
        make_plan(simulated(asked))


@pytest.mark.slow
def test_a_plan_is_the_same_on_all_cores(run: Run, plan: dict[str, Any]) -> None:
    parallel = make_plan(run, workers=2)
    for searched in (parallel["searched"], plan["searched"]):
        del searched["elapsed_s"], searched["simulations"]
    assert parallel == plan


def test_what_is_simulated_for_a_plan_is_the_deployment_as_it_stands() -> None:
    """With an engine that has its own KV cache, and with processes and caches that the file names."""
    vllm = {"gpu": "h100-80gb", "engine": "vllm", "replicas": [{"model": "chat"}]}
    rows = [
        {"model": "chat", "slice": "3g.40gb", "kv_cache_tokens": 5000},
        {"model": "mood", "slice": "1g.10gb", "count": 2, "processes": 3},
        {"model": "mood", "slice": "2g.20gb"},
    ]
    mixed = {"gpu": "a100-80gb", "mig": ["3g.40gb", "2g.20gb", "1g.10gb", "1g.10gb"], "replicas": rows}
    chat = [c for c in files.to_builtins(scenario())["traffic"] if c["name"] == "chat"]
    for asked in (
        scenario(models={"chat": {"emulate": "llama-3-8b"}}, traffic=chat, deployment=vllm),
        scenario(deployment=mixed),
    ):
        built = deployment.build(asked.deployment, asked.models)
        again = deployment.build(_spec_of(built, asked.deployment), asked.models)
        assert again == built
