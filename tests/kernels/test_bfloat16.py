"""bfloat16: weights and factors of 8 significant bits, every sum of their products in float32, kernels in float64."""

import pytest
import torch
from torch import nn

import oracle
from engine_problems import names_of, problem_of, sides
from lmntk.kernels import (
    FORMULAS,
    BatchedExamples,
    KernelProblem,
    TileRequest,
    assemble,
    empirical_ntk,
    functional,
    make_engine,
)
from lmntk.kernels.contraction import contract, contract_each, products_of, summation_dtype, widened
from lmntk.kernels.formulas import UNSIGNED
from lmntk.kernels.layers import EmbeddingLayer, LayerNormLayer, LinearLayer, Workspace
from lmntk.kernels.layers.base import Buffer
from lmntk.kernels.layers.linear_dense import dense, form
from lmntk.kernels.layers.linear_gram import gram
from lmntk.kernels.low_rank import LowRankAdapter
from lmntk.models.parameters import ParameterFilter
from tiny_models import tiny_prompt_model

BF16 = torch.bfloat16
MANY = 1001  # bfloat16 has 1000 and 1004


def relative(found, truth):
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def workspace():
    return Workspace(2**16, BF16, torch.device("cpu"))


def linear_factors(seed, examples=4, positions=9, d_in=24, d_out=40):
    inputs = drawn(examples, positions, d_in, seed=seed)
    gradients = [drawn(examples, positions, d_out, seed=seed + 10 + logit) for logit in range(2)]
    layer = LinearLayer(nn.Linear(d_in, d_out), frozenset({"weight", "bias"}))
    return layer.factors(inputs, gradients)


def weight_gradients(factors):
    """The oracle's: float64 [n, C, d_out · d_in] of the factors as they are."""
    each = [torch.einsum("blo,bli->boi", g.double(), factors.inputs.double()) for g in factors.gradients]
    return torch.stack(each, dim=1).flatten(2)


def test_contract_adds_bfloat16_in_float32_and_a_bfloat16_product_would_not():
    # Sums of ones count: 8 bits count to 256, and 100,003 parameters are far more.
    ones = torch.ones(1, 100_003, dtype=BF16)
    assert contract(ones, ones, [UNSIGNED]).item() == 100_003
    assert contract_each(ones[None], [UNSIGNED]).item() == 100_003
    assert float(ones @ ones.T) != 100_003


@pytest.mark.parametrize("size", [7, 2**15 + 3, 2**19])
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


def test_instructions_for_bfloat16_are_asked_for_in_a_block_only_and_change_no_other_product():
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    left, right = torch.randn(300, 200), torch.randn(200, 300)
    with pytest.raises(ZeroDivisionError), products_of(BF16):
        assert setting.fp32_precision == "bf16"
        _ = 1 / 0
    assert setting.fp32_precision == before
    outside = left @ right
    with products_of(torch.float32):
        assert torch.equal(left @ right, outside) and setting.fp32_precision == before
    with products_of(BF16):
        within = left @ right
    assert relative(within, outside) < 2**-7  # the instructions round float32, where there are any
    wide, other = left.bfloat16().float(), right.bfloat16().float()
    exact = wide.double() @ other.double()
    with products_of(BF16):
        assert relative((wide @ other).double(), exact) < 1e-6


@pytest.mark.parametrize("path", ["gram", "dense"])
def test_a_layer_multiplies_bfloat16_factors_in_float32(path):
    train, x = linear_factors(1), linear_factors(2, examples=3, positions=31)
    truth = torch.einsum("iap,jbp->aibj", weight_gradients(train), weight_gradients(x))
    multiplied = gram([[train]], [[x]], [UNSIGNED], workspace()) if path == "gram" else None
    found = dense([train], [x], [UNSIGNED], workspace()) if multiplied is None else multiplied
    assert found.dtype == torch.float64
    # A formed gradient may be rounded once before it is multiplied: 2**-9 of each of its 960 numbers, whose errors are
    # independent. A result that is rounded is off by 1.7e-3.
    assert relative(found[0], truth) < (1e-6 if path == "gram" else 3e-4)


def test_sums_over_many_positions_are_exact_for_numbers_that_bfloat16_has():
    ones = torch.ones(1, MANY, 2, dtype=BF16)
    layer = LinearLayer(nn.Linear(2, 2), frozenset({"weight", "bias"}))
    factors = layer.factors(ones, [ones])
    formed = form(Buffer.X, [factors], slice(0, 2), workspace())
    assert formed.dtype == torch.float32 and formed.unique().tolist() == [MANY]
    assert factors.biases.unique().tolist() == [MANY]
    assert gram([[factors]], [[factors]], [UNSIGNED], workspace()).item() == 4 * MANY**2
    norm = LayerNormLayer(nn.LayerNorm(2), frozenset({"bias"}))
    vectors = norm.factors(ones, [ones])
    assert norm.kernel([vectors], [vectors], [UNSIGNED], workspace()).item() == 2 * MANY**2
    # The bias of a layer in bfloat16 alone would have this gradient:
    assert ones.sum(dim=1).unique().tolist() != [MANY]


def test_the_row_of_a_token_that_repeats_is_rounded_once():
    tokens, gradients = torch.zeros(1, MANY, dtype=torch.int64), torch.ones(1, MANY, 2, dtype=BF16)
    layer = EmbeddingLayer(nn.Embedding(3, 2), frozenset({"weight"}))
    factors = layer.factors(tokens, [gradients])
    assert factors.gradients.dtype == BF16
    assert layer.kernel([factors], [factors], [UNSIGNED], workspace()).item() == pytest.approx(2 * MANY**2, rel=2**-8)


