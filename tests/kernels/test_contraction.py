"""Products of gradients: those of a side with itself are mirrored, and are the same numbers."""

import itertools
from unittest import mock

import pytest
import torch

from lmntk.kernels import contraction
from lmntk.kernels.contraction import contract
from lmntk.kernels.formulas import SignPlacement
from lmntk.kernels.layers.base import vector_kernel

PLACEMENTS = [SignPlacement(*signs) for signs in itertools.product([False, True], repeat=2)]


def whole_numbers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Gradients whose products are exact in any order: a difference is a mistake, never rounding."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("rows", [0, 1, 5, 24, 25, 31, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_products_of_a_side_with_itself_are_those_of_two_sides(rows, dtype):
    gradients = whole_numbers(rows, 11, dtype=dtype)
    with mock.patch.multiple(contraction, MIRRORED_ROWS=12, BLOCK=4):
        found = contract(gradients, gradients, PLACEMENTS)
        assert torch.equal(found, contract(gradients, gradients.clone(), PLACEMENTS))
    numbers = gradients.double()
    assert torch.equal(found[0], numbers @ numbers.T)
    assert torch.equal(found[1], numbers @ numbers.sign().T)


def test_a_mirrored_product_is_symmetric_to_the_bit_and_half_of_it_is_computed():
    gradients = torch.randn(96, 300, generator=torch.Generator().manual_seed(1))
    multiplied = []

    class Counted(torch.Tensor):
        def __matmul__(self, other):
            multiplied.append(self.shape[0] * other.shape[1])
            return super().__matmul__(other)

    with mock.patch.object(contraction, "MIRRORED_ROWS", 12):
        found = contract(gradients, gradients, [SignPlacement(False, False)])
        contract(counted := gradients.as_subclass(Counted), counted, [SignPlacement(False, False)])
    assert torch.equal(found[0], found[0].T)
    assert torch.linalg.norm(found[0] - gradients.double() @ gradients.double().T) <= 1e-6 * torch.linalg.norm(found)
    assert sum(multiplied) == 96 * 96 * 9 // 16, "eight bands, and what is right of each"


def test_batches_of_one_side_are_known_as_the_same():
    batches = [torch.randn(4, 2, 9), torch.randn(3, 2, 9)]
    with mock.patch("lmntk.kernels.layers.base.contract", wraps=contract) as watched:
        found = vector_kernel(batches, list(batches), PLACEMENTS)
        other = vector_kernel(batches, [batch.clone() for batch in batches], PLACEMENTS)
    assert [call.args[0] is call.args[1] for call in watched.call_args_list] == [True, False]
    torch.testing.assert_close(found, other)
