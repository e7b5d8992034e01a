"""What is there, by the book of a driver that plays scripts: cards, profiles, layouts, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpuplan.cli import app
from gpuplan.hardware.catalog import GPUS, gpu
from gpuplan.scenario import deployment, files
from gpuplan.telemetry import nvml
from tests.conftest import single_step

from .conftest import Play
from .nvml_fake import A100_PROFILES, a100, sliced

REFUSED, GONE, UNSUPPORTED, NO_FUNCTION = 4, 15, 3, 13


def test_whatever_machine_this_is_discovery_never_raises() -> None:
    cards = nvml.discover()
    assert all(card.memory_bytes > 0 and card.product for card in cards)
    assert nvml.cards_here().keys() <= GPUS.keys()


def test_a_card_and_what_it_can_be_cut_into(play: Play) -> None:
    play(a100())
    (card,), problems = nvml.survey()
    assert problems == []
    assert (card.product, card.uuid, card.known_as) == ("NVIDIA A100-SXM4-80GB", "GPU-1", "a100-80gb")
    assert (card.memory_bytes, card.mig_enabled, card.driver) == (80 * 2**30, False, "570.00.fake")
    assert card.instances == ()
    assert list(nvml.cards_here()) == ["a100-80gb"]


def test_profiles_are_the_driver_s_own(play: Play) -> None:
    """In names, places and counts those of our table; and 1g.10gb+me, which has the slices of another."""
    play(a100())
    told = {p.name: p for p in nvml.discover()[0].profiles}
    known = {p.name: p for p in gpu("a100-80gb").profiles}
    assert set(told) >= {"1g.10gb", "1g.10gb+me", "1g.20gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb"}
    for name in set(told) & set(known):
        for field in ("slices", "width", "starts", "count_max", "sm_count", "cells"):
            assert getattr(told[name], field) == getattr(known[name], field), (name, field)
        assert told[name].memory_bytes == pytest.approx(known[name].memory_bytes, rel=0.03)


def test_an_old_driver_without_names_gets_them_from_slices_and_memory(play: Play) -> None:
    play(f"fail DeviceGetGpuInstanceProfileInfoV {NO_FUNCTION}\n{a100()}")
    names = sorted(p.name for p in nvml.discover()[0].profiles)
    assert names == ["1g.10gb", "1g.10gb+me", "1g.20gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb"]


def test_the_current_layout(play: Play) -> None:
    play(sliced(gpm=False))
    (card,) = nvml.discover()
    layout = [
        (i.profile.name if i.profile else None, i.start, i.width, i.gpu_instance_id, i.uuid) for i in card.instances
    ]
    assert card.mig_enabled is True
    assert layout == [
        ("1g.10gb", 0, 1, 7, "MIG-1g"),
        ("1g.10gb", 1, 1, 8, None),  # no compute instance in it yet
        ("3g.40gb", 4, 4, 1, "MIG-3g"),
    ]


def test_who_is_no_administrator_sees_the_slices_and_not_their_places(play: Play) -> None:
    play(sliced(gpm=False) + f"fail DeviceGetGpuInstances {REFUSED}\n")
    (card,), problems = nvml.survey()
    assert [(i.profile.name if i.profile else None, i.start, i.uuid) for i in card.instances] == [
        ("3g.40gb", None, "MIG-3g"),
        ("1g.10gb", None, "MIG-1g"),
    ]
    assert problems == ["gpu0: MIG layout may not be read: permission refused"]


def test_a_card_without_mig_has_no_profiles(play: Play) -> None:
    play("card NVIDIA_L4 GPU-3 24000000000\n")
    (card,), problems = nvml.survey()
    assert (card.mig_enabled, card.profiles, card.instances, problems) == (None, (), (), [])


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        (9, None),  # driver not loaded: a machine without a card, nothing to say
        (12, None),  # library not found
        (REFUSED, "the NVIDIA driver does not answer (NVML says: Insufficient Permissions)"),
        (18, "the NVIDIA driver does not answer (NVML says: RM has detected an NVML/RM version mismatch)"),
        (NO_FUNCTION, "the NVIDIA driver does not answer (NVML says: Function Not Found)"),  # too old a library
        (777, "the NVIDIA driver does not answer (NVML says: an error that only this driver knows)"),
    ],
)
def test_a_driver_that_does_not_start(play: Play, code: int, problem: str | None) -> None:
    play(f"fail InitWithFlags {code}\n{a100()}")
    assert nvml.survey() == ([], [problem] if problem else [])


def test_a_card_that_is_gone_is_said_and_the_others_are_there(play: Play) -> None:
    play(f"{a100('GPU-1')}fail DeviceGetHandleByIndex {GONE}\n{a100('GPU-2')}{a100('GPU-3')}fail * {GONE} 3\n")
    cards, problems = nvml.survey()
    assert [(c.index, c.uuid) for c in cards] == [(1, "GPU-2"), (2, "")]
    assert problems == [
        "gpu0: a card does not answer (NVML says: GPU is lost)",
        "gpu2: the card does not answer (NVML says: GPU is lost)",
    ]


def test_what_all_cards_refuse_is_one_sentence(play: Play) -> None:
    play("".join(a100(f"GPU-{i}") + f"fail DeviceGetMemoryInfo {REFUSED}\n" for i in range(3)))
    cards, problems = nvml.survey()
    assert [c.memory_bytes for c in cards] == [0, 0, 0]
    assert problems == ["gpu0, gpu1, gpu2: memory may not be read: permission refused"]


def test_placements_that_one_profile_lacks_hide_no_other(play: Play) -> None:
    play(
        a100().replace(A100_PROFILES, A100_PROFILES.replace("7g.80gb", "7g.80gb\nprofile 0xA 99 1 1 14 9728 1 , none"))
    )
    assert len(nvml.discover()[0].profiles) >= 7


@pytest.mark.parametrize(("script", "cards"), [(a100() + sliced(gpm=True), 2), (None, 0)])
def test_the_command_loads_the_library_as_the_system_does(
    fake_library: Path, tmp_path: Path, script: str | None, cards: int
) -> None:
    """By its name, from the loader's path, in a process of its own."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(fake_library.parent)}
    if script is not None:
        (tmp_path / "nvml.txt").write_text(script)
        environment["NVML_FAKE"] = str(tmp_path / "nvml.txt")
    command = [sys.executable, "-m", "gpuplan", "gpus", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=True)
    here = json.loads(done.stdout)["here"]
    assert len(here) == cards and "Traceback" not in done.stderr
    if cards:
        assert [i["uuid"] for i in here[1]["instances"]] == ["MIG-1g", None, "MIG-3g"]
        assert here[1]["instances"][2]["profile"]["name"] == "3g.40gb"


