"""Peak arithmetic: by the card's name, or measured."""

import pytest
import torch

from finetune.bench.card_speed import data_sheet, find_peak


@pytest.mark.parametrize(
    ("name", "speed"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("NVIDIA RTX 6000 Ada Generation", 364),
    ],
)
def test_cards_are_known_by_their_names(name, speed):
    assert data_sheet(name) == speed


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4080 SUPER",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "Tesla T4",
        "Quadro RTX 6000",
        "A Card To Come",
    ],
)
def test_a_card_that_is_another_or_a_part_of_one_is_measured(name):
    assert data_sheet(name) is None


def test_a_cpu_is_measured_and_says_so():
    peak = find_peak(torch.device("cpu"), torch.float32)
    assert 1e8 < peak.flops < 1e15
    assert peak.source.startswith("measured") and "float32" in peak.source
