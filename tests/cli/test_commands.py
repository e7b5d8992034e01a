"""Commands that touch no network, and what bad input gets: one clear line and exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import ROOT, SHORT, gpuplan, one_error_line

SCENARIOS = sorted((ROOT / "scenarios").glob("*.yaml"))


@pytest.mark.parametrize("file", SCENARIOS, ids=lambda f: f.stem)
def test_every_example_is_sound_and_says_what_it_shows(file: Path) -> None:
    assert gpuplan("scenario", "check", file).returncode == 0
    assert file.read_text().startswith("# Shows ")


@pytest.mark.parametrize("file", [f for f in SCENARIOS if "gpu: cpu" not in f.read_text()], ids=lambda f: f.stem)
def test_every_example_on_a_card_can_be_simulated(file: Path, tmp_path: Path) -> None:
    """Those on the CPU have to be measured, and are in test_bench."""
    done = gpuplan("simulate", file, "--out", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    overall = json.loads(done.stdout)["summary"]["overall"]
    failed = overall["rejected"] + sum(overall["errors"].values())
    assert overall["completed"] + failed == overall["requests"] > 50
    assert (failed > 0) == ("\nfaults:" in file.read_text())


def test_every_command_has_help_with_an_example() -> None:
    for name in ("bench", "simulate", "plan", "report", "explain", "serve", "export", "lint", "gpus"):
        done = gpuplan(name, "--help")
        assert done.returncode == 0
        assert f"Example: gpuplan {name}" in done.stdout
    for name in ("check", "preview", "import"):
        assert f"Example: gpuplan scenario {name}" in gpuplan("scenario", name, "--help").stdout


BAD = [
    ("name: short", "name: short\nspeed: 3", ":3: speed: unknown key; allowed: "),
    ("rate: 6", "rate: -6", "traffic[0].arrivals.rate: invalid value (got -6); allowed: float > 0"),
    (
        "mood: {builtin: sentiment}}",
        "mood: {builtin: sentiment}, x: {emulate: phi}}",
        "models.x.emulate: unknown model shape",
    ),
    (
        "mood: {builtin: sentiment}}",
        "mood: {builtin: sentiment}, x: {emulate: bert-base}}",
        "models.x: no traffic class uses this model",
    ),
    (
        "slice: 1g.10gb}]",
        "slice: 2g.20gb}]",
        "deployment.replicas[1].slice: no such slice is free in the layout (got '2g.20gb')",
    ),
    (
        "[4g.40gb, 1g.10gb]",
        "[4g.40gb, 4g.40gb]",
        "this layout cannot exist on h100-80gb: 4g.40gb does not fit beside 4g.40gb",
    ),
    ("h100-80gb", "h100-90gb", "did you mean h100-80gb"),
    ("duration: 2s", "duration: soon", "duration: not a duration (got 'soon'); allowed: e.g. 250ms"),
]


@pytest.mark.parametrize(("right", "wrong", "said"), BAD, ids=[b[1][:40] for b in BAD])
def test_bad_scenarios_get_one_line_that_helps(right: str, wrong: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    assert right in SHORT
    file.write_text(SHORT.replace(right, wrong, 1))
    for arguments in (("scenario", "check", file), ("bench", file, "--no-plan"), ("simulate", file)):
        done = gpuplan(*arguments)
        assert done.returncode == 2
        line = one_error_line(done)
        assert said in line
        assert line.startswith(f"error: {file}:")


BAD_ARGUMENTS = [
    (("bench", "{short}", "--target", "ftp://x"), 2, "not a target"),
    (("bench", "{short}", "--target", "http://127.0.0.1:9", "--no-plan"), 1, "cannot reach http://127.0.0.1:9"),
    (("bench", "{short}", "--out", "/proc/nowhere/run"), 2, "--out: cannot write there"),
    (("bench", "{short}", "--api", "openai-chta"), 2, "did you mean openai-chat"),
    (("bench", "{short}", "--rate", "0"), 2, "--rate: must be above zero"),
    (("bench", "{short}", "--fail-on", "overall.goodput"), 2, "--fail-on: not a condition"),
    (("bench", "{short}", "--header", "nonsense"), 2, "--header: not a header"),
    (
        ("bench", "{short}", "--sample-hz", "1000"),
        2,
        "--sample-hz: not a sampling rate (got 1000.0); allowed: 0.1 to 100",
    ),
    (("bench", "{short}", "--telemetry", "dcgm"), 2, "--telemetry: not a source of telemetry (got 'dcgm')"),
    (("serve", "{short}", "--sample-hz", "0"), 2, "--sample-hz: not a sampling rate (got 0.0)"),
    (("bench", "nowhere.yaml"), 2, "nowhere.yaml: cannot read"),
    (("bench", "{short}", "--set", "deployment.gpu=b17"), 2, "--set: deployment.gpu: unknown GPU (got 'b17')"),
    (("simulate", "{short}", "--set", "traffic.mood.arrivals.rate=0"), 2, "--set: traffic[1].arrivals.rate: invalid"),
    (("simulate", "{short}", "--days", "0"), 2, "--days: must be above zero"),
    (("simulate", "{short}", "--days", "1", "--duration", "5s"), 2, "--days: says the same as --duration"),
    (("plan", "/tmp", "--set", "seed=1"), 2, "--set: is for a scenario file"),
    (("plan", "/"), 2, "not a run folder"),
    (("report", "/nowhere"), 2, "not a run folder"),
    (("explain", "/nowhere", "1"), 2, "not a run folder"),
    (("export", "/nowhere.json", "--to", "nvidia-smi"), 2, "cannot use: No such file"),
    (("export", "/nowhere.json", "--to", "yaml"), 2, "unknown format"),
    (("gpus", "a10"), 2, "did you mean a10g or a40 or a30"),
    (("scenario", "import", "{short}", "--out", "{tmp}/x.yaml"), 2, "not a known trace"),
]


@pytest.mark.parametrize(("arguments", "code", "said"), BAD_ARGUMENTS, ids=[" ".join(a[0])[:50] for a in BAD_ARGUMENTS])
def test_bad_arguments_get_one_line_that_helps(
    arguments: tuple[str, ...], code: int, said: str, short: Path, tmp_path: Path
) -> None:
    filled = [a.format(short=short, tmp=tmp_path) for a in arguments]
    if filled[0] == "bench" and "--out" not in filled:
        filled += ["--out", str(tmp_path / "run")]
    done = gpuplan(*filled)
    assert done.returncode == code
    assert said in one_error_line(done)


def test_a_trace_becomes_a_scenario_that_replays_it(tmp_path: Path) -> None:
    trace = tmp_path / "azure.csv"
    rows = [f"2023-11-11 00:00:{s:02d}.1234567,{100 + s},{5 + s}" for s in range(0, 60, 2)]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\r\n" + "\r\n".join(rows))
    out = tmp_path / "replay.yaml"
    done = gpuplan("scenario", "import", trace, "--out", out, "--duration", "20s", "--gpu", "h100-80gb")
    assert done.returncode == 0
    assert "10 requests" in done.stdout
    preview = gpuplan("scenario", "preview", out)
    assert "recorded" in preview.stdout
    simulated = gpuplan("simulate", out, "--out", tmp_path / "run", "--json")
    overall = json.loads(simulated.stdout)["summary"]["overall"]
    assert (overall["requests"], overall["completed"]) == (10, 10)


def test_simulate_plan_report_and_export_share_a_folder(short: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert gpuplan("simulate", short, "--out", run, "--duration", "20s").returncode == 0
    assert not (run / "plan.json").exists()
    planned = gpuplan("plan", run, "--json")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["plan"]["gpus_needed"] == 1
    before = (run / "summary.json").read_bytes()
    assert gpuplan("report", run).returncode == 0
    assert (run / "summary.json").read_bytes() == before, "derived again from the rows, the numbers are the same"
    assert b"<svg" in (run / "report.html").read_bytes()
    exported = gpuplan("export", run, "--to", "mig-parted", "--out", run / "mig.yaml")
    assert exported.returncode == 0
    assert "mig-configs" in (run / "mig.yaml").read_text()


def test_fail_on_turns_a_figure_into_an_exit_code(short: Path, tmp_path: Path) -> None:
    met = gpuplan("simulate", short, "--out", tmp_path / "a", "--fail-on", "classes.mood.e2el_ms.p95 > 1000")
    assert met.returncode == 0
    missed = gpuplan("simulate", short, "--out", tmp_path / "b", "--fail-on", "overall.slo_attainment <= 1")
    assert missed.returncode == 1
    assert "overall.slo_attainment is 1: <= 1" in one_error_line(missed)
    wrong = gpuplan("simulate", short, "--out", tmp_path / "c", "--fail-on", "classes.moot.e2el_ms.p95 > 1")
    assert wrong.returncode == 2
    assert "no such figure" in one_error_line(wrong)


def test_simulated_seeds_get_intervals_everywhere_and_keep_them(short: Path, tmp_path: Path) -> None:
    run, settings = tmp_path / "run", ["--set", "traffic.mood.arrivals.rate=30", "--set", "deployment.mig=[4g.40gb, 2g.20gb]",
                                       "--set", "deployment.replicas.1.slice=2g.20gb"]  # fmt: skip
    done = gpuplan("simulate", short, *settings, "--seeds", "3", "--out", run, "--json")
    assert done.returncode == 0 and done.stderr == "", "no progress beside JSON"
    told = json.loads(done.stdout)["summary"]["seeds"]
    assert (told["count"], told["seeds"], told["met_slos"]) == (3, [2, 3, 4], 3)
    goodput = told["figures"]["overall.goodput"]
    assert goodput["low"] < goodput["mean"] < goodput["high"] and goodput["mean"] > 30
    again = gpuplan("report", run)
    assert "over 3 seeds" in again.stdout and "95 % confidence interval" in again.stdout
    assert json.loads((run / "summary.json").read_bytes())["seeds"] == told
    page = (run / "report.html").read_text()
    assert "Over 3 seeds" in page and "nothing was served, every figure is a prediction" in page
    held = gpuplan(
        "simulate", short, "--seeds", "2", "--out", run, "--fail-on", "seeds.figures.overall.goodput.low < 1000"
    )
    assert held.returncode == 1 and "seeds.figures.overall.goodput.low is" in one_error_line(held)
    alone = gpuplan("simulate", short, "--out", run, "--json")
    assert "seeds" not in json.loads(alone.stdout)["summary"], "those of the last run are gone"


def test_a_simulation_in_which_nothing_is_completed_failed(short: Path, tmp_path: Path) -> None:
    crash = "faults=[{at: 0s, model: chat, crash: {}}, {at: 0s, model: mood, crash: {}}]"
    done = gpuplan("simulate", short, "--out", tmp_path / "run", "--set", crash)
    assert done.returncode == 1 and "no request was completed" in one_error_line(done)


def test_days_of_a_slow_scenario(short: Path, tmp_path: Path) -> None:
    slow = ["--set", "traffic.mood.arrivals.rate=0.01", "--set", "traffic.chatter.arrivals.rate=0.01"]
    done = gpuplan("simulate", short, *slow, "--days", "0.25", "--out", tmp_path / "run", "--json")
    assert json.loads(done.stdout)["summary"]["measured_s"] == 21_600
