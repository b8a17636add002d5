"""The table of GPUs: every name that a driver gives finds its row, and the figures are possible."""

from __future__ import annotations

import pytest

from sagecp.core.gpu_specifications import (
    GPU_SPECIFICATIONS,
    UnknownGpuError,
    find_gpu,
    require_gpu,
)

# The name and the MiB that `nvidia-smi --query-gpu=name,memory.total` tells.
DRIVER_NAMES = [
    ("NVIDIA GB200", 189_471, "GB200"),
    ("NVIDIA B200", 183_359, "B200"),
    ("NVIDIA H200 NVL", 143_771, "H200-NVL"),
    ("NVIDIA H200", 143_771, "H200"),
    ("NVIDIA GH200 480GB", 97_871, "GH200"),
    ("NVIDIA H100 PCIe", 81_559, "H100-PCIe-80GB"),
    ("NVIDIA H100 NVL", 95_830, "H100-NVL-94GB"),
    ("NVIDIA H100 80GB HBM3", 81_559, "H100-SXM-80GB"),
    ("NVIDIA H800 PCIe", 81_559, "H800-PCIe-80GB"),
    ("NVIDIA H800", 81_559, "H800-80GB"),
    ("NVIDIA H20-3e", 143_771, "H20-3e-141GB"),
    ("NVIDIA H20", 97_871, "H20-96GB"),
    ("NVIDIA A100-PCIE-40GB", 40_960, "A100-PCIe-40GB"),
    ("NVIDIA A100 80GB PCIe", 81_920, "A100-PCIe-80GB"),
    ("NVIDIA A100-SXM4-40GB", 40_960, "A100-SXM-40GB"),
    ("NVIDIA A100-SXM4-80GB", 81_920, "A100-SXM-80GB"),
    ("NVIDIA A800 80GB PCIe", 81_920, "A800-PCIe-80GB"),
    ("NVIDIA A800-SXM4-80GB", 81_920, "A800-80GB"),
    ("NVIDIA L40S", 46_068, "L40S-48GB"),
    ("NVIDIA L40", 46_068, "L40-48GB"),
    ("NVIDIA L4", 23_034, "L4-24GB"),
    ("NVIDIA A10G", 23_028, "A10G-24GB"),
    ("NVIDIA A10", 23_028, "A10-24GB"),
    ("NVIDIA A30", 24_576, "A30-24GB"),
    ("NVIDIA A40", 46_068, "A40-48GB"),
    ("NVIDIA RTX A6000", 49_140, "RTX-A6000-48GB"),
    ("NVIDIA RTX 6000 Ada Generation", 49_140, "RTX-6000-Ada-48GB"),
    ("NVIDIA GeForce RTX 5090", 32_607, "RTX-5090-32GB"),
    ("NVIDIA GeForce RTX 4090", 24_564, "RTX-4090-24GB"),
    ("NVIDIA GeForce RTX 3090", 24_576, "RTX-3090-24GB"),
    ("Tesla V100-SXM2-16GB", 16_384, "V100-16GB"),
    ("Tesla V100-SXM2-32GB", 32_768, "V100-32GB"),
    ("Tesla T4", 15_360, "T4-16GB"),
]
NAMES = [gpu.name for gpu in GPU_SPECIFICATIONS]


@pytest.mark.parametrize(("name", "total_mib", "expected"), DRIVER_NAMES)
def test_names_that_drivers_give(name: str, total_mib: int, expected: str) -> None:
    gpu = find_gpu(name)

    assert gpu is not None
    assert gpu.name == expected
    # CUDA has what the driver leaves of it.
    assert total_mib / 1024 - 1.2 <= gpu.memory_gib <= total_mib / 1024


def test_every_row_has_a_driver_s_name() -> None:
    assert sorted(expected for _, _, expected in DRIVER_NAMES) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_short_names_find_themselves(name: str) -> None:
    assert require_gpu(name).name == name
    assert require_gpu(name.lower()).name == name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("H100", "H100-SXM-80GB"),
        ("h100-80gb", "H100-SXM-80GB"),
        ("A100-40GB", "A100-SXM-40GB"),
        ("A100", "A100-SXM-80GB"),
        ("RTX 4090", "RTX-4090-24GB"),
        ("V100", "V100-32GB"),
    ],
)
def test_what_people_say(name: str, expected: str) -> None:
    assert require_gpu(name).name == expected


@pytest.mark.parametrize(
    "name",
    [
        "",
        "NVIDIA",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4080",
        "NVIDIA L20",
        "AMD Instinct MI300X",
        "H1000",
    ],
)
def test_other_names_are_not_guessed(name: str) -> None:
    assert find_gpu(name) is None


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    with pytest.raises(UnknownGpuError) as caught:
        require_gpu("X100-SXM-80GB" * 100, "pools[0].gpu_name")
    assert caught.value.violations[0].field == "pools[0].gpu_name"
    assert len(str(caught.value)) < 2_000

    with pytest.raises(UnknownGpuError, match=r"did you mean RTX-4090-24GB\?.*Known are GB200, B200"):
        require_gpu("RTX4090-24GB")


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_possible(name: str) -> None:
    gpu = require_gpu(name)

    # Fewer bits are twice as fast for each halving; GA102's GeForce adds a factor for fp32 sums.
    if gpu.eight_bit_tflops is not None:
        ratio = gpu.eight_bit_tflops / gpu.dense_tflops
        assert ratio == pytest.approx(4.0 if name == "RTX-3090-24GB" else 2.0, rel=0.02)
    if gpu.four_bit_tflops is not None:
        assert gpu.eight_bit_tflops is not None
        ratio = gpu.four_bit_tflops / gpu.eight_bit_tflops
        assert ratio == pytest.approx(4.0 if name == "RTX-5090-32GB" else 2.0, rel=0.02)
    # Operations for each byte read: the H20 has fewest, the L4 and the Hoppers most.
    assert 30 < gpu.dense_tflops * 1000 / gpu.memory_gb_per_s < 450
    assert (gpu.fast_link_gpu_count > 1) or gpu.link_gb_per_s <= 128 or name == "GH200"
    assert gpu.usd_per_hour > 0.0


def test_rates_are_dense() -> None:
    # With sparsity their makers tell twice as much: 1,979 for H100, 624 for A100, 733 for L40S.
    assert require_gpu("H100").dense_tflops == 989
    assert require_gpu("A100").dense_tflops == 312
    assert require_gpu("L40S").dense_tflops == 362
