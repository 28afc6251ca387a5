"""Which parameters of a module which layer type can take: matched by exact type, then tried on a small batch."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lmntk.kernels import propagation
from lmntk.kernels.engines.base import KernelProblem
from lmntk.kernels.examples import Batch
from lmntk.kernels.formulas import Direction
from lmntk.kernels.layers import LAYERS, Layer, Workspace

logger = logging.getLogger(__name__)

# How many sums of the logits a layer is tried on.
CHECKS = 2


def find_layers(problem: KernelProblem) -> tuple[dict[str, Layer], list[str]]:
    """Find out which parameters which layer type can take, and try it on a small batch.

    A layer is used only if its part of the kernel of one example is what autograd says: a weight that is used
    elsewhere too, an output that is changed in place, a norm over several axes all show there.

    Returns:
        The layers by module name, and the parameters that are left for the fallback.
    """
    layers = _candidates(problem)
    try:
        layers = _that_see_examples(layers, problem)
        layers = _that_agree_with_autograd(layers, problem)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        logger.warning("no layer can be factored (%s): every parameter goes to the jacobian engine", error)
        layers = {}
    known = {name for prefix, layer in layers.items() for name in parameters_of(prefix, layer)}
    return layers, [name for name in problem.params if name not in known]


def _candidates(problem: KernelProblem) -> dict[str, Layer]:
    """Match modules by exact type; parameters that several modules hold are left out."""
    assert problem.module is not None
    uses = Counter(id(p) for module in problem.module.modules() for p in module.parameters(recurse=False))
    layers: dict[str, Layer] = {}
    for prefix, module in problem.module.named_modules():
        counted = frozenset(
            local
            for local, parameter in module.named_parameters(recurse=False)
            if f"{prefix}.{local}".lstrip(".") in problem.params and uses[id(parameter)] == 1
        )
        layer = LAYERS.get(type(module))
        if layer is not None and counted and counted <= layer.parameters:
            found = layer(module, counted)
            # What a module makes is one part: where its parameters' are to be kept apart, it cannot be taken whole.
            if len({problem.layer_named(name) for name in parameters_of(prefix, found)}) == 1:
                layers[prefix] = found
    return layers


def _that_see_examples(layers: dict[str, Layer], problem: KernelProblem) -> dict[str, Layer]:
    """Keep the modules that are called once, with one tensor whose first axis runs over the examples."""
    assert problem.call is not None
    kept = layers
    for size in (1, 3):  # one of the two is not, by accident, the number of tokens
        batch = problem.train.batch([problem.typical_example] * size)
        record, _ = propagation.run(kept, problem.call, batch)
        seen = {
            name
            for name, passage in record.passages.items()
            if passage.calls == 1 and len(passage.inputs) == len(passage.output) == size and passage.output.dim() > 1
        }
        kept = {name: layer for name, layer in kept.items() if name in seen}
        with torch.no_grad():
            unchanged = torch.allclose(record.logits, problem.call(batch), rtol=1e-4, atol=1e-5)
        if not unchanged:
            return {}  # looking at the modules changes what they do
    return kept


def _that_agree_with_autograd(layers: dict[str, Layer], problem: KernelProblem) -> dict[str, Layer]:
    """Keep the layers whose part of the kernel of one example is that of its gradients.

    Sums of the logits with random weights are asked, wᵀK w = ‖∇ Σ w f‖²: of their gradients one parameter's at a time
    is there, where those of all logits over all parameters could be more than memory holds.
    """
    assert problem.module is not None
    assert problem.call is not None
    if not layers:
        return {}
    batch = problem.train.batch([problem.typical_example])
    found = propagation.factors(layers, problem.call, batch)
    own = dict(problem.module.named_parameters())
    wanted = {name: own[name] for prefix, layer in layers.items() for name in parameters_of(prefix, layer)}
    sample = next(iter(wanted.values()))
    weights = torch.randn(CHECKS, problem.num_logits, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truths = [_squared_gradients(own, wanted, problem, batch, row.to(sample)) for row in weights]
    workspace = Workspace(2**22, sample.dtype, sample.device)
    sgd = (Direction(sign_train=False, sign_x=False),)
    kept = {}
    for prefix, layer in layers.items():
        truth = torch.tensor([sum(squares[name] for name in parameters_of(prefix, layer)) for squares in truths])
        ours = layer.kernel([found[prefix]], [found[prefix]], sgd, workspace)[0, 0, :, 0].cpu()
        asked = torch.einsum("ka,ab,kb->k", weights, ours, weights)
        if torch.allclose(asked, truth.double(), rtol=0, atol=1e-3 * float(truth.abs().max())):
            kept[prefix] = layer
    return kept


def _squared_gradients(
    own: Mapping[str, nn.Parameter],
    wanted: Mapping[str, nn.Parameter],
    problem: KernelProblem,
    batch: Batch,
    weights: Tensor,
) -> dict[str, float]:
    """Return the squared norm of each parameter's gradient of the logits' sum with weights ``[C]``, for one example.

    Args:
        own: All parameters of the model, which come out as they were.
        wanted: Those asked about.
        problem: Calls the model.
        batch: The example.
        weights: What the logits are multiplied by.
    """
    assert problem.call is not None
    squares = dict.fromkeys(wanted, 0.0)
    before = {name: (parameter.requires_grad, parameter.grad) for name, parameter in own.items()}

    def take(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            squares[name] = float(torch.linalg.vector_norm(parameter.grad, dtype=torch.float64) ** 2)
            parameter.grad = None

        return hook

    handles = []
    try:
        for name, parameter in own.items():
            parameter.requires_grad_(name in wanted).grad = None
        for name, parameter in wanted.items():
            handles.append(parameter.register_post_accumulate_grad_hook(take(name)))
        with torch.enable_grad():
            (problem.call(batch)[0] * weights).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
        for name, (asked, gradient) in before.items():
            own[name].requires_grad_(asked).grad = gradient
    return squares


def parameters_of(prefix: str, layer: Layer) -> list[str]:
    """Return the full names of the parameters that a layer takes."""
    return [f"{prefix}.{local}".lstrip(".") for local in sorted(layer.counted)]
