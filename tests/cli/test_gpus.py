"""`gpuplan gpus`: this machine, the catalogue, one card, its layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpuplan.hardware import catalog, mig, roofline
from tests.hardware.test_shapes import LLAMA_3

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


def test_what_a_step_costs_and_why() -> None:
    arguments = ("gpus", "a100-80gb", "--model", "llama-3-8b", "--tokens", "1,64,4096")
    told = json.loads(gpuplan(*arguments, "--json").stdout)
    one, some, many = told["rows"]
    assert (one["tokens"], some["tokens"], many["tokens"]) == (1, 64, 4096)
    assert (one["bound"], many["bound"]) == ("memory", "compute")
    for row in told["rows"]:
        parts = ("linear_layer_ms", "attention_layer_ms", "elementwise_layer_ms", "all_reduce_layer_ms")
        layers_ms = 32 * sum(row[part] for part in parts) + row["head_ms"]
        assert row["step_ms"] == pytest.approx(layers_ms + roofline.STEP_OVERHEAD_S * 1e3)
        assert row["linear_layer_band_percent"] == told["band"]["linear_layer_percent"] > 0
    shown = gpuplan(*arguments).stdout
    assert f"{many['step_ms']:.3f}" in shown and "emulated, not measured" in shown and "off on average by" in shown


def test_a_step_on_a_slice_of_several_cards_with_a_cache() -> None:
    arguments = ("gpus", "h100-80gb", "--model", "llama-3-70b", "--slice", "3g.39gb", "--tensor-parallel", "4")
    told = json.loads(gpuplan(*arguments, "--tokens", "8,256", "--context", "2048", "--json").stdout)
    few, many = told["rows"]
    assert (told["slice"], told["tensor_parallel"], told["context"]) == ("3g.40gb", 4, 2048)
    assert few["fits"] and not many["fits"], "256 x 2048 tokens of 80 KiB on each card"
    assert few["all_reduce_layer_ms"] > 0
    assert many["attention_layer_ms"] == pytest.approx(32 * few["attention_layer_ms"], rel=0.01)


def test_a_model_of_one_s_own_from_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3))
    rows = [
        json.loads(gpuplan("gpus", "a100", "--model", model, "--tokens", "64", "--json").stdout)["rows"]
        for model in (str(tmp_path), "llama-3-8b")
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("gpus", "--model", "llama-3-8b"), "--model: needs a card"),
        (("gpus", "h100", "--model", "llama-9"), "--model: unknown model shape (got 'llama-9'); allowed: did you mean llama-3-8b"),
        (("gpus", "h100", "--model", "llama-3-8b", "--slice", "3g.10gb"), "--slice: unknown MIG profile of h100-80gb (got '3g.10gb')"),
        (("gpus", "h100", "--model", "llama-3-8b", "--tokens", "1,none"), "--tokens: not a list of counts (got '1,none')"),
        (("gpus", "h100", "--model", "llama-3-8b", "--tensor-parallel", "3"), "--tensor-parallel: must divide the 32 heads (got 3); allowed: 1, 2, 4, 8, 16, 32"),
        (("gpus", "h100", "--model", "llama-3-8b", "--tokens", "0"), "--tokens: not a list of counts (got '0')"),
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
