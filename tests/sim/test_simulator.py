"""The simulator against queueing theory, against itself, and against the clock."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from pandas.testing import assert_frame_equal

from gpuplan.hardware.roofline import StepLoad
from gpuplan.record.run import Run
from gpuplan.record.summary import summarize
from gpuplan.scenario import deployment, files
from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.schedule import build_schedule
from gpuplan.sim.service_times import Fit, ServiceTimes
from gpuplan.sim.simulator import simulate
from tests.conftest import REPOSITORY, single_step

SERVICE_S = 0.010


def fixed(ratios: tuple[float, ...] = (), *, model: str = "mood") -> ServiceTimes:
    """Every step takes `SERVICE_S`, times one of the ratios."""
    return ServiceTimes({(model, "whole"): Fit(SERVICE_S, 0.0, 0.0, 0.0, ratios, 100, 0.0)})


def queue(
    load: float, requests: int, *, servers: int = 1, ratios: tuple[float, ...] = (), keep_rows: bool = False
) -> Run:
    """Poisson arrivals at `load` of what `servers` replicas can do, one request a step."""
    rate = load * servers / SERVICE_S
    data = single_step(
        seed=4,
        duration=requests / rate,
        deployment={
            "gpu": "a100-80gb",
            "count": servers,
            "replicas": [{"model": "mood", "count": servers}],
            "batching": {"mood": {"max_batch_size": 1, "max_queue_size": 1_000_000}},
        },
    )
    data["traffic"][0]["arrivals"]["rate"] = rate
    scenario = files.build(data, Scenario)
    supply = deployment.resolve(scenario)
    schedule = build_schedule(scenario)
    return simulate(scenario, supply, schedule, fixed(ratios), keep_telemetry=False, keep_rows=keep_rows)


def mean_wait_s(run: Run) -> float:
    return float((run.requests["started_s"] - run.requests["arrived_s"]).mean())


@pytest.mark.parametrize(
    ("load", "requests"),
    [
        (0.3, 30_000),
        (0.6, 200_000),  # closer to full, waits vary more and need more requests
    ],
)
def test_one_server_with_fixed_times_waits_as_m_d_1(load: float, requests: int) -> None:
    """Pollaczek-Khinchine without variance: W = rho s / (2 (1 - rho)). Kleinrock, Queueing Systems I, 1975."""
    expected_s = load * SERVICE_S / (2 * (1 - load))
    assert mean_wait_s(queue(load, requests)) == pytest.approx(expected_s, rel=0.02)


def test_one_server_with_varying_times_waits_as_m_g_1() -> None:
    """Two equally likely times, s/2 and 3s/2: W = lambda E[S^2] / (2 (1 - rho)), E[S^2] = 1.25 s^2."""
    load = 0.5
    expected_s = load / SERVICE_S * 1.25 * SERVICE_S**2 / (2 * (1 - load))
    assert mean_wait_s(queue(load, 150_000, ratios=(0.5, 1.5))) == pytest.approx(expected_s, rel=0.02)


def test_three_servers_with_nearly_exponential_times_wait_as_m_m_3() -> None:
    """Erlang C; the times are the 200 middle quantiles of an exponential, rescaled to its mean."""
    servers, load = 3, 0.7
    quantiles = np.array([-math.log(1 - (i + 0.5) / 200) for i in range(200)])
    ratios = tuple((quantiles / quantiles.mean()).tolist())
    offered = servers * load
    tail = offered**servers / math.factorial(servers) / (1 - load)
    waits = tail / (sum(offered**k / math.factorial(k) for k in range(servers)) + tail)
    expected_s = waits * SERVICE_S / (servers * (1 - load))
    assert mean_wait_s(queue(load, 150_000, servers=servers, ratios=ratios)) == pytest.approx(expected_s, rel=0.02)


def test_full_batches_at_saturation() -> None:
    """More wait than fit: every step carries `max_batch_size`, and they are answered at that rate."""
    size, requests = 8, 20_000
    data = single_step(
        seed=4,
        duration=10.0,
        deployment={
            "gpu": "a100-80gb",
            "replicas": [{"model": "mood"}],
            "batching": {"mood": {"max_batch_size": size, "max_queue_size": 1_000_000}},
        },
    )
    data["traffic"][0]["arrivals"]["rate"] = requests / 10.0
    scenario = files.build(data, Scenario)
    run = simulate(scenario, deployment.resolve(scenario), build_schedule(scenario), fixed(), keep_rows=False)
    done_s = np.sort(run.requests["done_s"].to_numpy(dtype=float))
    half = len(done_s) // 2
    rate = half / (done_s[-1] - done_s[-1 - half])
    assert rate == pytest.approx(size / SERVICE_S, rel=0.001)
    assert run.steps is not None and run.steps["mood"].by_size[size] >= len(done_s) // size - 2
    assert run.steps["mood"].busy_s == pytest.approx(run.steps["mood"].steps * SERVICE_S)


@pytest.mark.parametrize("keep_rows", [True, False])
def test_a_decoder_alone_takes_its_prompt_and_its_tokens(keep_rows: bool) -> None:
    """One request at a time: TTFT is the prompt's step, and a step for each token more."""
    told = {
        "name": "alone",
        "duration": 100.0,
        "models": {"chat": {"emulate": "llama-3-8b"}},
        "traffic": [
            {
                "name": "chat",
                "model": "chat",
                "arrivals": {"process": "constant", "rate": 0.1},
                "prompt_tokens": 300,
                "output_tokens": 200,
            }
        ],
        "deployment": {"gpu": "a100-80gb", "replicas": [{"model": "chat"}]},
    }
    scenario = files.build(told, Scenario)
    supply = deployment.resolve(scenario)
    step_s = ServiceTimes({}).timer(supply, supply.replicas[0])
    run = simulate(scenario, supply, build_schedule(scenario), ServiceTimes({}), keep_rows=keep_rows)
    ttft_s = run.requests["first_token_s"] - run.requests["scheduled_s"]
    e2el_s = run.requests["done_s"] - run.requests["scheduled_s"]
    prompt_s = step_s(StepLoad.of_prompt(300))
    decode_s = sum(step_s(StepLoad.of_decodes(1, 300 + emitted)) for emitted in range(1, 200))
    np.testing.assert_allclose(ttft_s, prompt_s)
    np.testing.assert_allclose(e2el_s, prompt_s + decode_s)


