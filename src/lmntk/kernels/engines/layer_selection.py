"""Which layer type can take which module: matched by exact type, then compared with autograd on unlike examples."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lmntk.kernels import capture
from lmntk.kernels.batching import Batch, Examples, bytes_of, equal_shape_batches
from lmntk.kernels.formulas import UNSIGNED
from lmntk.kernels.layers import LAYERS, Layer, Workspace
from lmntk.kernels.memory import MemoryBudget
from lmntk.kernels.problem import KernelProblem, ModuleModel
from lmntk.kernels.tuning import Tuning

logger = logging.getLogger(__name__)


def find_layers(
    problem: KernelProblem,
    model: ModuleModel,
    budget: MemoryBudget,
    tuning: Tuning,
    known: Mapping[str, Layer] | None = None,
) -> tuple[dict[str, Layer], list[str]]:
    """Find the layers whose parameters' gradients factor, and check them on some examples.

    A layer is used only if its contribution to the kernel equals autograd's, for single examples and for several in a
    batch. The comparison detects a weight that is used elsewhere too, an output that is changed in place, and a norm
    over several axes. `capture.forward_backward` detects in every batch what only other examples show.

    Args:
        problem: The kernel.
        model: Its model.
        budget: The engine's memory, of which the gradients of a comparison take a share.
        tuning: Number and size of the comparisons.
        known: The layers that were found for the same train examples and others on the other side: only the latter are
            compared then.

    Returns:
        The layers by module name, and the parameters that are left for the fallback.
    """
    layers = _candidates(problem, model, tuning) if known is None else dict(known)
    gradient_bytes = min(tuning.probe_gradient_bytes, budget.share(tuning.probe_gradient_share).bytes)
    probes = [] if known is not None else _train_probes(problem, tuning)
    for batch in (*probes, *_x_probes(problem, tuning)):
        if layers:
            layers = _matching_autograd(layers, model, batch, tuning, gradient_bytes)
    taken = {name for prefix, layer in layers.items() for name in parameters_of(prefix, layer)}
    return layers, [name for name in problem.params if name not in taken]


def parameters_of(prefix: str, layer: Layer) -> list[str]:
    """Return the full names of the parameters that a layer takes."""
    return [f"{prefix}.{local}".lstrip(".") for local in sorted(layer.parameter_names)]


def _candidates(problem: KernelProblem, model: ModuleModel, tuning: Tuning) -> dict[str, Layer]:
    """Match modules by exact type; parameters that several modules hold are left out."""
    uses = Counter(id(p) for module in model.module.modules() for p in module.parameters(recurse=False))
    layers: dict[str, Layer] = {}
    for prefix, module in model.module.named_modules():
        parameter_names = frozenset(
            local
            for local, parameter in module.named_parameters(recurse=False)
            if f"{prefix}.{local}".lstrip(".") in problem.params and uses[id(parameter)] == 1
        )
        layer_type = LAYERS.get(type(module))
        if layer_type is not None and parameter_names and parameter_names <= layer_type.parameters:
            layer = layer_type(module, parameter_names, tuning)
            # Most modules contribute as a whole: these cannot be taken if their parameters belong to several parts.
            if layer_type.separable or len({problem.part_name(name) for name in parameters_of(prefix, layer)}) == 1:
                layers[prefix] = layer
    return layers


def _train_probes(problem: KernelProblem, tuning: Tuning) -> Iterator[Batch]:
    """Yield batches of unlike train examples: one alone, several at once."""
    alone = problem.typical_example
    yield problem.train.batch([alone])
    groups = _unlike(problem.train, tuning.num_autograd_probes, tuning)
    if all(len(group) < tuning.probe_batch for group in groups):
        groups.append([alone] * tuning.probe_batch)  # so that the number of examples differs from that of tokens
    yield from map(problem.train.batch, groups)


def _x_probes(problem: KernelProblem, tuning: Tuning) -> Iterator[Batch]:
    """Yield batches of unlike examples of the other side, if that is not the train side again."""
    if problem.x is not None and len(problem.x):
        yield from map(problem.x.batch, _unlike(problem.x, tuning.probe_batch, tuning))


def _unlike(examples: Examples, count: int, tuning: Tuning) -> list[list[int]]:
    """Choose examples from the shortest to the longest, and group them into batches in which they are not in order."""
    order = sorted(range(len(examples)), key=lambda index: examples.shapes[index])
    spread = list(dict.fromkeys(order[round(k * (len(order) - 1) / (count - 1))] for k in range(count)))
    mixed = [spread[k] for k in sorted(range(len(spread)), key=lambda k: 3 * k % 7)]
    if examples.equal_lengths:
        ordered = sorted(mixed, key=lambda index: examples.shapes[index])
        return equal_shape_batches(examples, ordered, tuning.probe_batch)
    size = max(1, min(tuning.probe_batch, tuning.probe_tokens // max(examples.shapes[order[-1]], 1)))
    return [mixed[start : start + size] for start in range(0, len(mixed), size)]


def _matching_autograd(
    layers: dict[str, Layer], model: ModuleModel, batch: Batch, tuning: Tuning, gradient_bytes: int
) -> dict[str, Layer]:
    """Keep the layers whose contribution to the kernel of some examples is that of their gradients.

    It compares a sum of the logits with random weights, wᵀK w = ‖∇ Σ w f‖², which needs the memory of one gradient; the
    gradients of all logits could exceed memory. Each example has its own weights, which tells the examples' gradients
    apart.
    """
    try:
        captured = capture.forward_backward(layers, model, batch)
        layers = {name: layer for name, layer in layers.items() if name not in captured.irregular}
        wanted = [name for prefix, layer in layers.items() for name in parameters_of(prefix, layer)]
        if not wanted:
            return {}
        weights = torch.randn(captured.logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        logits, squares = _squared_gradients(wanted, model, batch, weights.to(captured.logits), gradient_bytes)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:  # the model may raise anything
        cause = f"{type(error).__name__}: {error}"
        logger.warning("no layer can be factored (%s): every parameter goes to the jacobian engine", cause)
        return {}
    if not torch.allclose(captured.logits.detach(), logits, rtol=1e-4, atol=1e-5, equal_nan=True):
        return {}  # hooks change what the modules do
    if not logits.isfinite().all():
        return layers  # NaN agrees with nothing
    dtype = next(model.module.parameters()).dtype
    workspace = Workspace(tuning.min_buffer_bytes, dtype, logits.device)
    kept = {}
    for prefix, layer in layers.items():
        truth = sum(squares[name] for name in parameters_of(prefix, layer))
        try:
            factors = layer.factors(captured.inputs[prefix], captured.gradients.pop(prefix))
            kernel = layer.kernel([factors], [factors], [UNSIGNED], workspace)[0].cpu()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, LookupError) as error:
            cause = f"{type(error).__name__}: {error}"
            logger.warning("%s cannot be factored (%s): its parameters go to the jacobian engine", prefix, cause)
            continue
        weighted = torch.einsum("ia,iajb,jb->iajb", weights, kernel, weights)
        # Terms that cancel in the sum were rounded before.
        of_terms = 3e-2 if dtype == torch.bfloat16 else 1e-3
        allowed = _tolerance(dtype, logits.device) * (truth + of_terms * float(weighted.abs().sum()))
        if abs(float(weighted.sum()) - truth) <= allowed:
            kept[prefix] = layer
    return kept


def _tolerance(dtype: torch.dtype, device: torch.device) -> float:
    if dtype == torch.float64:
        return 1e-6  # some models compute in float32 somewhere whatever their dtype
    if dtype == torch.bfloat16:
        # Two backward passes of SmolLM2's 30 layers differ by up to 0.16; a wrong layer, such as a weight used twice,
        # misses the terms of half its gradient.
        return 0.3
    # TF32 rounds every factor to three digits.
    return 1e-2 if device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32" else 1e-3


def _squared_gradients(
    wanted: Sequence[str], model: ModuleModel, batch: Batch, weights: Tensor, gradient_bytes: int
) -> tuple[Tensor, dict[str, float]]:
    """Return the logits, and the squared norm of each parameter's gradient of their sum with weights.

    Args:
        wanted: The names of the parameters.
        model: The model; which of its parameters require gradients is as before afterwards.
        batch: B examples.
        weights: The weight of each logit, ``[B, C]``.
        gradient_bytes: Gradients in memory at a time, in bytes; one parameter's may be larger.
    """
    own: dict[str, nn.Parameter] = dict(model.module.named_parameters())
    before = {name: parameter.requires_grad for name, parameter in own.items()}
    squares = {}
    try:
        for name, parameter in own.items():
            parameter.requires_grad_(name in wanted)
        with torch.enable_grad():
            logits = model(batch)
            total = (logits * weights).sum()
        left = list(wanted)
        while left:
            group = [left.pop()]
            while left and bytes_of([own[name] for name in (*group, left[-1])]) <= gradient_bytes:
                group.append(left.pop())
            gradients = torch.autograd.grad(
                total, [own[name] for name in group], retain_graph=bool(left), materialize_grads=True
            )
            for name, gradient in zip(group, gradients, strict=True):
                squares[name] = float(torch.linalg.vector_norm(gradient, dtype=torch.float64) ** 2)
            del gradients
    finally:
        for name, requires_grad in before.items():
            own[name].requires_grad_(requires_grad)
    return logits.detach(), squares
