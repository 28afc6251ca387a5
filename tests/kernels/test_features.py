"""Features against projected per-example autograd gradients in float64, and the statistics of their inner products."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import oracle
from engine_problems import gradients_by_name, names_of, problem_of, sides
from lmntk.kernels import (
    FORMULAS,
    BatchedExamples,
    FunctionModel,
    KernelProblem,
    MemoryBudget,
    ModuleModel,
    Projection,
    capture,
)
from lmntk.kernels.feature_check import FeatureCheck
from lmntk.kernels.feature_columns import Buckets, kept_sides
from lmntk.kernels.features import FeatureMap
from lmntk.kernels.layers import LinearLayer
from lmntk.kernels.projection import Side
from lmntk.models.parameters import ParameterFilter
from tiny_models import PaddedPrompts, tiny_prompt_model

BUDGET = MemoryBudget(2**28)
DRAWN = Projection(3, 5)


def map_of(architecture, projection=DRAWN, dimension=None):
    model = tiny_prompt_model(architecture)
    train, x = sides(architecture)
    problem = problem_of(model, names_of(model, ParameterFilter()), train, x)
    return FeatureMap(problem, projection, BUDGET, dimension)


def features_of(mapped, examples):
    return torch.cat([mapped.features(examples, [i])[0] for i in range(len(examples))])


def projected(name, module, gradients, single):
    """What must be left of the oracle's gradients ``[N, C, *shape]`` of a module's parameter: ``[N, C, columns]``."""
    layer, embeds, is_vector = name, isinstance(module, nn.Embedding), gradients.dim() == 3
    if is_vector:
        gradients = gradients[:, :, None]
    elif type(module).__name__ == "Conv1D":
        gradients = gradients.transpose(-1, -2)
    sizes = gradients.shape[2:]
    rows, columns = sizes
    width = 2 * DRAWN.width if embeds or single else DRAWN.width
    if embeds and rows * columns > width**2:
        rows = int((gradients.abs().sum(dim=(0, 1, 3)) > 0).sum())
    elif not embeds and not is_vector:
        layer = name.removesuffix(".weight")
    kept = (1, min(columns, 4 * DRAWN.width)) if is_vector else kept_sides(width, rows, columns)
    left, right = (
        Projection(width, DRAWN.seed).matrix(layer, side, size)
        for width, side, size in zip(kept, Side, sizes, strict=True)
    )
    if embeds:
        left = Buckets.of_rows(DRAWN, name, sizes[0], kept[0]).rows(torch.arange(sizes[0]), torch.float64)
    left, right = (
        torch.eye(size, dtype=torch.float64) if matrix is None else matrix
        for matrix, size in zip((left, right), sizes, strict=True)
    )
    return torch.einsum("ncoi,ok,ij->nckj", gradients, left, right).flatten(2)


def at_one_position(mapped, module_name):
    """Whether a linear layer's factors have one position: those behind the attention of the last layer."""
    layer = mapped._layers.get(module_name)
    factors = mapped._factors({module_name: layer}, 0)[module_name] if isinstance(layer, LinearLayer) else None
    return factors is not None and factors.positions == 1


@pytest.mark.parametrize("architecture", ["roberta", "gpt2", "llama", "opt"])
def test_features_are_the_oracles_gradients_projected_parameter_by_parameter(architecture):
    mapped = map_of(architecture)
    problem = mapped._problem
    modules, gradients = dict(problem.model.module.named_modules()), gradients_by_name(architecture)[0]
    found = features_of(mapped, problem.train)
    assert found.shape == (3, 2, mapped.dimension)
    assert {part.name for part in mapped.parts} == set(problem.params)
    for part in mapped.parts:
        prefix, _, local = part.name.rpartition(".")
        module = modules[prefix]
        rows = getattr(module, "label_word_ids", slice(None))
        own = gradients[part.name].unflatten(-1, module.get_parameter(local).shape)[:, :, rows]
        expected, columns = (
            projected(part.name, module, own, at_one_position(mapped, prefix)),
            found[:, :, part.start : part.stop],
        )
        assert columns.shape == expected.shape
        assert (columns - expected).norm() <= 1e-12 * own.norm() + 1e-14


