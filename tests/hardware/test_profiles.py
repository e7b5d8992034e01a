"""The tables: what real cards reported is in them, what nobody saw is marked, and larger never has less."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpuplan.hardware import catalog, profiles
from gpuplan.hardware.profiles import GIB, PROFILES, Profile

PUBLISHED = {
    "a30": "A30-24GB",
    "a100-40gb": "A100-40GB",
    "a100-80gb": "A100-80GB",
    "h100-80gb": "H100-80GB-SXM",
    "h100-nvl-94gb": "H100-NVL-94GB",
    "gh200-96gb": "H100-96GB-GH200",
    "h200-141gb": "H200-141GB",
    "b200-180gb": "B200-180GB",
    "gb200-186gb": "GB200",
    "rtx-pro-6000-blackwell": "RTX-PRO-6000-Blackwell-96GB",
}
Rules = Callable[[str], dict[str, Any]]


@pytest.fixture
def rules(data_file: Callable[[str], Path]) -> Rules:
    gpus = json.loads(data_file("mig/rules.json").read_text())["gpus"]
    return lambda card: gpus[PUBLISHED[card]]


def test_every_table_belongs_to_a_card_and_every_published_one_is_here() -> None:
    assert set(PROFILES) <= set(catalog.GPUS)
    assert set(PROFILES) - set(PUBLISHED) == {"h100-80gb-pcie"}, "whose slices nobody listed: all assumed"
    assert all({"sm_count", "memory_bytes", "starts"} <= p.assumed for p in PROFILES["h100-80gb-pcie"])


@pytest.mark.parametrize("card", PUBLISHED)
def test_profiles_are_those_that_real_cards_report(card: str, rules: Rules) -> None:
    reported = {p["profile"]: p for p in rules(card)["profiles"]}
    assert {p.name for p in PROFILES[card]} == set(reported)
    for ours in PROFILES[card]:
        row = reported[ours.name]
        shape = (ours.slices, ours.width, ours.starts, ours.count_max, ours.profile_id)
        published = (row["compute_slices"], row["mem_width"], tuple(row["starts"]), row["max_instances"])
        assert shape == (*published, row["profile_id"])
        assert ours.cells == rules(card)["memory_grid"]
        for kind in ("copy", *profiles.MEDIA_ENGINES):
            seen = row.get("copy_engines" if kind == "copy" else kind, 0)  # cards without an NVENC have no such column
            assert getattr(ours.engines, kind) == (seen if isinstance(seen, int) else None), (ours.name, kind)


@pytest.mark.parametrize("card", PUBLISHED)
def test_what_was_not_seen_is_marked_and_nothing_else(card: str, rules: Rules) -> None:
    placements_seen = "VERIFIED" in rules(card)["placements_source"]
    for ours in PROFILES[card]:
        row = next(p for p in rules(card)["profiles"] if p["profile"] == ours.name)
        unseen = {
            *(["starts"] if not placements_seen else []),
            *(["memory_bytes"] if row["mem_gib"] is None else []),
            *(["sm_count"] if row["sm"] is None or ours.name == "7g.141gb" else []),  # that one is taken from an H100
        }
        assert ours.assumed == unseen, ours.name
        if row["sm"] is not None:
            assert ours.sm_count == row["sm"]
        if row["mem_gib"] is not None:
            assert ours.memory_bytes == pytest.approx(row["mem_gib"] * GIB, abs=1)


@pytest.mark.parametrize("card", PROFILES)
def test_a_larger_slice_never_has_less(card: str) -> None:
    def plain(p: Profile) -> bool:
        return not p.suffix

    by_size = sorted(filter(plain, PROFILES[card]), key=lambda p: (p.slices, p.width))
    for small, large in itertools.pairwise(by_size):
        assert small.sm_count <= large.sm_count
    whole = catalog.gpu(card)
    assert max(p.memory_bytes for p in by_size) <= whole.memory_bytes
    assert max(p.sm_count for p in by_size) <= whole.sm_count
    for variant in PROFILES[card]:
        base = next(p for p in by_size if (p.slices, p.width) == (variant.slices, variant.width))
        assert (variant.sm_count, variant.memory_bytes, variant.starts) == (
            base.sm_count,
            base.memory_bytes,
            base.starts,
        )


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("1g.10gb", (1, 10, "")),
        ("1g.10gb+me", (1, 10, "+me")),
        ("1g.24gb+me.all", (1, 24, "+me.all")),
        ("2g.48gb-me", (2, 48, "-me")),
        ("1c.3g.40gb", None),  # a compute instance within a slice
        ("whole", None),
    ],
)
def test_a_profile_s_name_says_slices_memory_and_variant(name: str, meaning: tuple[int, int, str] | None) -> None:
    assert profiles.parsed(name) == meaning


@pytest.mark.parametrize("card", PROFILES)
def test_names_and_figures_agree(card: str) -> None:
    for p in PROFILES[card]:
        named = profiles.parsed(p.name)
        assert named is not None
        assert (named[0], named[2]) == (p.slices, p.suffix)
        assert p.memory_bytes <= named[1] * GIB, "a name rounds the memory up"