def test_an_adapter_multiplies_in_float32():
    factors = linear_factors(3)
    adapter = LowRankAdapter(drawn(4, 24), scale=2.0)
    adapted = adapter.factors(factors)
    expected = 2 * factors.inputs.double() @ adapter.a.double().T
    assert relative(adapted.inputs, expected) < 1e-6
    assert relative(gram([[adapted]], [[adapted]], [UNSIGNED], workspace())[0], _products(adapted)) < 1e-6


def _products(factors):
    return torch.einsum("iap,jbp->aibj", weight_gradients(factors), weight_gradients(factors))


def rounded_model(architecture, dtype):
    """A tiny model of weights that bfloat16 has, in any dtype."""
    model = tiny_prompt_model(architecture, torch.float32)
    model.convert(BF16)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    wide = tiny_prompt_model(architecture, torch.float32)
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            parameter.copy_(weights[name])
    wide.convert(dtype)
    return wide.requires_grad_(False)


def kernel_of(model, train, x, engine="factored"):
    problem = problem_of(model, names_of(model, ParameterFilter()), train, x)
    made = make_engine(problem, engine)
    plan = made.plan()
    return assemble(made.blocks(plan), plan, problem)[0], made


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_engines_agree_with_the_float64_kernel_of_the_rounded_weights(architecture):
    train, x = sides(architecture)
    truth, _ = kernel_of(rounded_model(architecture, torch.float64), train, x)
    model = rounded_model(architecture, BF16)
    assert {parameter.dtype for parameter in model.parameters()} == {BF16}
    found, engine = kernel_of(model, train, x)
    assert engine.fallback_parameters == [], "rounding is not taken for a layer that does not factor"
    # What is left is the rounding of activations and gradients in the model itself.
    assert relative(found, truth) < 3e-2
    assert relative(kernel_of(model, train, x, "jacobian")[0], truth) < 3e-2


def test_a_kernel_is_symmetric_and_positive_semidefinite_up_to_float32_rounding():
    found, _ = kernel_of(rounded_model("bert", BF16), sides("bert")[0], None)
    matrix = found.flatten(2).flatten(0, 1)
    assert torch.equal(matrix, matrix.T)
    values = torch.linalg.eigvalsh(matrix)
    assert values[0] >= -1e-5 * values[-1]


def test_tiles_computed_again_have_the_same_bytes():
    train, x = sides("bert")
    model = rounded_model("bert", BF16)
    problem = problem_of(model, names_of(model, ParameterFilter()), train, x)
    blocks = []
    for _ in range(2):
        engine = make_engine(problem, "factored")
        plan = engine.plan(TileRequest(2, 2))
        blocks.append({tile: values.numpy().tobytes() for tile, values in engine.blocks(plan)})
    assert blocks[0] == blocks[1] and len(blocks[0]) == 4
    last = list(plan)[-1]
    alone = make_engine(problem, "factored")
    ((tile, values),) = alone.blocks(plan.restricted_to({last}))
    assert values.numpy().tobytes() == blocks[0][tile], "a stopped run computes the missing tile alone"


def test_factors_take_half_the_memory_and_buffers_as_much():
    train, x = sides("bert")
    engines = {dtype: kernel_of(rounded_model("bert", dtype), train, x)[1] for dtype in (torch.float32, BF16)}
    narrow, wide = (engines[dtype].planner.demands for dtype in (BF16, torch.float32))
    # Whole gradients of norms and biases stay float32.
    assert 0.5 <= narrow.per_token / wide.per_token < 0.65
    assert narrow.buffer_bytes == wide.buffer_bytes
    plans = {dtype: engine.expected_bytes(engine.plan()) for dtype, engine in engines.items()}
    assert plans[BF16] < plans[torch.float32]


@pytest.mark.parametrize(("formula", "engine", "said"), [("signgd", "auto", "signs"), ("sgd", "jvp", "rounds")])
def test_signs_and_forward_mode_are_refused(formula, engine, said):
    model = nn.Linear(2, 1).to(BF16)
    batch = torch.ones(3, 2, dtype=BF16)
    with pytest.raises(ValueError, match=said):
        empirical_ntk(model, [batch], formula=formula, engine=engine)


def test_any_module_of_bfloat16_has_a_float64_kernel():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).to(BF16)
    batch = drawn(4, 6)
    params = list(model.double().parameters())
    truth = oracle.gradients(lambda row: model(row[None]), params, batch.double())
    for engine in ("factored", "jacobian"):
        found = empirical_ntk(model.to(BF16), [batch], engine=engine)
        assert found.dtype == torch.float64
        assert relative(found, oracle.kernel(truth, truth, "sgd")) < 3e-2


class NormOfAll(nn.Module):
    """A norm over several axes, which no layer type factors, between layers that factor."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.out = nn.Linear(4, 4), nn.LayerNorm([3, 4]), nn.Linear(4, 2)

    def forward(self, states):
        return self.out(self.norm(self.inner(states)).tanh().mean(dim=1))


def test_rounding_does_not_hide_a_layer_that_does_not_factor():
    torch.manual_seed(0)
    module = NormOfAll().to(BF16).requires_grad_(False)
    problem = KernelProblem(
        train=BatchedExamples([drawn(5, 3, 4)]),
        x=None,
        formula=FORMULAS["sgd"],
        num_logits=2,
        model=functional.module_model(module),
        params=functional.all_parameters(module),
    )
    assert make_engine(problem, "factored").fallback_parameters == ["norm.weight", "norm.bias"]
