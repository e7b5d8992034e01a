"""Names people and drivers use for a card, and what they mean."""

from __future__ import annotations

import pytest

from gpuplan.errors import InputError
from gpuplan.hardware import catalog, shapes
from gpuplan.hardware.catalog import GIB, GPUS


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("a100-80gb", "a100-80gb"),  # its own name
        ("A100-80GB", "a100-80gb"),  # in any case
        ("a100", "a100-80gb"),  # an alias
        ("H100-SXM", "h100-80gb"),  # an alias in any case
        ("a100-sxm4-40gb", "a100-40gb"),  # memory decides between two cards of one chip
        ("a100-pcie", "a100-80gb-pcie"),
        ("gh200", "gh200-96gb"),
    ],
)
def test_a_card_is_found_by_name_and_alias(name: str, card: str) -> None:
    assert catalog.gpu(name).name == card


def test_every_alias_leads_to_a_card() -> None:
    assert {catalog.gpu(alias).name for alias in catalog.ALIASES} <= set(GPUS)
    assert not set(catalog.ALIASES) & set(GPUS)


# Dense fp16 operations of one SM in a clock, from NVIDIA's architecture papers.
FP16_PER_CLOCK = {
    "turing": 1024,
    "ampere": 2048,
    "ampere-ga102": 1024,
    "ada": 1024,
    "hopper": 4096,
    "blackwell": 8192,
    "blackwell-gb202": 1024,
}


@pytest.mark.parametrize("card", GPUS.values(), ids=lambda card: card.name)
def test_rates_follow_from_sms_and_clock(card: catalog.Gpu) -> None:
    """Tensor cores may run below the highest clock, never above it; and a sparse figure would be twice too much."""
    per_clock = FP16_PER_CLOCK[card.architecture] // (2 if card.name == "a10g" else 1)  # its units are halved
    assert 0.8 <= card.flops.fp16 / (card.sm_count * card.sm_clock_hz * per_clock) <= 1.01
    assert card.flops.int8 == pytest.approx(2 * card.flops.fp16, rel=0.02)
    if card.flops.fp32:
        assert card.flops.fp32 == pytest.approx(card.flops.fp16 / 2, rel=0.03)
    assert (card.flops.fp8 is None) == (card.architecture in ("turing", "ampere", "ampere-ga102"))
    if card.flops.fp8:
        assert card.flops.fp8 == pytest.approx(2 * card.flops.fp16, rel=0.02)
    assert (card.flops.fp4 is not None) == card.architecture.startswith("blackwell")


@pytest.mark.parametrize("card", GPUS.values(), ids=lambda card: card.name)
def test_a_card_says_what_is_assumed_and_where_its_price_is_from(card: catalog.Gpu) -> None:
    assert card.assumed <= set(card.__dataclass_fields__)
    assert "idle_power_w" in card.assumed, "on no data sheet"
    assert ("price_per_hour" in card.assumed) == ("analogy" in card.price_source)
    assert "2025-01" in card.price_source and "not re-checked" in card.price_source
    assert 0 < card.idle_power_w < card.power_limit_w


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("a100-80g", "did you mean a100-80gb"),  # a letter is missing
        ("h10", "h100"),  # a digit is missing
        ("quantum", "cpu"),  # nothing is near: all are listed, the two words that are no card too
        ("quantum", "auto"),
    ],
)
def test_an_unknown_card_says_what_is_near(name: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        catalog.gpu(name)
    assert str(caught.value).startswith(f"deployment.gpu: unknown GPU (got '{name}'); allowed: ")
    assert hint in str(caught.value)


def test_an_unknown_model_shape_says_what_is_near() -> None:
    with pytest.raises(InputError, match=r"models: unknown model shape \(got 'llama-8b'\).*did you mean llama-3-8b"):
        shapes.shape("llama-8b")


@pytest.mark.parametrize(
    ("product", "memory_gib", "card"),
    [
        ("NVIDIA A100-SXM4-80GB", 80, "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40gb"),  # one chip, told apart by memory
        ("NVIDIA A100-PCIE-40GB", 40, "a100-40gb-pcie"),
        ("NVIDIA A100 80GB PCIe", 80, "a100-80gb-pcie"),
        ("NVIDIA A100-SXM-64GB", 63.4, None),  # one provider's own
        ("NVIDIA H100 80GB HBM3", 79.6, "h100-80gb"),  # NVML's total is a little under the data sheet's
        ("NVIDIA H100 PCIe", 79.6, "h100-80gb-pcie"),
        ("NVIDIA H100 NVL", 93.6, "h100-nvl-94gb"),
        ("NVIDIA GH200 480GB", 95.6, "gh200-96gb"),  # 480 GB are the CPU's
        ("NVIDIA GH200 144G HBM3e", 140.6, None),
        ("NVIDIA H200", 140.4, "h200-141gb"),
        ("NVIDIA B200", 179.1, "b200-180gb"),
        ("NVIDIA GB200", 184.9, "gb200-186gb"),  # not a B200
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 95.6, "rtx-pro-6000-blackwell"),
        ("NVIDIA RTX 6000 Ada Generation", 48, None),
        ("NVIDIA L4", 22.5, "l4"),
        ("NVIDIA L40S", 45, "l40s"),  # not an L4
        ("NVIDIA A10G", 22.5, "a10g"),
        ("NVIDIA A40", 45, "a40"),
        ("Tesla T4", 15, "t4"),
        ("NVIDIA A30", 24, "a30"),
        ("NVIDIA A30", 0, "a30"),  # the total could not be read
        ("NVIDIA A100-SXM4-80GB", 0, None),  # nor which of two sizes it is
        ("NVIDIA GeForce RTX 4090", 24, None),  # not in the catalogue
        ("", 0, None),
    ],
)
def test_a_driver_s_product_name_finds_its_card(product: str, memory_gib: float, card: str | None) -> None:
    found = catalog.from_nvml_name(product, int(memory_gib * GIB))
    assert (found.name if found else None) == card
