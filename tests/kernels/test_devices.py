"""What depends on the device, as far as a CPU can show it."""

import pytest
import torch

from lmntk.kernels.engines import layer_selection
from lmntk.kernels.timing import StageTimer, clock

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("precision", "dtype", "device", "expected"),
    [
        ("highest", torch.float32, CUDA, 1e-3),
        ("high", torch.float32, CUDA, 1e-2),
        ("high", torch.float32, CPU, 1e-3),
        ("high", torch.float64, CUDA, 1e-6),
        ("highest", torch.bfloat16, CPU, 0.3),
    ],
)
def test_layers_are_compared_with_autograd_as_exactly_as_products_are(precision, dtype, device, expected):
    """TF32 would otherwise send layers to the jacobian engine whose rounding alone differs."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert layer_selection._tolerance(dtype, device) == expected
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_stage_timer_waits_for_its_gpu_only_if_it_is_given(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    with StageTimer().stage("forming"):
        pass
    with StageTimer(CPU).stage("forming"):
        pass
    assert waited == []
    timer = StageTimer(CUDA)
    with timer.stage("forming"):
        assert waited == [CUDA]
    assert waited == [CUDA, CUDA] and timer.seconds["forming"] >= 0
    assert clock(CUDA) <= clock(CUDA) and len(waited) == 4