def test_no_server_rests_while_a_request_waits() -> None:
    """A request starts when it arrives, or at the very moment when a step ends."""
    run = queue(0.9, 5_000, servers=2, keep_rows=True)
    ends = set(run.batches["done_s"])
    waited = run.requests[run.requests["started_s"] > run.requests["arrived_s"]]
    assert len(waited) > 1_000
    assert set(waited["started_s"]) <= ends
    assert (run.requests["status"] == "completed").all()
    assert len(run.batches) == len(run.requests)
    np.testing.assert_allclose(run.batches["done_s"] - run.batches["started_s"], SERVICE_S)
    for _, steps in run.batches.groupby("replica"):
        assert (steps["started_s"].to_numpy()[1:] >= steps["done_s"].to_numpy()[:-1]).all(), "one step at a time"


@pytest.fixture(scope="module")
def quickstart() -> Scenario:
    return files.load(REPOSITORY / "scenarios" / "quickstart.yaml")


def run(scenario: Scenario, times: ServiceTimes | None = None, seed: int = 0) -> Run:
    return simulate(
        scenario, deployment.resolve(scenario), build_schedule(scenario), times or ServiceTimes({}), seed=seed
    )


def test_same_seed_same_rows(quickstart: Scenario) -> None:
    times = ServiceTimes({("assistant", "3g.40gb"): Fit(0.0, 1.0, 0.0, 0.0, (0.9, 1.0, 1.1), 100, 0.05)})
    first, second, other = (run(quickstart, times, seed) for seed in (1, 1, 2))
    for name in ("requests", "batches", "telemetry"):
        assert_frame_equal(getattr(first, name), getattr(second, name))
    assert not first.batches["done_s"].equals(other.batches["done_s"]), "another seed draws other times"


def test_the_quickstart_takes_less_than_a_second(quickstart: Scenario) -> None:
    def seconds() -> float:
        began_s = time.process_time()
        run(quickstart)
        return time.process_time() - began_s

    assert min(seconds() for _ in range(3)) < 1.0


