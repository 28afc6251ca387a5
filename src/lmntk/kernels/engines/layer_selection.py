"""Which parameters of a module which layer type can take: matched by exact type, then tried on unlike examples."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from lmntk.kernels import capture
from lmntk.kernels.batching import Batch, Examples, equal_shape_runs
from lmntk.kernels.formulas import SignPlacement
from lmntk.kernels.layers import LAYERS, Layer, Workspace
from lmntk.kernels.problem import KernelProblem

logger = logging.getLogger(__name__)

# Examples of either side that layers are tried on, from the shortest to the longest, and how many make a batch.
TRIED, TOGETHER = 6, 3
# A batch of long ones has fewer.
TRIED_TOKENS = 1024


def find_layers(problem: KernelProblem) -> tuple[dict[str, Layer], list[str]]:
    """Find out which parameters which layer type can take, and try it on some examples.

    A layer is used only if its part of the kernel is what autograd says, of examples alone and of several in a batch:
    a weight that is used elsewhere too, an output that is changed in place, a norm over several axes all show there.
    What shows in other examples only, every batch is looked at for (`capture.ForwardCapture.find_irregular`).

    Returns:
        The layers by module name, and the parameters that are left for the fallback.
    """
    layers = _candidates(problem)
    try:
        for batch in _trials(problem):
            layers = _matching_autograd(layers, problem, batch) if layers else {}
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
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
            if len({problem.layer_name(name) for name in parameters_of(prefix, found)}) == 1:
                layers[prefix] = found
    return layers


def _trials(problem: KernelProblem) -> Iterator[Batch]:
    """Yield batches of unlike examples: one alone, several at once, of the train side and of the other."""
    alone = problem.typical_example
    yield problem.train.batch([alone])
    groups = [*_unlike(problem.train, TRIED)]
    if all(len(group) < TOGETHER for group in groups):
        groups.append([alone] * TOGETHER)  # the number of examples is not, by accident, that of tokens
    yield from map(problem.train.batch, groups)
    if problem.x is not None and len(problem.x):
        yield from map(problem.x.batch, _unlike(problem.x, TOGETHER))


def _unlike(examples: Examples, count: int) -> list[list[int]]:
    """Choose examples from the shortest to the longest, and group them to batches in which they are not in order."""
    order = sorted(range(len(examples)), key=lambda index: examples.shapes[index])
    spread = list(dict.fromkeys(order[round(k * (len(order) - 1) / (count - 1))] for k in range(count)))
    mixed = [spread[k] for k in sorted(range(len(spread)), key=lambda k: 3 * k % 7)]
    if examples.equal_lengths:
        return equal_shape_runs(examples, sorted(mixed, key=lambda index: examples.shapes[index]), TOGETHER)
    size = max(1, min(TOGETHER, TRIED_TOKENS // max(examples.shapes[order[-1]], 1)))
    return [mixed[start : start + size] for start in range(0, len(mixed), size)]


def _matching_autograd(layers: dict[str, Layer], problem: KernelProblem, batch: Batch) -> dict[str, Layer]:
    """Keep the layers whose part of the kernel of some examples is that of their gradients.

    A sum of the logits with random weights is asked, wᵀK w = ‖∇ Σ w f‖²: of its gradients one parameter's at a time is
    there, where those of all logits over all parameters could be more than memory holds. Weights differ between
    examples, so that one example's gradient is not taken for another's.
    """
    assert problem.module is not None
    assert problem.call is not None
    captured, gradients = capture.forward_backward(layers, problem.call, batch)
    layers = {name: layer for name, layer in layers.items() if name not in captured.irregular}
    own = dict(problem.module.named_parameters())
    wanted = {name: own[name] for prefix, layer in layers.items() for name in parameters_of(prefix, layer)}
    if not wanted:
        return {}
    weights = torch.randn(captured.logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits, squares = _squared_gradients(own, wanted, problem, batch, weights.to(captured.logits))
    if not torch.allclose(captured.logits.detach(), logits, rtol=1e-4, atol=1e-5, equal_nan=True):
        return {}  # looking at the modules changes what they do
    if not logits.isfinite().all():
        return layers  # of such an example nothing can be learnt
    workspace = Workspace(2**22, logits.dtype, logits.device)
    sgd = (SignPlacement(sign_train=False, sign_x=False),)
    kept = {}
    for prefix, layer in layers.items():
        truth = sum(squares[name] for name in parameters_of(prefix, layer))
        found = layer.factors(captured.module_io[prefix].inputs, gradients.pop(prefix))
        kernel = layer.kernel([found], [found], sgd, workspace)[0].cpu()
        asked = torch.einsum("ia,iajb,jb->iajb", weights, kernel, weights)
        # What cancels in the sum was rounded before.
        allowed = _tolerance(logits.dtype) * (truth + 1e-3 * float(asked.abs().sum()))
        if abs(float(asked.sum()) - truth) <= allowed:
            kept[prefix] = layer
    return kept


def _tolerance(dtype: torch.dtype) -> float:
    # Some models compute a part in float32 whatever their dtype.
    return 1e-6 if dtype == torch.float64 else 1e-3


def _squared_gradients(
    own: Mapping[str, nn.Parameter],
    wanted: Mapping[str, nn.Parameter],
    problem: KernelProblem,
    batch: Batch,
    weights: Tensor,
) -> tuple[Tensor, dict[str, float]]:
    """Return the logits, and the squared norm of each parameter's gradient of their sum with weights ``[B, C]``.

    Args:
        own: All parameters of the model, which come out as they were.
        wanted: Those asked about.
        problem: Calls the model.
        batch: Some examples.
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
            logits = problem.call(batch)
            (logits * weights).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
        for name, (asked, gradient) in before.items():
            own[name].requires_grad_(asked).grad = gradient
    return logits.detach(), squares


def parameters_of(prefix: str, layer: Layer) -> list[str]:
    """Return the full names of the parameters that a layer takes."""
    return [f"{prefix}.{local}".lstrip(".") for local in sorted(layer.parameter_names)]