@pytest.mark.parametrize("architecture", ["roberta", "gpt2"])
def test_columns_of_gradients_are_those_of_factors(architecture):
    mapped = map_of(architecture)
    by_factors = mapped.features(mapped._problem.train, [0])[0]
    names = [name for name in mapped._of_parameter if name not in mapped._model.partial_rows.names]
    assert len(names) >= len(mapped._problem.params) - 1
    by_gradients = by_factors.clone()
    for name in names:
        mapped._place(by_gradients, name).zero_()
    mapped._add_gradients(by_gradients, names, mapped._problem.train, [0])
    assert torch.allclose(by_gradients, by_factors, rtol=1e-9, atol=1e-12)


def test_batches_with_padding_have_the_features_of_their_examples_alone():
    mapped = map_of("bert")
    prompts = PaddedPrompts(sides("bert")[0])
    together, logits = mapped.features(prompts, [2, 1, 0])
    alone = features_of(mapped, prompts)
    assert torch.allclose(together.flip(0), alone, rtol=1e-10, atol=1e-12)
    assert torch.allclose(logits.flip(0), torch.cat([mapped.features(prompts, [i])[1] for i in range(3)]))


class Reader(nn.Module):
    """Embeds words, adds a vector that no layer type knows, and reads two logits off."""

    def __init__(self):
        super().__init__()
        self.words, self.norm, self.fc, self.out = nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 7), nn.Linear(7, 2)
        self.shift = nn.Parameter(torch.ones(3, 4, 2))

    def forward(self, ids):
        hidden = self.fc(self.norm(self.words(ids))) * (self.shift * self.shift.flip(1)).sum()
        return self.out(torch.tanh(hidden).sum(dim=1))


def reader_problem(reader=Reader, ids=None):
    torch.manual_seed(0)
    module = reader().double().requires_grad_(False)
    if ids is None:
        ids = torch.randint(9, (5, 4), generator=torch.Generator().manual_seed(1))
    params = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def logits_fn(params, batch):
        return torch.func.functional_call(module, params, batch)

    model = ModuleModel(logits_fn, module)
    sgd = FORMULAS["sgd"]
    return KernelProblem(
        train=BatchedExamples([ids]), x=None, formula=sgd, num_logits=2, model=model, params=params
    ), ids


@pytest.mark.parametrize("dimension", [None, 20])
def test_inner_products_are_the_kernel_in_the_mean_over_seeds(dimension):
    problem, ids = reader_problem()
    module = problem.model.module
    exact_gradients = oracle.gradients(
        module.requires_grad_(True), [*module.parameters()], [ids[i : i + 1] for i in range(5)]
    )
    module.requires_grad_(False)
    exact = torch.einsum("iap,jbp->iajb", exact_gradients, exact_gradients)
    draws, kernels = 150, []
    for seed in range(draws):
        mapped = FeatureMap(problem, Projection(2, seed), BUDGET, dimension)
        assert mapped.num_fallback_parameters == 24
        found = mapped.features(problem.train, range(5))[0]
        kernels.append(torch.einsum("iap,jbp->iajb", found, found))
    estimates = torch.stack(kernels)
    spread = estimates.std(dim=0) / draws**0.5
    assert ((estimates.mean(dim=0) - exact).abs() < 4.5 * spread + 1e-12).all()
    assert spread.norm() > 0.01 * exact.norm()  # so that the mean is of estimates


def test_a_width_that_keeps_all_gives_the_exact_kernel_also_where_it_is_drawn_anew():
    problem, ids = reader_problem()
    narrow = FeatureMap(problem, Projection(2, 1), BUDGET)
    mapped = narrow.redrawn(Projection(9))
    assert narrow.dimension < mapped.dimension
    found = mapped.features(problem.train, range(5))[0]
    module = problem.model.module.requires_grad_(True)
    gradients = oracle.gradients(module, [*module.parameters()], [ids[i : i + 1] for i in range(5)])
    exact = torch.einsum("iap,jbp->iajb", gradients, gradients)
    estimate = torch.einsum("iap,jbp->iajb", found, found)
    assert (estimate - exact).norm() < 1e-12 * exact.norm()