def test_tokens_come_in_order_and_none_is_lost(quickstart: Scenario) -> None:
    requests = run(quickstart).requests
    done = requests[requests["status"] == "completed"]
    streamed = done[done["model"] == "assistant"]
    assert len(done) == len(requests)
    assert (streamed["tokens"] == streamed["output_tokens"]).all()
    assert [len(gaps) for gaps in streamed["gaps_ms"]] == [n - 1 for n in streamed["tokens"]]
    assert all(gap > 0 for gaps in streamed["gaps_ms"] for gap in gaps)
    assert (streamed["scheduled_s"] < streamed["first_token_s"]).all()
    span_ms = (streamed["done_s"] - streamed["first_token_s"]) * 1e3
    np.testing.assert_allclose(span_ms, [sum(gaps) for gaps in streamed["gaps_ms"]], atol=1e-6)


def test_the_way_there_and_back_counts_for_the_client() -> None:
    scenario = files.build(single_step(duration=1.0), Scenario)
    near = summarize(run(scenario, fixed()))["overall"]["e2el_ms"]["p50"]
    far_times = ServiceTimes(fixed().fits, uplink_s=(0.020,), downlink_s=(0.030,))
    far = summarize(run(scenario, far_times))["overall"]["e2el_ms"]["p50"]
    assert far - near == pytest.approx(50)


def test_what_is_refused_says_why() -> None:
    data = single_step(deployment={"gpu": "a100-80gb", "replicas": [{"model": "mood"}]})
    data["deployment"]["batching"] = {"mood": {"max_batch_size": 1, "max_queue_size": 1}}
    data["traffic"][0]["arrivals"]["rate"] = 300
    figures = summarize(run(files.build(data, Scenario), fixed()))["overall"]
    assert figures["rejected"] > figures["completed"] > 0
    assert figures["errors"] == {}
    assert figures["completed"] == pytest.approx(10.0 / SERVICE_S, rel=0.02), "it works to the limit all the same"


def test_a_request_longer_than_the_kv_cache_is_an_error_and_no_overload() -> None:
    """Mistral's window is 32,768 tokens; beside its weights a 16 GiB slice keeps about 11,000."""
    long = {
        "name": "long",
        "model": "chat",
        "arrivals": {"process": "constant", "rate": 1},
        "prompt_tokens": 20_000,
        "output_tokens": 10,
    }
    card = {"gpu": "h200", "mig": ["1g.18gb"], "replicas": [{"model": "chat", "slice": "1g.18gb"}]}
    data = single_step(models={"chat": {"emulate": "mistral-7b"}}, traffic=[long], deployment=card)
    figures = summarize(run(files.build(data, Scenario)))["overall"]
    assert (figures["errors"], figures["rejected"]) == ({"too_long": 10}, 0)


def test_a_batch_that_a_slice_has_no_memory_for_is_split_and_the_next_are_smaller() -> None:
    """Activations of 32 prompts of 100,000 tokens are more than a 1g slice has; of one they are not."""
    long = {"name": "long", "model": "mood", "arrivals": {"process": "constant", "rate": 4}, "prompt_tokens": 100_000}
    card = {"gpu": "a100-80gb", "mig": ["1g.10gb"], "replicas": [{"model": "mood", "slice": "1g.10gb"}]}
    window = {"layers": 12, "hidden": 768, "heads": 12, "ffn": 3072, "vocabulary": 30522, "context_tokens_max": 200_000}
    shape = {"shape": {**window, "role": "classifier", "gated_ffn": False}}
    figures = []
    for size in (1, 32):
        batching = {"mood": {"max_batch_size": size, "max_queue_delay": 30.0}}
        data = single_step(models={"mood": shape}, traffic=[long], deployment={**card, "batching": batching})
        figures.append(run(files.build(data, Scenario)))
    alone, batched = figures
    assert not alone.batches["failed"].any()
    failed = batched.batches["failed"].astype(bool)
    assert failed.any() and batched.batches["batch_size"][~failed].max() < batched.batches["batch_size"][failed].min()
    assert (batched.requests["status"] == "completed").all()


def test_a_request_that_fits_no_memory_is_an_error_of_the_server() -> None:
    long = {"name": "long", "model": "mood", "arrivals": {"process": "constant", "rate": 1}, "prompt_tokens": 900_000}
    card = {"gpu": "a100-80gb", "mig": ["1g.10gb"], "replicas": [{"model": "mood", "slice": "1g.10gb"}]}
    window = {"layers": 1, "hidden": 768, "heads": 12, "ffn": 3072, "vocabulary": 30522, "context_tokens_max": 10**6}
    shape = {"shape": {**window, "role": "classifier", "gated_ffn": False}}
    requests = run(files.build(single_step(models={"mood": shape}, traffic=[long], deployment=card), Scenario)).requests
    assert set(requests["error"]) == {"out_of_memory"} and set(requests["http_status"]) == {503}


