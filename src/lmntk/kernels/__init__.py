"""Empirical neural tangent kernels of any function of parameters: torch only, usable alone in a notebook.

The letters, everywhere in this package:

* ``N`` train examples, the kernel's first axis; ``n`` of them in a tile
* ``X`` examples along the kernel's other axis (train, dev or test); ``x`` of them in a tile
* ``C`` logits an example has; ``D`` directions of a formula (two if it is asymmetric, else one)
* ``G`` layers whose parts of the kernel are kept apart (one if none are); ``S`` = G · D slices of a block
* ``B`` examples in a batch, ``L`` tokens, ``d`` features, ``p`` numbers in a parameter
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from lmntk.kernels.engines import ENGINES, Engine, KernelProblem
from lmntk.kernels.engines.base import Block, MemoryBudgetError, Parameters
from lmntk.kernels.examples import Batch, BatchedExamples, Examples
from lmntk.kernels.formulas import FORMULAS, Formula
from lmntk.kernels.machine import DEFAULT_FRACTION, free_bytes
from lmntk.kernels.tiling import Plan

__all__ = [
    "ENGINES",
    "FORMULAS",
    "BatchedExamples",
    "Engine",
    "Examples",
    "Formula",
    "KernelProblem",
    "MemoryBudgetError",
    "Plan",
    "assemble",
    "empirical_ntk",
    "make_engine",
]


def make_engine(problem: KernelProblem, engine: str = "auto", memory_gb: float | None = None) -> Engine:
    """Build the engine of that name for a kernel.

    Args:
        problem: The kernel.
        engine: A key of `ENGINES`, or ``"auto"`` for the fastest: `factored`, or `jacobian` where there is no module.
        memory_gb: What it may take beside the model itself, in 2**30 bytes; by default 60% of what is free.
    """
    device = next(iter(problem.params.values())).device
    budget = memory_gb * 2**30 if memory_gb is not None else DEFAULT_FRACTION * free_bytes(device)
    if engine == "auto":
        engine = "jacobian" if problem.module is None else "factored"
    return ENGINES[engine](problem, int(budget))


def assemble(blocks: Iterable[Block], plan: Plan, problem: KernelProblem) -> Tensor:
    """Put the blocks of a kernel, or of one process's share of it, in their places.

    Args:
        blocks: What an engine yields.
        plan: The plan they belong to.
        problem: The kernel.

    Returns:
        float64 ``[S, N, C, X, C]`` on the CPU; zero where no block came.
    """
    c = problem.num_logits
    kernel = torch.zeros(problem.slices, plan.train_size, c, plan.x_size, c, dtype=torch.float64)
    for tile, values in blocks:
        train, x = torch.tensor(tile.train), torch.tensor(tile.x)
        block = values.cpu()
        mirrored = block.permute(0, 3, 4, 1, 2)
        if plan.symmetric and tile.train == tile.x:
            # Products of floats in another order: what is symmetric but for rounding is made so to the bit.
            block = (block + mirrored) / 2
        kernel[:, train[:, None], :, x[None, :], :] += block.permute(1, 3, 0, 2, 4)
        if plan.symmetric and tile.train != tile.x:
            kernel[:, x[:, None], :, train[None, :], :] += mirrored.permute(1, 3, 0, 2, 4)
    return kernel


def empirical_ntk(
    model: nn.Module | Callable[[Parameters, Batch], Tensor],
    train_batches: Iterable[Batch],
    x_batches: Iterable[Batch] | None = None,
    *,
    params: Parameters | None = None,
    formula: str = "sgd",
    engine: str = "auto",
    train_tile: int | None = None,
    x_tile: int | None = None,
    memory_gb: float | None = None,
    progress: Callable[[Iterator[Block]], Iterable[Block]] = iter,
) -> Tensor:
    """Compute the empirical neural tangent kernel of a model's outputs.

    Args:
        model: A module that takes a batch (a dict by keyword, a tuple by position, a tensor alone) and returns
            ``[B, C]``, or a function `f(params, batch) -> [B, C]`` of its parameters. Its examples must not see each
            other: batch normalisation in train mode is out. Dropout should be off (`model.eval()`).
        train_batches: The examples along the first axis: pytrees of tensors ``[B, ...]``.
        x_batches: The examples along the other axis; None for the kernel of the train examples with themselves.
        params: The parameters over which gradients are taken, and where; by default all of a module's, as they are.
        formula: ``"sgd"``, ``"signgd"`` or ``"asymmetric_signgd"`` (see `lmntk.kernels.formulas`).
        engine: ``"auto"``, or a key of `ENGINES`.
        train_tile: How many train examples an engine takes at a time; by default what suits it.
        x_tile: The same for the other axis. Tiles change the result by rounding only.
        memory_gb: What may be taken beside the model itself, in 2**30 bytes; by default 60% of what is free.
        progress: Wraps the iterator of finished blocks, e.g. with `tqdm`.

    Returns:
        float64 ``[N, C, X, C]``, ``kernel[i, a, j, b] = Σ_θ ∂f_a(i)/∂θ · ∂f_b(j)/∂θ`` or what the formula makes of it
        (Malladi et al. 2023, sections 3 and 4); ``[2, N, C, X, C]`` for an asymmetric formula, the sign standing
        on the train side in the first and on the other side in the second.

    Raises:
        ValueError: There is no such formula or engine; `params` is missing for a function, or names what a module has
            not; there are no train examples; a side is no list of batches; a batch's tensors differ in their number of
            examples; the outputs are no tensor ``[B, C]``; a module would draw dropout, or let examples see each other.
        MemoryBudgetError: `memory_gb` is too small for the smallest tile.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> empirical_ntk(model, [x])[:, 0, :, 0]  # of a linear model with bias: xᵀx' + 1
        tensor([[ 6., 12.],
                [12., 26.]], dtype=torch.float64)
    """
    for name, known, what in ((formula, FORMULAS, "formula"), (engine, ("auto", *ENGINES), "engine")):
        if name not in known:
            raise ValueError(f"there is no {what} {name!r}, but {', '.join(known)}")
    module = model if isinstance(model, nn.Module) else None
    call: Callable[[Batch], Tensor] | None = None
    if module is not None:
        logits_fn, call = _as_function(module), _caller(module)
        own, params = _parameters(module, params)
        if any(not torch.equal(value, own[name]) for name, value in params.items()):
            module = call = None  # its modules would be asked at their own parameters, not at these
    elif not params:
        raise ValueError("a function needs `params`, the point at which its gradients are taken")
    else:
        logits_fn = model
    train = _examples("train_batches", train_batches)
    if not len(train):
        raise ValueError("`train_batches` holds no example")
    x = None if x_batches is None else _examples("x_batches", x_batches)
    num_logits = _number_of_logits(logits_fn, params, train)
    problem = KernelProblem(logits_fn, params, train, x, FORMULAS[formula], num_logits, module, call)
    with torch.no_grad():  # the model's other parameters, or what a function closes over, may ask for gradients
        chosen = make_engine(problem, engine, memory_gb)
        plan = chosen.plan(train_tile, x_tile)
        kernel = assemble(progress(chosen.blocks(plan)), plan, problem)
    return kernel if problem.formula.two_directions else kernel[0]


def _parameters(module: nn.Module, params: Parameters | None) -> tuple[Parameters, Parameters]:
    """Return a module's parameters and those asked for, after seeing that outputs are functions of one example each."""
    for name, part in module.named_modules():
        which = f"{name or 'the model'}, a {type(part).__name__},"
        if isinstance(part, _DropoutNd) and part.training and part.p > 0:
            raise ValueError(f"{which} draws anew at every call: `model.eval()` first")
        if isinstance(part, _BatchNorm) and (part.training or part.running_mean is None):
            raise ValueError(f"{which} lets examples see each other: give it running statistics, and `model.eval()`")
    own = {name: value.detach() for name, value in module.named_parameters()}
    params = own if params is None else params
    unknown = [name for name in params if name not in own]
    if unknown or not params:
        raise ValueError(f"`params` names {unknown[0]!r}, which the module has not" if unknown else "no parameters")
    for name, value in params.items():
        if value.shape != own[name].shape:
            raise ValueError(f"`params` has {list(value.shape)} for {name!r}, which is {list(own[name].shape)}")
    return own, params


def _examples(name: str, batches: Iterable[Batch]) -> BatchedExamples:
    if isinstance(batches, Tensor | Mapping):
        raise ValueError(f"`{name}` is one batch, but a list of batches is asked for: `[batch]`")
    return BatchedExamples(batches)


def _number_of_logits(
    logits_fn: Callable[[Parameters, Batch], Tensor], params: Parameters, examples: BatchedExamples
) -> int:
    with torch.no_grad():
        outputs = logits_fn(params, examples.batch([0, 0]))
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or len(outputs) != 2:
        found = f"a tensor {list(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise ValueError(
            f"of a batch of 2 examples the model returns {found}, and not its outputs as a tensor [2, C]: wrap it in a "
            "module or function that does"
        )
    return outputs.shape[1]


def _caller(module: nn.Module) -> Callable[[Batch], Tensor]:
    def call(batch: Batch) -> Tensor:
        if isinstance(batch, dict):
            return module(**batch)
        return module(*batch) if isinstance(batch, tuple) else module(batch)

    return call


def _as_function(module: nn.Module) -> Callable[[Parameters, Batch], Tensor]:
    def logits_fn(params: Parameters, batch: Batch) -> Tensor:
        if isinstance(batch, dict):
            return functional_call(module, params, kwargs=batch)
        return functional_call(module, params, batch if isinstance(batch, tuple) else (batch,))

    return logits_fn
