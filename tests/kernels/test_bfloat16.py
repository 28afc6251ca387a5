"""bfloat16: weights and factors of 8 significant bits, every sum of them in float32, kernels in float64."""

import pytest
import torch

from lmntk.kernels.contraction import contract, contract_each, summation_dtype, widened
from lmntk.kernels.formulas import UNSIGNED

BF16 = torch.bfloat16


def relative(found, truth):
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def test_contract_adds_bfloat16_in_float32_and_a_bfloat16_product_would_not():
    # Sums of ones count: 8 bits count to 256, and 100,003 parameters are far more.
    ones = torch.ones(1, 100_003, dtype=BF16)
    assert contract(ones, ones, [UNSIGNED]).item() == 100_003
    assert contract_each(ones[None], [UNSIGNED]).item() == 100_003
    assert float(ones @ ones.T) != 100_003


@pytest.mark.parametrize("size", [7, 2**15 + 3])
def test_contract_of_bfloat16_is_as_exact_as_float32(size):
    train, x = drawn(3, size), drawn(5, size, seed=1)
    truth = train.double() @ x.double().T
    found = contract(train, x, [UNSIGNED])
    assert found.dtype == torch.float64
    # Terms cancel: a float32 sum of 2**15 of them is off by some 1e-6 of what is left, one in bfloat16 by 2e-3.
    assert relative(found[0], truth) < 5e-6
    assert relative(contract_each(train[None], [UNSIGNED])[0, 0], train.double() @ train.double().T) < 5e-6


def test_only_numbers_of_half_size_are_widened():
    for dtype in (torch.float32, torch.float64):
        own = torch.ones(2, dtype=dtype)
        assert summation_dtype(dtype) == dtype and widened(own) is own
    assert widened(torch.ones(2, dtype=BF16)).dtype == summation_dtype(BF16) == torch.float32
