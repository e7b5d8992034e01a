"""`gpuplan gpus`: this machine, the catalogue, one card, its layouts."""

from __future__ import annotations

import json

import pytest

from gpuplan.hardware import catalog, mig

from .conftest import gpuplan, one_error_line


def test_a_machine_without_a_driver_says_so() -> None:
    done = gpuplan("gpus", "--json")
    assert done.returncode == 0
    here = json.loads(done.stdout)["here"]
    if here:
        pytest.skip("this machine has a card")
    assert gpuplan("gpus").stdout.startswith("no NVIDIA driver: emulated cards only")


def test_the_catalogue_lists_every_card_and_where_its_price_is_from() -> None:
    shown = gpuplan("gpus", "--catalog").stdout
    rows = [line.split()[0] for line in shown.splitlines() if line.split()[0] in catalog.GPUS]
    assert rows == list(catalog.GPUS), "each on one line, also in 80 columns"
    assert "[1] " in shown and "not re-checked" in shown
    cards = json.loads(gpuplan("gpus", "--catalog", "--json").stdout)["catalog"]
    assert cards["h100-80gb"]["flops"] == {"fp32": 494e12, "fp16": 989e12, "fp8": 1979e12, "int8": 1979e12, "fp4": None}
    assert cards["b200-180gb"]["assumed"] == ["idle_power_w", "price_per_hour", "sm_clock_hz"]


def test_a_card_with_its_profiles_and_layouts() -> None:
    shown = gpuplan("gpus", "H100").stdout
    assert shown.startswith("h100-80gb (hopper): 80 GiB")
    assert "1g.10gb+me" in shown and "  4g.40gb + 3g.40gb\n" in shown
    told = json.loads(gpuplan("gpus", "h100-80gb", "--json").stdout)
    assert (told["gpu"], len(told["valid"]), len(told["maximal"])) == ("h100-80gb", 77, 28)
    assert "no MIG: it cannot be cut" in gpuplan("gpus", "t4").stdout


def test_every_layout_is_drawn_and_told() -> None:
    card = catalog.gpu("a30")
    heading, numbers, *lines = gpuplan("gpus", "a30", "--layouts").stdout.splitlines()
    assert heading == "a30: 9 valid layouts; * to these 4 no slice can be added"
    assert numbers.split() == list("0123")
    assert len(lines) == len(mig.valid_layouts(card)) and sum(line.startswith("* ") for line in lines) == 4
    told = json.loads(gpuplan("gpus", "a30", "--layouts", "--json").stdout)["layouts"]
    assert [tuple(row["profiles"]) for row in told] == list(mig.valid_layouts(card))
    assert told[0] == {
        "profiles": ["4g.24gb"],
        "maximal": True,
        "placements": [{"profile": "4g.24gb", "start": 0, "width": 4}],
    }


def test_one_layout_is_placed_in_an_order_of_creation() -> None:
    shown = gpuplan("gpus", "a100-80gb", "--place", "1g.10gb, 3g.39gb").stdout
    assert shown.endswith("create in this order: 3g.40gb:4, 1g.10gb:3\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("gpus", "h100-80g"), "CARD: unknown GPU (got 'h100-80g'); allowed: did you mean h100-80gb"),
        (("gpus", "--layouts"), "--layouts: needs a card"),
        (("gpus", "h100", "--place", "3g.40gb,5g.40gb"), "--place[1]: unknown MIG profile of h100-80gb (got '5g.40gb'); allowed: did you mean"),
        (("gpus", "h100", "--place", "4g.40gb,4g.40gb"), "--place[1]: this layout cannot exist on h100-80gb: 4g.40gb does not fit beside 4g.40gb"),
        (("gpus", "l4", "--place", "1g.10gb"), "--place[0]: l4 has no MIG"),
        (("gpus", "h100", "--place", ""), "--place[0]: unknown MIG profile"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line_that_helps(arguments: tuple[str, ...], said: str) -> None:
    done = gpuplan(*arguments)
    assert done.returncode == 2
    assert said in one_error_line(done)
