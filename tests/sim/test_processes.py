"""Worker processes end with whatever needs them: an error, Ctrl-C, a parent that is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest

from gpuplan.errors import InputError, RunError
from gpuplan.sim.candidate import Candidate
from gpuplan.sim.many import Workers, simulate_many
from gpuplan.sim.processes import Processes
from tests.conftest import REPOSITORY, single_step

from .test_many import CROSSED, TIMES, scenario

pytestmark = pytest.mark.slow
linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")


UNMEASURED = Candidate("on the CPU", scenario(models={"mood": {"builtin": "sentiment"}}, deployment={"gpu": "cpu"}), 0)


def test_an_error_names_its_candidate_and_keeps_its_kind() -> None:
    asked = CROSSED[0].scenario
    card = msgspec.structs.replace(asked.deployment, gpu="b17")
    impossible = Candidate("no such card", msgspec.structs.replace(asked, deployment=card), 0)
    broken = Candidate("broken", asked, 0, rate_scale=0.0)
    with Workers(2) as workers:
        with pytest.raises(RunError, match="on the CPU: no service times for mood"):
            workers.simulate(UNMEASURED, TIMES)
        with pytest.raises(InputError, match=r"no such card: .*unknown GPU"):
            workers.simulate(impossible, TIMES)
        with pytest.raises(RunError, match="broken: ZeroDivisionError"):
            workers.simulate(broken, TIMES)


def long(requests: int = 10_000_000) -> Candidate:
    """A simulation that takes far longer than a test."""
    traffic = [{**single_step()["traffic"][0], "arrivals": {"process": "poisson", "rate": 1000}}]
    return Candidate("a long one", msgspec.structs.replace(scenario(traffic=traffic), duration=requests / 1000), 0)


def of_parent(parent: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(folder.name))
        except OSError:
            continue  # it has just ended
    return found


def simulating() -> list[int]:
    """The worker processes of this one."""
    return [pid for pid in of_parent(os.getpid()) if b"gpuplan.sim" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@linux
def test_a_worker_that_dies_is_an_error_of_its_candidate_and_another_takes_its_place() -> None:
    with Workers(2) as workers:
        assert workers.simulate(CROSSED[0], TIMES).meets_slos
        (worker,) = simulating()

        def kill() -> None:
            time.sleep(0.3)
            os.kill(worker, signal.SIGKILL)

        threading.Thread(target=kill).start()
        with pytest.raises(RunError, match="a long one: its simulation was lost: the process was killed by signal 9"):
            workers.simulate(long(), TIMES)
        assert workers.simulate(CROSSED[0], TIMES).meets_slos
    assert simulating() == []


@linux
def test_an_error_ends_the_others_at_once() -> None:
    began_s = time.monotonic()
    with pytest.raises(RunError, match="on the CPU"):
        simulate_many([long(), UNMEASURED], TIMES, workers=2)
    assert time.monotonic() - began_s < 20 and simulating() == []


def test_nothing_is_simulated_after_the_end() -> None:
    workers = Processes(2)
    workers.close()
    with pytest.raises(RunError, match="they were ended"):
        workers.ask("late", b"")


SCRIPT = """
import sys
from tests.sim.test_processes import TIMES, long
from gpuplan.sim.many import simulate_many
print("begun", flush=True)
simulate_many([long(), long(), long()], TIMES, workers=2)
"""


@linux
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_the_command_ends_its_workers(sent: signal.Signals) -> None:
    command = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    assert command.stdout is not None
    command.stdout.readline()
    deadline_s = time.monotonic() + 30
    while len(workers := of_parent(command.pid)) < 2:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    command.send_signal(sent)
    _, said = command.communicate(timeout=20)
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    if sent == signal.SIGINT:
        assert said.strip().endswith("KeyboardInterrupt")


def test_the_example_of_the_docs_runs_as_it_stands() -> None:
    """On all cores, in a script without a guard around its main part."""
    page = (REPOSITORY / "docs" / "simulate.md").read_text()
    example = page.partition("```python\n")[2].partition("```")[0]
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0].split(", ")[0] for line in done.stdout.splitlines()] == ["a100-80gb"] * 5 + [
        "h100-80gb"
    ] * 5
