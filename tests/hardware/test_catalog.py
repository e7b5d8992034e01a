"""Names people and drivers use for a card, and what they mean."""

from __future__ import annotations

import pytest

from gpuplan.errors import InputError
from gpuplan.hardware import catalog, mig, shapes
from gpuplan.hardware.catalog import GIB


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("a100-80gb", "a100-80gb"),  # its own name
        ("A100-80GB", "a100-80gb"),  # in any case
        ("a100", "a100-80gb"),  # an alias
        ("H100-SXM", "h100-80gb"),  # an alias in any case
        ("a100-sxm4-40gb", "a100-40gb"),  # memory decides between two cards of one chip
    ],
)
def test_a_card_is_found_by_name_and_alias(name: str, card: str) -> None:
    assert catalog.gpu(name).name == card


def test_every_alias_leads_to_a_card_and_every_cut_card_is_in_the_catalogue() -> None:
    assert {catalog.gpu(alias).name for alias in catalog.ALIASES} <= set(catalog.GPUS)
    assert set(mig.PROFILES) <= set(catalog.GPUS)


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
        ("NVIDIA A100-PCIE-40GB", 40, "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", 79.6, "h100-80gb"),  # NVML's total is a little under the data sheet's
        ("NVIDIA H200", 140.4, "h200-141gb"),
        ("NVIDIA L4", 22.5, "l4"),
        ("NVIDIA L40S", 45, "l40s"),  # not an L4
        ("Tesla T4", 15, "t4"),
        ("NVIDIA A30", 24, "a30"),
        ("NVIDIA GeForce RTX 4090", 24, None),  # not in the catalogue
        ("", 0, None),
    ],
)
def test_a_driver_s_product_name_finds_its_card(product: str, memory_gib: float, card: str | None) -> None:
    found = catalog.from_nvml_name(product, int(memory_gib * GIB))
    assert (found.name if found else None) == card
