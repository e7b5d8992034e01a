"""Simulations of a deployment with `engine: vllm`: what its prefix cache, blocks and steps put together ahead do."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
import pytest

from gpuplan.policy.vocabulary import Decision, RunStep
from gpuplan.record import story
from gpuplan.record.run import Run
from gpuplan.scenario import deployment, files
from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.schedule import build_schedule
from gpuplan.sim.service_times import ServiceTimes
from gpuplan.sim.simulator import simulate

PROMPT, OUTPUT = 1600, 50


def run(
    prefix: dict[str, int] | None = None, rate: float = 8.0, prompt: int = PROMPT, output: int = OUTPUT, **engine: Any
) -> Run:
    traffic: dict[str, Any] = {
        "name": "talk",
        "model": "chat",
        "arrivals": {"process": "poisson", "rate": rate},
        "prompt_tokens": prompt,
        "output_tokens": output,
    }
    data = {
        "name": "served",
        "duration": 20.0,
        "models": {"chat": {"emulate": "llama-3-8b"}},
        "traffic": [{**traffic, "shared_prefix": prefix} if prefix else traffic],
        "deployment": {"gpu": "h100", "engine": {"kind": "vllm", **engine}},
    }
    scenario = files.build(data, Scenario)
    files.check(scenario)
    schedule = build_schedule(scenario)
    return simulate(scenario, deployment.resolve(scenario), schedule, ServiceTimes({}), keep_decisions=True)


def ttft_s(run: Run) -> float:
    return float((run.requests["first_token_s"] - run.requests["sent_s"]).mean())


def read(run: Run) -> int:
    return int(run.batches["prefill_tokens"].sum())


def test_a_prefix_cache_reads_what_is_new() -> None:
    plain, shared = run(), run({"tokens": 1504})
    requests = len(plain.requests)
    assert read(plain) == requests * PROMPT
    assert read(shared) == PROMPT + (requests - 1) * (PROMPT - 1504), "1504 tokens are 94 blocks"
    assert ttft_s(shared) < ttft_s(plain) - 0.02
    again = run({"tokens": 100, "prompts_per_group": 5})
    assert read(again) == 5 * PROMPT - 4 * 96 + (requests - 5) * 16, "all blocks but the last, whose answer is needed"
    assert read(run({"tokens": 1504}, enable_prefix_caching=False)) == requests * PROMPT


def test_steps_put_together_ahead_cost_whoever_comes_a_step() -> None:
    ahead, at_once = run(), run(async_scheduling=False)
    step_s = float((at_once.batches["done_s"] - at_once.batches["started_s"]).mean())
    assert ttft_s(ahead) - ttft_s(at_once) == pytest.approx(step_s, rel=0.6)


def test_where_blocks_are_few_some_give_way_and_all_get_their_tokens() -> None:
    tight = run(rate=10.0, prompt=160, output=600, num_gpu_blocks_override=500)
    assert (tight.requests["status"] == "completed").all()
    assert (tight.requests["tokens"] == 600).all()
    assert read(tight) > len(tight.requests) * 160, "some were read again"
    assert not tight.batches["failed"].any()


def test_the_cards_memory_is_taken_when_it_starts() -> None:
    used = run(gpu_memory_utilization=0.8).telemetry["memory_used_bytes"].dropna()
    assert (used == int(0.8 * 80 * 2**30)).all() and len(used)


def test_the_same_seed_gives_the_same_rows() -> None:
    one, other = run({"tokens": 160, "groups": 4}), run({"tokens": 160, "groups": 4})
    assert one.requests.equals(other.requests)


def test_a_story_knows_the_first_token_of_a_prompt_that_was_cached_or_read_again() -> None:
    tight = run({"tokens": 96}, rate=10.0, prompt=160, output=600, num_gpu_blocks_override=500)
    steps = [msgspec.json.decode(line, type=Decision) for line in tight.decisions]
    prefills = [p for d in steps for a in d.actions if isinstance(a, RunStep) for p in a.prefills if p.last]
    (read_again, times), *_ = Counter(p.request_id for p in prefills).most_common(1)
    assert times > 1
    told = story.of_run(tight, read_again, folder="")
    (first,) = (m for m in told.moments if isinstance(m, story.FirstToken))
    (row,) = tight.requests[tight.requests["request_id"] == read_again].itertuples()
    assert first.at_s == pytest.approx(row.first_token_s)