def test_this_machine_s_cards_are_drawn_slice_by_slice(
    play: Play, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    play(a100() + sliced(gpm=False).replace("3g.40gb", "3g.39gb").replace("42 40192", "44 40192"))
    app(["gpus"], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    cut = lines.index(next(line for line in lines if line.startswith("gpu1  ")))
    assert lines[cut].split() == ["gpu1", *"01234567"]
    assert lines[cut + 1].replace("|", " ").split() == ["1g.10gb", "1g.10gb", ".", ".", "3g.39gb"]
    assert lines[cut + 2 :] == [
        "gpu1: 3g.40gb is called 3g.39gb here",
        "gpu1: 3g.39gb: SMs 44, where 42 was listed",
    ]


def test_what_a_card_says_of_itself_wins_over_the_catalogue(play: Play, tmp_path: Path) -> None:
    file = tmp_path / "here.yaml"
    file.write_text(json.dumps(single_step(deployment={"gpu": "auto", "mig": ["3g.40gb"]})))
    play(sliced(gpm=False))
    assert files.load(file, cards_here=nvml.cards_here).deployment.mig_profiles == [], "nothing to say"
    play(sliced(gpm=False).replace("3g.40gb", "3g.39gb").replace("42 40192", "44 40192"))
    scenario = files.load(file, cards_here=nvml.cards_here)
    (replica,) = deployment.resolve(scenario).replicas
    assert replica.slice.profile is not None
    assert (replica.slice.profile.name, replica.slice.profile.sm_count) == ("3g.39gb", 44)
    assert deployment.differences(scenario.deployment) == [
        "a100-80gb as it reports itself: 3g.40gb is called 3g.39gb here",
        "a100-80gb as it reports itself: 3g.39gb: SMs 44, where 42 was listed",
    ]
    embedded = files.from_builtins(files.to_builtins(scenario))
    assert deployment.resolve(embedded).replicas == (replica,), "a run folder needs no card to be read"


@pytest.mark.hardware
def test_a_real_card_says_what_it_is() -> None:
    cards = nvml.discover()
    if not cards:
        pytest.skip("no NVIDIA card in this machine")
    assert all(card.uuid.startswith("GPU-") and card.driver for card in cards)
