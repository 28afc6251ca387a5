"""The empirical neural tangent kernel of any module or function, in one call."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lmntk.kernels import functional
from lmntk.kernels.assembly import assemble, make_engine
from lmntk.kernels.batching import Batch
from lmntk.kernels.engines import ENGINES, KernelProblem
from lmntk.kernels.formulas import FORMULAS, Formula
from lmntk.kernels.problem import Block, Parameters
from lmntk.kernels.user_batches import read_batches


def empirical_ntk(
    model: nn.Module | Callable[[Parameters, Batch], Any],
    train_batches: Iterable[Any],
    x_batches: Iterable[Any] | None = None,
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
            not; there are no train examples; a side is no list of batches; a batch is not of tensors, they differ in
            their number of examples, or it may or may not have labels; the model cannot be called with it; the outputs
            are no tensor ``[B, C]``; they are drawn, or let examples see each other; NaN or infinity, whose parameter
            or example is named.
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
    # Other parameters of the model, or what a function closes over, may ask for gradients.
    with torch.inference_mode(False), torch.no_grad():
        problem = _problem(model, train_batches, x_batches, params, FORMULAS[formula])
        values = problem.params | functional.scaled_down(problem)
        problem = replace(problem, params={name: values[name] for name in problem.params})
        with functional.standing_at(model, values) if isinstance(model, nn.Module) else nullcontext():
            if not functional.stands_at(problem.module, values):
                problem = replace(problem, module=None, call=None)  # it would be asked at its own parameters
            problem = replace(problem, num_logits=_number_of_logits(problem))
            chosen = make_engine(problem, engine, memory_gb)
            plan = chosen.plan(train_tile, x_tile)
            kernel = assemble(progress(chosen.blocks(plan)), plan, problem)
            _check_finite(kernel, functional.named(model) | problem.params)
    return kernel if problem.formula.is_asymmetric else kernel[0]


def _problem(
    model: nn.Module | Callable[[Parameters, Batch], Any],
    train_batches: Iterable[Any],
    x_batches: Iterable[Any] | None,
    params: Parameters | None,
    formula: Formula,
) -> KernelProblem:
    """Return the kernel that is asked for, its number of logits left open."""
    module: nn.Module | None
    if isinstance(model, nn.Module):
        module, params = model, functional.parameters_of(model, params)
        logits_fn, call = functional.as_function(model), functional.caller(model)
    elif params:
        module, call, logits_fn = None, None, functional.with_logits(model)
    else:
        raise ValueError("a function needs `params`, the point at which its gradients are taken")
    device = next(iter(params.values())).device
    train = read_batches("train_batches", train_batches, module, device)
    if not len(train):
        raise ValueError("`train_batches` holds no example")
    x = None if x_batches is None else read_batches("x_batches", x_batches, module, device)
    return KernelProblem(logits_fn, params, train, x, formula, 0, module, call)


def _number_of_logits(problem: KernelProblem) -> int:
    """Return C, after seeing that an example's outputs depend on neither the call nor the rest of the batch."""
    examples = problem.train
    like = [index for index, shape in enumerate(examples.shapes) if shape == examples.shapes[0]]
    try:
        outputs = problem.logits_fn(problem.params, examples.batch([0, like[-1]]))
        alone, *_ = [problem.logits_fn(problem.params, side.batch([0])) for side in (examples, problem.x) if side]
    except Exception as error:  # a model raises whatever it likes at what it cannot take
        raise ValueError(f"the model cannot be called with the examples: {type(error).__name__}: {error}") from error
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or len(outputs) != 2:
        found = f"a tensor {list(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise ValueError(
            f"of a batch of 2 examples the model returns {found}, and not its outputs as a tensor [2, C]: wrap it in a "
            "module or function that does"
        )
    allowed = max(torch.finfo(outputs.dtype).eps ** 0.5, 1e-4) * float(outputs.nan_to_num(0, 0, 0).abs().max())
    if not torch.allclose(outputs[:1], alone, rtol=0, atol=allowed, equal_nan=True):
        raise ValueError(
            "the model's outputs of an example differ from call to call, or with the other examples of its batch: "
            "switch dropout off, and let examples not see each other"
        )
    return outputs.shape[1]


def _check_finite(kernel: Tensor, params: Parameters) -> None:
    """Stop at NaN or infinity in a kernel, ``[D, N, C, X, C]``, and name the parameter or the example that has it."""
    pairs = (~kernel.isfinite()).any(dim=4).any(dim=2).any(dim=0)
    if not pairs.any():
        return
    for name, value in params.items():
        if not value.isfinite().all():
            raise ValueError(f"the parameter {name!r} holds NaN or infinity")
    rows, columns = pairs.all(dim=1), pairs.all(dim=0)
    if rows.any():
        whose = f"train example {int(rows.nonzero()[0])}"
    elif columns.any():
        whose = f"example {int(columns.nonzero()[0])} of `x_batches`"
    else:
        whose = "train example {} with example {} of the other side".format(*pairs.nonzero()[0].tolist())
    raise ValueError(f"the kernel holds NaN or infinity, first at {whose} (counted from 0): look at that example")
