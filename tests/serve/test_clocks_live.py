"""Clocks that jump under a live server: the wall clock costs nothing, a process that stood still what has a deadline.

Nothing here depends on how fast a machine is: what stands still does so for longer than any deadline in these tests.
"""

from __future__ import annotations

import ast
import asyncio
import itertools
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gpuplan.load.bench import BenchOptions, bench
from gpuplan.scenario import deployment, files
from gpuplan.scenario.demand import Scenario
from gpuplan.scenario.schedule import build_schedule
from tests.cli.conftest import ROOT, command

STAMPS = {
    "gpuplan/cli/common.py",  # the name of a run's folder
    "gpuplan/load/bench.py",  # when the run was started, in run.json
    "gpuplan/serve/http/app.py",  # `created` in OpenAI's answers
    "gpuplan/sim/simulator.py",  # as bench
}
"""Who may read the wall clock, and for which date that is shown to people."""
WALL = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow"), ("date", "today")}


def test_the_wall_clock_is_read_for_dates_that_people_see_and_nothing_else() -> None:
    readers = set()
    for file in sorted((ROOT / "gpuplan").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
                if (owner, node.attr) in WALL:
                    readers.add(str(file.relative_to(ROOT)))
            if isinstance(node, ast.ImportFrom) and node.module == "time":
                readers |= {str(file.relative_to(ROOT)) for name in node.names if name.name in ("time", "time_ns")}
    assert readers == STAMPS


def test_a_wall_clock_that_jumps_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for the date gets one that is years off, now ahead, now behind."""
    years_s = itertools.cycle([1e8, -1e8, 0.0])
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(years_s))
    asked = files.build(
        {
            "name": "dates",
            "duration": 1.5,
            "models": {"chat": {"emulate": "phi-2"}},
            "traffic": [
                {
                    "name": "chat",
                    "model": "chat",
                    "arrivals": {"process": "constant", "rate": 10},
                    "prompt_tokens": 20,
                    "output_tokens": 10,
                }
            ],
            "deployment": {
                "gpu": "a100-80gb",
                "replicas": [{"model": "chat"}],
                "admission": {"classes": {"chat": {"deadline": 20, "rate_limit": {"requests_per_s": 1000}}}},
            },
        },
        Scenario,
    )
    files.check(asked)
    options = BenchOptions(target="in-process", telemetry="none", timeout_s=30.0)
    run = asyncio.run(bench(asked, deployment.resolve(asked), build_schedule(asked), options))
    assert set(run.requests["status"]) == {"completed"} and set(run.requests["tokens"]) == {10}
    assert (run.requests["done_s"] - run.requests["scheduled_s"]).between(0.0, 20.0).all()
    assert (run.requests["finished_s"] >= run.requests["started_s"]).all()
    assert 1.0 <= run.meta.measured_s < 60.0


# --- a process that stands still ----------------------------------------------------------------------------------

TOKENS = 600
STEP_TIMEOUT_S, STOP_S = 1.0, 3.0
SERVED = {
    "name": "stops",
    "models": {"chat": {"builtin": "tiny-chat"}},
    "deployment": {
        "gpu": "cpu",
        "replicas": [{"model": "chat", "count": 2, "threads": 1}],
        "batching": {"chat": {"step_timeout": STEP_TIMEOUT_S}},
        "breakers": {"consecutive_failures": 1},
    },
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """A server whose replicas have worker processes: its URL, and its own process."""
    file = tmp_path / "stops.yaml"
    file.write_text(json.dumps(SERVED))
    with subprocess.Popen(
        command("serve", file, "--port", 0, "--json", "--telemetry", "none"),
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["url"], process.pid
        finally:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            assert process.wait(40) == 0


def workers(pid: int) -> list[int]:
    return sorted(int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def wait_for(begun: list[int], streams: int) -> None:
    for _ in range(10_000):
        if len(begun) >= streams:
            return
        time.sleep(0.002)
    raise AssertionError("they never began")


def stream(url: str, begun: list[int], **headers: str) -> str:
    """The last event of one answer; a word into `begun` when it has a few tokens."""
    body = {"model": "chat", "prompt": "a b", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    last, events = "", 0
    with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                last, events = line, events + 1
                if events == 5:
                    begun.append(1)
    return last


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="workers are found in /proc")
@pytest.mark.parametrize("all_of_it", [False, True], ids=["the server", "the server and its workers"])
def test_a_stopped_server_goes_on_where_it_was(server: tuple[str, int], all_of_it: bool) -> None:
    """For three times as long as a step may take."""
    url, pid = server
    children = workers(pid)
    assert len(children) == 2
    begun: list[int] = []
    with ThreadPoolExecutor(5) as pool:
        hasty = pool.submit(stream, url, begun, **{"X-Request-Timeout-Ms": str(int(STOP_S * 500))})
        wait_for(begun, 1)  # it is let in while nobody knows how long an answer takes
        patient = [pool.submit(stream, url, begun) for _ in range(4)]
        wait_for(begun, 5)
        stopped = [pid, *(children if all_of_it else [])]
        for one in stopped:
            os.kill(one, signal.SIGSTOP)
        time.sleep(STOP_S)
        for one in reversed(stopped):
            os.kill(one, signal.SIGCONT)
        for answer in patient:
            assert f'"completion_tokens":{TOKENS}' in answer.result(), "all of its tokens"
        assert "within its deadline" in hasty.result()
    assert workers(pid) == children, "nobody was killed as hung"
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    values = {f.name: [s.value for s in f.samples] for f in families}
    assert set(values["gpuplan_circuit_breaker_state"]) == {0.0}, "and no breaker has opened"
    assert values["gpuplan_requests_running"] == [0.0]
    assert f'"completion_tokens":{TOKENS}' in stream(url, []), "service is back"