def test_emulated_steps_say_how_far_off_they_may_be() -> None:
    scenario = files.build(single_step(), Scenario)
    said = "estimates from measurements of ampere cards; where checked, off by 6 % on average"
    assert run(scenario).meta.notes == [f"mood on whole: emulated steps: {said}"]
    assert run(scenario, fixed()).meta.notes == [], "fitted times have an error of their own"


def test_steps_of_a_mixture_are_said_to_be_further_off() -> None:
    window = {"layers": 1, "hidden": 768, "heads": 12, "ffn": 768, "vocabulary": 30522, "context_tokens_max": 4096}
    shape = {"shape": {**window, "role": "classifier", "experts": 8, "experts_per_token": 2}}
    (note,) = run(files.build(single_step(models={"mood": shape}), Scenario)).meta.notes
    assert "for mixtures of experts from their kernels" in note and "off by 16.2 %" in note


def test_processes_share_a_slice_and_its_memory() -> None:
    card = {"gpu": "a100-80gb", "mig": ["3g.40gb"]}
    alone, shared = (
        deployment.resolve(
            files.build(
                single_step(
                    models={"mood": {"emulate": "phi-2"}},
                    traffic=[],
                    deployment={**card, "replicas": [{"model": "mood", "slice": "3g.40gb", "processes": n}]},
                ),
                Scenario,
            )
        )
        for n in (1, 3)
    )
    assert [r.id for r in shared.replicas] == ["mood-0", "mood-1", "mood-2"]
    assert len({r.slice for r in shared.replicas}) == 1
    assert 3 * (shared.replicas[0].kv_tokens_max or 0) < (alone.replicas[0].kv_tokens_max or 0)


def test_a_scenario_without_traffic_gives_an_empty_run() -> None:
    empty = run(files.build(single_step(traffic=[]), Scenario))
    assert (len(empty.requests), len(empty.batches)) == (0, 0)
    assert empty.meta.measured_s == 10.0


def test_what_nobody_confirmed_of_a_card_is_said_of_its_runs() -> None:
    card = {"gpu": "h100-pcie", "mig": ["3g.40gb"], "replicas": [{"model": "mood", "slice": "3g.40gb"}]}
    noted = run(files.build(single_step(deployment=card), Scenario)).meta.notes
    assert "h100-80gb-pcie 3g.40gb: SMs, memory, places assumed, not confirmed" in noted


def test_a_client_that_hangs_up_frees_its_place() -> None:
    """Of requests that take 0.4 s in a stream, all hang up after 0.1 s: each has some tokens and no end."""
    talk = {
        "name": "talk",
        "model": "chat",
        "arrivals": {"process": "constant", "rate": 2},
        "prompt_tokens": 10,
        "output_tokens": 100,
        "abandon": {"share": 1.0, "after": 0.1},
    }
    card = {"gpu": "a100-80gb", "replicas": [{"model": "chat"}], "batching": {"chat": {"max_batch_size": 1}}}
    data = single_step(models={"chat": {"emulate": "llama-3-8b"}}, traffic=[talk], deployment=card)
    requests = run(files.build(data, Scenario)).requests
    assert set(requests["status"]) == {"error"} and set(requests["error"]) == {"abandoned"}
    assert (requests["done_s"] - requests["scheduled_s"]).to_numpy() == pytest.approx(0.1)
    assert requests["tokens"].between(1, 20).all()
    assert (requests["started_s"] == requests["scheduled_s"]).all(), "the place is free for the next one"


def test_replicas_come_with_the_load_and_go_with_it() -> None:
    done = run(files.load(REPOSITORY / "scenarios" / "autoscale.yaml"))
    began = done.batches.groupby("replica")["started_s"].min()
    assert sorted(began.index) == ["chat-0", "chat-1", "chat-2", "chat-3"]
    assert began["chat-0"] < 1 < began[["chat-1", "chat-2", "chat-3"]].min(), "the others came later"
    ended = done.batches.groupby("replica")["done_s"].max().sort_values()
    assert ended.iloc[0] < ended.iloc[-1] - 3, "and not all of them stayed"
