"""The main job as a user runs it, and what is kept when something breaks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpuplan.policy.core import ServingCore
from gpuplan.policy.vocabulary import Decision
from gpuplan.record import store
from gpuplan.scenario import deployment, files

from .conftest import ROOT, SHORT, command, gpuplan, one_error_line

pytestmark = pytest.mark.slow

FILES = {
    "run.json",
    "requests.parquet",
    "batches.parquet",
    "telemetry.parquet",
    "decisions.jsonl",
    "summary.json",
    "report.html",
}


def load(file: Path) -> Any:
    return json.loads(file.read_bytes())


def test_the_main_job_against_a_server_of_its_own(short: Path, tmp_path: Path) -> None:
    import msgspec

    run = tmp_path / "run"
    done = gpuplan("bench", short, "--out", run)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in run.iterdir()} == FILES | {"plan.json"}
    assert str(run / "report.html") in done.stdout
    summary, plan, meta = (load(run / name) for name in ("summary.json", "plan.json", "run.json"))
    assert summary["overall"]["completed"] == summary["overall"]["requests"] > 40
    assert summary["classes"]["chatter"]["ttft_ms"]["p50"] > 5
    assert summary["telemetry"]["source"] == "emulated"
    assert meta["provenance"] == {"chat": "emulated", "mood": "emulated"}
    assert plan["mig"]["layouts"][0]["gpu"] == "h100-80gb"
    record = store.read(run)
    served = record.requests
    assert (served["scheduled_s"] <= served["sent_s"]).all()
    assert (served["arrived_s"] >= served["sent_s"]).all(), "one clock on both sides"
    assert (served["done_s"] >= served["finished_s"]).all()
    # The decision log replays: a fresh core fed the same events takes the same actions.
    core = ServingCore(deployment.resolve(files.from_builtins(meta["scenario"])))
    decisions = [msgspec.json.decode(line, type=Decision) for line in record.decisions]
    assert len(decisions) > 100
    for decision in decisions:
        assert core.handle(decision.event, now_s=decision.at_s) == decision.actions


def test_in_process_gives_the_same_files(short: Path, tmp_path: Path) -> None:
    done = gpuplan("bench", short, "--target", "in-process", "--out", tmp_path / "run", "--no-plan", "--json")
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "run").iterdir()} == FILES
    assert json.loads(done.stdout)["summary"]["overall"]["completed"] > 40


def test_onnx_on_the_cpu_is_measured_on_the_cpu(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = gpuplan("bench", ROOT / "scenarios/onnx-cpu.yaml", "--duration", "3s", "--out", run)
    assert done.returncode == 0, done.stderr
    meta, plan = load(run / "run.json"), load(run / "plan.json")
    assert meta["provenance"] == {"sentiment": "cpu"}
    assert "CPUExecutionProvider" in meta["engines"]["sentiment"]
    assert meta["telemetry_source"] == "none"
    assert plan["mig"]["layouts"] == []
    assert plan["service_times"][0]["basis"] == "fitted"


def test_tokens_generated_on_the_cpu_are_counted_as_the_model_counts_them(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = gpuplan("bench", ROOT / "scenarios/tiny-chat.yaml", "--duration", "4s", "--no-plan", "--out", run)
    assert done.returncode == 0, done.stderr
    summary, meta = load(run / "summary.json"), load(run / "run.json")
    assert meta["provenance"] == {"chat": "cpu", "embed": "cpu"}
    assert summary["overall"]["completed"] == summary["overall"]["requests"]
    record = store.read(run)
    asked = record.requests[record.requests["model"] == "chat"]
    steps = record.batches[record.batches["model"] == "chat"]
    assert (asked["tokens"] == asked["output_tokens"]).all()
    assert steps["prefill_tokens"].sum() == asked["prompt_tokens"].sum(), "a token is a byte, not a word"
    assert steps["samples"].sum() == asked["output_tokens"].sum()


def test_somebody_elses_server_is_measured_by_url(short: Path, tmp_path: Path) -> None:
    server = subprocess.Popen(command("serve", short, "--port", "0", "--json"), stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["url"]
        for api in ("openai-completions", "openai-chat"):
            run = tmp_path / api
            done = gpuplan("bench", short, "--target", url, "--api", api, "--out", run, "--no-plan")
            assert done.returncode == 0, done.stderr
            summary, meta = load(run / "summary.json"), load(run / "run.json")
            assert summary["overall"]["completed"] == summary["overall"]["requests"]
            assert set(meta["provenance"].values()) == {"remote"}
            assert summary["overall"]["queue_ms"]["p50"] is None, "a server that tells nothing of its queue"
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0, "SIGTERM drains and ends well"


def started(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )


def test_ctrl_c_keeps_and_reports_what_was_measured(short: Path, tmp_path: Path) -> None:
    short.write_text(SHORT.replace("duration: 2s", "duration: 60s"))
    run = tmp_path / "run"
    bench = started(command("bench", short, "--out", run, "--no-plan"))
    time.sleep(5)
    bench.send_signal(signal.SIGINT)
    _, err = bench.communicate(timeout=30)
    assert bench.returncode == 0, err
    assert "Traceback" not in err
    meta, summary = load(run / "run.json"), load(run / "summary.json")
    assert meta["interrupted"]
    assert meta["measured_s"] < 30
    assert 10 < summary["overall"]["completed"] < 400
    assert (run / "report.html").stat().st_size > 10_000


def children_of(pid: int) -> list[int]:
    return [int(p) for t in Path(f"/proc/{pid}/task").iterdir() for p in (t / "children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the server through /proc")
def test_a_server_that_dies_ends_in_errors_that_are_reported(short: Path, tmp_path: Path) -> None:
    short.write_text(SHORT.replace("duration: 2s", "duration: 6s"))
    run = tmp_path / "run"
    bench = started(command("bench", short, "--out", run, "--no-plan"))
    time.sleep(5)
    (server,) = children_of(bench.pid)
    os.kill(server, signal.SIGKILL)
    _, err = bench.communicate(timeout=60)
    assert bench.returncode == 1
    assert "the server process ended by itself with exit code -9" in err
    assert "Traceback" not in err
    errors = load(run / "summary.json")["overall"]["errors"]
    assert errors.get("connect", 0) > 5, "every later request is an error of its own"
    assert (run / "report.html").exists()


def test_a_port_in_use_is_said_so(short: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = gpuplan("serve", short, "--port", taken.getsockname()[1])
    assert done.returncode == 2
    assert "cannot listen there: Address already in use" in one_error_line(done)


@contextlib.contextmanager
def streaming(scenario: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A server with a client that reads a stream of many seconds."""
    server = started(command("serve", scenario, "--port", "0", "--json", *options))
    assert server.stdout is not None
    port = int(json.loads(server.stdout.readline())["url"].rsplit(":", 1)[1])
    body = b'{"model": "chat", "prompt": "x", "max_tokens": 4000, "stream": true}'
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert b"200 OK" in client.recv(1000)
        try:
            yield server
        finally:
            server.kill()
            server.communicate()


def test_a_drain_waits_for_streams_until_a_second_signal(short: Path) -> None:
    with streaming(short) as server:
        server.send_signal(signal.SIGTERM)
        time.sleep(1)
        assert server.poll() is None, "it waits for the stream"
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) is not None


def test_a_drain_ends_at_its_timeout(short: Path) -> None:
    with streaming(short, "--drain-timeout", "0.5") as server:
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 0