class Branching(Reader):
    """Reads prompts that begin with word 8 twice: their layers are called twice."""

    def forward(self, ids):
        hidden = self.fc(self.norm(self.words(ids)))
        if (ids[:, 0] == 8).any():
            again = self.fc(self.norm(self.words(ids.flip(1)) * hidden[..., :6]))
            hidden = torch.where((ids[:, 0] == 8)[:, None, None], again * hidden, hidden)
        return self.out(torch.tanh(hidden).sum(dim=1))


def test_a_batch_that_uses_layers_in_another_way_than_the_probes_has_their_gradients_by_autograd():
    problem, ids = reader_problem(Branching, ids=torch.arange(20).reshape(5, 4) % 8)
    other = BatchedExamples([torch.cat([torch.full((2, 1), 8), ids[:2, 1:]], dim=1), ids[2:3]])
    module = problem.model.module.requires_grad_(True)
    mixed = torch.cat([other.batch([i]) for i in range(3)])
    both = [
        oracle.gradients(module, [*module.parameters()], [texts[i : i + 1] for i in range(len(texts))])
        for texts in (ids, mixed)
    ]
    sizes = [parameter.numel() for parameter in module.parameters()]
    by_name = dict(zip(dict(module.named_parameters()), both[1].split(sizes, dim=2), strict=True))
    module.requires_grad_(False)
    irregular = capture.forward_backward(FeatureMap(problem, DRAWN, BUDGET)._layers, problem.model, mixed).irregular
    assert irregular == {"words", "norm", "fc"}
    whole = FeatureMap(problem, Projection(9), BUDGET)
    train, x = whole.features(problem.train, range(5))[0], whole.features(other, range(3))[0]
    exact = torch.einsum("iap,jbp->iajb", *both)
    assert (torch.einsum("iap,jbp->iajb", train, x) - exact).norm() < 1e-12 * exact.norm()
    mapped = FeatureMap(problem, Projection(2, 5), BUDGET)
    found = mapped.features(other, range(3))[0]
    part = next(part for part in mapped.parts if part.name == "fc.weight")
    left, right = (Projection(2, 5).matrix("fc", side, size) for side, size in zip(Side, (7, 6), strict=True))
    expected = torch.einsum("ncoi,ok,ij->nckj", by_name["fc.weight"].unflatten(2, (7, 6)), left, right).flatten(2)
    assert torch.allclose(found[:, :, part.start : part.stop], expected, rtol=1e-10, atol=1e-12)


def test_the_check_weighs_a_sub_sample_as_the_whole_kernel_has_pairs():
    problem, _ = reader_problem()
    mapped = FeatureMap(problem, Projection(2, 3), BUDGET)
    check = FeatureCheck(problem, 3, BUDGET, lambda mapped, examples, indices: iter([[*indices]]))
    module = problem.model.module.requires_grad_(True)
    ids = check.examples.batch([0, 1, 2])
    gradients = oracle.gradients(module, [*module.parameters()], [ids[i : i + 1] for i in range(3)])
    module.requires_grad_(False)
    exact = torch.einsum("iap,jbp->iajb", gradients, gradients)
    weights = torch.full((3, 3), 2.0).fill_diagonal_(1.0)  # of 5 · 4 pairs 3 · 2 are here, of 5 examples 3

    def error_of(seed):
        found = FeatureMap(problem, Projection(2, seed), BUDGET).features(check.examples, range(3))[0]
        estimate = torch.einsum("iap,jbp->iajb", found, found)
        squares = [(values**2).sum(dim=(1, 3)) for values in (estimate - exact, exact)]
        return float(((squares[0] * weights).sum() / (squares[1] * weights).sum()).sqrt())

    found, errors = check.error(mapped, draws=3), [error_of(seed) for seed in (3, 4, 5)]
    assert found.own == pytest.approx(errors[0], rel=1e-9)
    assert found.mean == pytest.approx(sum(errors) / 3, rel=1e-9) and found.own > 0.01


def test_signs_and_functions_without_a_module_are_refused():
    problem, _ = reader_problem()
    with pytest.raises(ValueError, match="does not keep the signs"):
        FeatureMap(replace(problem, formula=FORMULAS["signgd"]), DRAWN, BUDGET)
    function = replace(problem, model=FunctionModel(problem.model.logits_fn))
    with pytest.raises(ValueError, match="need the module"):
        FeatureMap(function, DRAWN, BUDGET)
