"""What the numbers mean, on tables small enough to work out by hand."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from gpuplan.record import summary
from gpuplan.record.recorder import Answer, Sample, ServerRows, assemble, frame
from gpuplan.record.run import BATCH_COLUMNS, SERVED_COLUMNS, TELEMETRY_COLUMNS, Run, RunMeta
from gpuplan.record.summary import summarize, worst_margin
from gpuplan.scenario import deployment as supply
from gpuplan.scenario import files
from gpuplan.scenario.demand import ReplicaSpec, Scenario
from tests.conftest import single_step


def scenario(slo: dict[str, Any], *, warmup: float = 0.0) -> Scenario:
    """A decoder under one class, `talk`; the requests are made by hand."""
    talk = {
        "name": "talk",
        "model": "chat",
        "arrivals": {"process": "poisson", "rate": 1},
        "prompt_tokens": 10,
        "output_tokens": 10,
        "slo": slo,
    }
    deployment = {"gpu": "h100-80gb"}
    data = single_step(models={"chat": {"emulate": "llama-3-8b"}}, traffic=[talk], deployment=deployment, warmup=warmup)
    built = files.build(data, Scenario)
    files.check(built)
    return built


def answer(
    request_id: int,
    at_s: float,
    *,
    sent: float = 0.0,
    first: float = 0.0,
    last: float = 0.0,
    tokens: int = 0,
    **more: Any,
) -> Answer:
    """A request scheduled at `at_s`; `sent`, `first` and `last` are seconds after that."""
    status = more.setdefault("status", "completed")
    done = status == "completed"
    return Answer(
        **{"traffic_class": "talk", "model": "chat", "warmup": False, "prompt_tokens": 10, "output_tokens": 10, **more},
        request_id=request_id,
        scheduled_s=at_s,
        sent_s=at_s + sent,
        first_token_s=at_s + first if done and tokens else None,
        done_s=at_s + last,
        tokens=tokens,
    )  # fmt: skip


def run_of(
    answers: list[Answer], asked: Scenario, *, server: ServerRows | None = None, measured_s: float = 10.0
) -> Run:
    meta = RunMeta(
        name="hand",
        source="bench",
        scenario=files.to_builtins(asked),
        deployment=supply.describe(supply.resolve(asked)),
        seed=0,
        started_at="2025-01-01T00:00:00+00:00",
        duration_s=10.0,
        measured_s=measured_s,
        target="local",
        provenance={"chat": "emulated"},
    )
    return Run(meta, *assemble(answers, server))


LENIENT = {"ttft_ms": {"p95": 1e6}}


def test_latencies_count_from_the_schedule() -> None:
    """A generator that stalled for 1 s cannot hide it; the figure from the sent time stands beside."""
    figures = summarize(run_of([answer(1, 2.0, sent=1.0, first=1.5, last=3.5, tokens=5)], scenario(LENIENT)))["overall"]
    assert figures["ttft_ms"]["p50"] == pytest.approx(1500)
    assert figures["e2el_ms"]["p50"] == pytest.approx(3500)
    assert figures["ttft_from_sent_ms"]["p50"] == pytest.approx(500)
    assert figures["e2el_from_sent_ms"]["p50"] == pytest.approx(2500)
    assert figures["send_lag_ms"]["max"] == pytest.approx(1000)
    assert figures["tpot_ms"]["p50"] == pytest.approx(2000 / 4), "(E2EL - TTFT) / (tokens - 1)"


def test_one_token_has_no_time_per_output_token() -> None:
    answers = [answer(1, 0, first=0.1, last=0.1, tokens=1), answer(2, 1, first=0.1, last=0.4, tokens=4)]
    figures = summarize(run_of(answers, scenario(LENIENT)))["overall"]
    assert figures["tpot_ms"]["mean"] == pytest.approx(100)
    assert figures["ttft_ms"]["mean"] == pytest.approx(100)


def test_percentiles_are_interpolated_linearly() -> None:
    """Of 0, 100, ..., 1000 ms: rank (n - 1) q, as NumPy's default and vLLM's bench serve."""
    answers = [answer(i, 0, first=i / 10, last=i / 10, tokens=2) for i in range(11)]
    found = summarize(run_of(answers, scenario(LENIENT)))["overall"]["ttft_ms"]
    expected = {"mean": 500, "p50": 500, "p90": 900, "p95": 950, "p99": 990, "p999": 999, "max": 1000}
    assert found == pytest.approx(expected)


def test_inter_token_latency_is_pooled_over_all_gaps() -> None:
    answers = [
        answer(1, 0, first=0.1, last=0.2, tokens=2, gaps_ms=[100.0]),
        answer(2, 0, first=0.1, last=0.4, tokens=4, gaps_ms=[10.0, 10.0, 10.0], merged_tokens=3),
        answer(3, 0, status="error", error="timeout", gaps_ms=[9999.0]),  # a failed request's gaps do not count
    ]
    figures = summarize(run_of(answers, scenario(LENIENT)))["overall"]
    assert figures["itl_ms"]["mean"] == pytest.approx(130 / 4)
    assert figures["merged_token_share"] == pytest.approx(3 / 6)


def test_goodput_needs_every_limit_and_counts_what_was_refused_as_missed() -> None:
    asked = scenario({"ttft_ms": {"p50": 100, "p95": 200}, "tpot_ms": {"p95": 50}})
    answers = [
        answer(1, 0, first=0.15, last=0.25, tokens=3),  # good: within the looser of the two percentiles
        answer(2, 1, first=0.30, last=0.31, tokens=3),  # its first token is late
        answer(3, 2, first=0.10, last=0.90, tokens=3),  # its tokens are slow: 400 ms each
        answer(4, 3, first=0.10, last=0.10, tokens=1),  # good: one token has no TPOT to miss
        answer(5, 4, status="rejected", error="queue_full", http_status=429),
        answer(6, 5, status="error", error="timeout"),
        answer(7, 6, status="error", error="timeout"),
        answer(8, 7, status="interrupted", error="interrupted"),  # the run was ended: nobody's fault
    ]
    figures = summarize(run_of(answers, asked))["overall"]
    assert (figures["requests"], figures["completed"], figures["rejected"]) == (7, 4, 1)
    assert figures["errors"] == {"timeout": 2}
    assert figures["slo_attainment"] == pytest.approx(2 / 7)
    assert figures["goodput"] == pytest.approx(2 / 10)
    assert figures["request_throughput"] == pytest.approx(4 / 10)
    assert figures["output_throughput"] == pytest.approx(10 / 10)


def test_the_warm_up_is_left_out_of_requests_and_of_time() -> None:
    answers = [
        answer(1, 1, first=9, last=9, tokens=2, warmup=True),
        answer(2, 5, first=0.1, last=0.2, tokens=2),
        answer(3, 9, first=0.3, last=0.4, tokens=2),
    ]
    run = run_of(answers, scenario(LENIENT, warmup=2.0))
    figures = summarize(run)
    assert figures["measured_s"] == pytest.approx(8.0)
    assert (figures["overall"]["requests"], figures["overall"]["ttft_ms"]["max"]) == (2, pytest.approx(300))
    assert figures["overall"]["request_throughput"] == pytest.approx(2 / 8)
    later = summarize(run, since_s=6.0)
    assert (later["measured_s"], later["overall"]["requests"]) == (pytest.approx(4.0), 1)


def verdicts(slo: dict[str, float], ttfts_s: list[float], lost: int) -> list[bool | None]:
    answers = [answer(i, 0, first=t, last=t, tokens=2) for i, t in enumerate(ttfts_s)]
    answers += [answer(1000 + i, 0, status="rejected", error="queue_full") for i in range(lost)]
    classes = summarize(run_of(answers, scenario({"ttft_ms": slo})))["classes"]
    return [v["met"] for v in classes["talk"]["slos"]]


@pytest.mark.parametrize(
    ("slo", "ttfts_s", "lost", "met"),
    [
        ({"p95": 100}, [0.1] * 100, 0, True),  # exactly at the limit
        ({"p95": 100}, [0.1] * 96 + [9.0] * 4, 0, True),  # 4 % may be slow
        ({"p95": 100}, [0.1] * 90 + [9.0] * 10, 0, False),
        ({"p95": 100}, [0.1] * 96, 4, True),  # 4 % may be lost just as well
        ({"p95": 100}, [0.1] * 94, 6, False),  # 6 % may not, although the completed ones are fast
        ({"p50": 100}, [0.1] * 60 + [9.0] * 40, 0, True),
        ({"p50": 100}, [0.1] * 60 + [9.0] * 10, 30, True),
        ({"p50": 100}, [0.1] * 45 + [9.0] * 25, 30, False),  # 45 % of all that were asked for
        ({"mean": 100}, [0.05] * 100, 0, True),
        ({"mean": 100}, [0.05] * 100, 1, False),  # a mean with one that never came has no value
        ({"max": 100}, [0.05] * 100, 0, True),
        ({"max": 100}, [0.05] * 100, 1, False),
        ({"p95": 100}, [], 3, False),  # nothing completed
        ({"p95": 100}, [], 0, None),  # nothing was asked for
        ({"p50": 100, "p95": 200}, [0.1] * 90 + [0.3] * 10, 0, [True, False]),  # each on its own
    ],
)
def test_an_slo_is_judged_over_all_that_were_asked_for(
    slo: dict[str, float], ttfts_s: list[float], lost: int, met: bool | list[bool] | None
) -> None:
    assert verdicts(slo, ttfts_s, lost) == (met if isinstance(met, list) else [met])


def test_nothing_asked_for_gives_nulls_and_no_failure() -> None:
    figures = summarize(run_of([], scenario(LENIENT)))
    assert figures["overall"]["requests"] == 0
    assert figures["overall"]["slo_attainment"] is None
    assert figures["overall"]["goodput"] == 0.0
    assert set(figures["overall"]["ttft_ms"].values()) == {None}
    assert figures["meets_slos"] is True
    assert figures["telemetry"]["energy_j"] is None
    assert worst_margin(figures) == 0.0


@pytest.mark.parametrize(
    ("ttfts_s", "lost", "low", "high"),
    [
        ([0.05] * 100, 0, 0.5, 0.5),  # half of what is allowed
        ([0.2] * 100, 0, 2.0, 2.0),  # twice as much
        ([0.05] * 50, 50, 1.0, 10.0),  # fast and lost: worse than one that just meets it
    ],
)
def test_the_worst_margin_says_by_how_much(ttfts_s: list[float], lost: int, low: float, high: float) -> None:
    answers = [answer(i, 0, first=t, last=t, tokens=2) for i, t in enumerate(ttfts_s)]
    answers += [answer(1000 + i, 0, status="rejected", error="queue_full") for i in range(lost)]
    margin = worst_margin(summarize(run_of(answers, scenario({"ttft_ms": {"p95": 100}}))))
    assert low - 1e-9 <= margin <= high + 1e-9


# --- what the server tells ----------------------------------------------------------------------------------------


def server_rows(
    served: list[tuple[Any, ...]], batches: list[tuple[Any, ...]] = (), telemetry: list[tuple[Any, ...]] = ()
) -> ServerRows:  # type: ignore[assignment]
    return ServerRows(
        frame(served, SERVED_COLUMNS), frame(batches, BATCH_COLUMNS), frame(telemetry, TELEMETRY_COLUMNS), ()
    )


def test_the_queue_is_what_has_arrived_and_neither_started_nor_ended() -> None:
    served = [
        ("1", "chat-0", 1.0, 1.0, 5.0),  # started at once
        ("2", "chat-0", 2.0, 5.0, 6.0),  # waited 3 s
        ("3", None, 3.0, None, 4.0),  # gave up after 1 s
        ("4", None, 3.5, None, 3.5),  # refused: never in the queue
    ]
    run = run_of(
        [answer(i, float(i), first=1, last=2, tokens=2) for i in (1, 2, 3, 4)],
        scenario(LENIENT),
        server=server_rows(served),
    )
    times = np.array([0.0, 1.5, 2.5, 3.2, 3.5, 4.5, 5.5])
    depth = summary.queue_depth(run.requests, "chat", times)
    assert depth is not None
    assert depth.tolist() == [0, 0, 1, 2, 2, 1, 0]
    assert summary.queue_depth(run.requests, "other", times) is None, "nothing is known, which is not zero"
    assert summarize(run)["overall"]["queue_ms"]["max"] == pytest.approx(3000)


def test_a_server_that_tells_nothing_has_no_queue() -> None:
    run = run_of([answer(1, 0, first=1, last=2, tokens=2)], scenario(LENIENT))
    assert summary.queue_depth(run.requests, "chat", np.array([0.5])) is None
    assert summarize(run)["models"]["chat"]["queue_depth"] is None


def test_steps_and_telemetry() -> None:
    steps = [
        (i, "chat", "chat-0", "gpu0/whole@0", i, i + 0.5, 2 * i, 10, 0, 0, 0, 1, 0, False, None) for i in range(1, 9)
    ]
    readings = [
        Sample(float(t), "emulated", "gpu0", None, 0.5, 1e9 * t, 8e10, 100.0 + t, 100.0 * t) for t in range(11)
    ] + [Sample(5.0, "emulated", "gpu0", "gpu0/whole@0", 0.9, 1.0, 1.0)]  # a slice is not a card
    run = run_of([], scenario(LENIENT, warmup=2.0), server=server_rows([], steps, readings))
    figures = summarize(run)
    model = figures["models"]["chat"]
    assert (model["steps"], model["batch_size"]["max"]) == (7, 16), "the step at 1 s is warm-up"
    assert model["step_ms"]["p50"] == pytest.approx(500)
    assert model["busy"] == pytest.approx(3.5 / 8)
    assert figures["telemetry"]["gpu_utilization"] == {"mean": 0.5, "max": 0.5}
    assert figures["telemetry"]["energy_j"] == pytest.approx(800), "from 2 s to 10 s"
    assert figures["telemetry"]["power_w"]["max"] == pytest.approx(110)


def test_clocks_heat_and_what_held_the_cards_back() -> None:
    """Of four readings that told their reasons two were throttled, one of them twice over; idling holds nobody back."""
    told = ["gpu_idle", "sw_power_cap", "sw_power_cap|hw_thermal_slowdown", "", None]
    readings = [
        Sample(5.0 + i, "nvml", "gpu0", None, sm_clock_mhz=1000.0 + i, temperature_c=60.0 + i, throttle_reasons=reasons)
        for i, reasons in enumerate(told)
    ]
    figures = summarize(run_of([], scenario(LENIENT), server=server_rows([], [], readings)))["telemetry"]
    assert figures["throttled"] == {"share": 0.5, "reasons": {"sw_power_cap": 0.5, "hw_thermal_slowdown": 0.25}}
    assert figures["sm_clock_mhz"] == {"mean": 1002.0, "min": 1000.0, "max": 1004.0}
    assert figures["temperature_c"] == {"mean": 62.0, "max": 64.0}
    assert (figures["gpu_utilization"], figures["memory_utilization"]) == (None, None)


def test_rates_are_no_times_of_the_run() -> None:
    rows = frame([Sample(105.0, "nvml", "gpu0", None, pcie_rx_bytes_per_s=7.0)], TELEMETRY_COLUMNS, 100.0)
    assert (rows["time_s"].tolist(), rows["pcie_rx_bytes_per_s"].tolist()) == ([5.0], [7.0])


def test_a_replica_that_never_ran_was_there_all_the_same() -> None:
    """Two replicas of which one worked half the time were busy for a quarter of it."""
    asked = scenario(LENIENT)
    two = msgspec.structs.replace(
        asked,
        deployment=msgspec.structs.replace(asked.deployment, count=2, replicas=[ReplicaSpec(model="chat", count=2)]),
    )
    steps = [(1, "chat", "chat-0", "gpu0/whole@0", 0.0, 5.0, 1, 10, 0, 0, 0, 1, 0, False, None)]
    figures = summarize(run_of([], two, server=server_rows([], steps)))
    assert figures["models"]["chat"]["busy"] == pytest.approx(0.25)


def test_rates_and_requests_in_flight_over_time() -> None:
    run = run_of([answer(1, 0, first=1, last=2, tokens=2), answer(2, 1, first=1, last=4, tokens=2)], scenario(LENIENT))
    assert summary.in_flight(run.requests, np.array([0.5, 1.5, 3.0, 6.0])).tolist() == [1, 2, 1, 0]
    assert summary.rate_per_s(np.array([0.1, 0.2, 2.5]), np.array([0.0, 1.0, 3.0])).tolist() == [2.0, 0.5]


def test_a_share_that_a_percentile_allows_to_be_lost_is_allowed_exactly() -> None:
    """1 - 0.9 is a little less than 0.1 in binary."""
    assert verdicts({"p90": 100}, [0.05] * 90, 10) == [True]
    assert verdicts({"p90": 100}, [0.05] * 89, 11) == [False]


def test_attainment_counts_all_that_were_asked_for_after_the_warm_up() -> None:
    """Of five after the warm-up one is good: the refused, the timed out, the failed and the late one miss. Some tools
    count the completed ones only, of which half are good."""
    early = [answer(i, 0.5, status="rejected", error="queue_full", warmup=True) for i in range(90, 95)]
    answers = [
        answer(1, 2, first=0.1, last=0.2, tokens=2),
        answer(2, 3, first=0.9, last=1.0, tokens=2),
        answer(3, 4, status="rejected", error="queue_full", http_status=429),
        answer(4, 5, status="error", error="timeout"),
        answer(5, 6, status="error", error="http_500"),
    ]
    figures = summarize(run_of([*early, *answers], scenario({"ttft_ms": {"p95": 500}}, warmup=1.0)))
    for part in (figures["overall"], figures["classes"]["talk"]):
        assert part["requests"] == 5
        assert part["slo_attainment"] == pytest.approx(1 / 5)
        assert part["goodput"] == pytest.approx(1 / 9)
