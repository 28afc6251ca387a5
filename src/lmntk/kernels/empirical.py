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
from lmntk.kernels.engines import ENGINES, ESTIMATES
from lmntk.kernels.formulas import FORMULAS, Formula
from lmntk.kernels.memory import MemoryBudget
from lmntk.kernels.problem import Block, FunctionModel, KernelProblem, ModuleModel, Parameters
from lmntk.kernels.projection import Projection
from lmntk.kernels.tiling import TileRequest
from lmntk.kernels.tuning import DEFAULT_TUNING, Tuning
from lmntk.kernels.user_batches import read_batches


def empirical_ntk(
    model: nn.Module | Callable[[Parameters, Batch], Any],
    train_batches: Iterable[Any],
    x_batches: Iterable[Any] | None = None,
    *,
    params: Parameters | None = None,
    formula: str = "sgd",
    engine: str = "auto",
    projection: Projection | None = None,
    train_tile: int | None = None,
    x_tile: int | None = None,
    memory_gb: float | None = None,
    tuning: Tuning = DEFAULT_TUNING,
    progress: Callable[[Iterator[Block]], Iterable[Block]] = iter,
) -> Tensor:
    """Compute the empirical neural tangent kernel of a model's outputs.

    Args:
        model: A module that takes a batch (a dict by keyword, a tuple by position, a tensor alone) and returns
            ``[B, C]``, or a function `f(params, batch) -> [B, C]` of its parameters. Outputs of one example must not
            depend on others or on chance: call `model.eval()` first.
        train_batches: The examples along the first axis: pytrees of tensors ``[B, ...]``.
        x_batches: The examples along the other axis; None for the kernel of the train examples with themselves.
        params: The parameters θ over which gradients are taken, and their values; by default all of a module's.
        formula: ``"sgd"``, ``"signgd"`` or ``"asymmetric_signgd"`` (see `lmntk.kernels.formulas`).
        engine: ``"auto"``, or a key of `ENGINES`; ``"projected"`` for an estimate.
        projection: The width and seed of the estimate, for the ``"projected"`` engine; by default `Projection()`.
        train_tile: Train examples in a tile; chosen by the engine by default. Tiles change the result by rounding only.
        x_tile: Examples of the other axis in a tile.
        memory_gb: Memory beside the model itself, in 2**30 bytes; by default that of `MemoryBudget.default`.
        tuning: Numbers that trade time for memory.
        progress: Wraps the iterator of finished blocks, for instance with `tqdm`.

    Returns:
        float64 ``[N, C, X, C]``, ``kernel[i, a, j, b] = Σ_θ ∂f_a(i)/∂θ · ∂f_b(j)/∂θ`` or what the formula makes of it
        (Malladi et al. 2023, sections 3 and 4); ``[2, N, C, X, C]`` for an asymmetric formula, with the sign on
        the train side in the first and on the other side in the second.

    Raises:
        ValueError: An argument does not fit: an unknown formula or engine, parameters that the module lacks, no train
            examples, batches that are not pytrees of tensors of one length, or labels that may be inputs. The model
            does not fit: it fails, returns no tensor ``[B, C]``, draws random numbers, or mixes examples. The kernel
            holds NaN or infinity; the parameter or example is named.
        MemoryBudgetError: `memory_gb` is too small for the smallest tile.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> empirical_ntk(model, [x])[:, 0, :, 0]  # a linear model with bias has xᵀx' + 1
        tensor([[ 6., 12.],
                [12., 26.]], dtype=torch.float64)
    """
    for name, known, what in ((formula, FORMULAS, "formula"), (engine, ("auto", *ENGINES, *ESTIMATES), "engine")):
        if name not in known:
            raise ValueError(f"there is no {what} {name!r}; choose from {', '.join(known)}")
    if engine in ESTIMATES:
        projection = projection or Projection()
    elif projection is not None:
        raise ValueError(f"`projection` is for the projected engine, and the engine is {engine}")
    # Other parameters of the model, or tensors that a function closes over, may require gradients.
    with torch.inference_mode(False), torch.no_grad():
        problem = _problem(model, train_batches, x_batches, params, FORMULAS[formula])
        values = problem.params | functional.renormed_embeddings(problem)
        problem = replace(problem, params={name: values[name] for name in problem.params})
        with functional.with_values(model, values) if isinstance(model, nn.Module) else nullcontext():
            if isinstance(problem.model, ModuleModel) and not functional.holds_values(problem.model.module, values):
                # Calling the module would compute at its own parameters.
                problem = replace(problem, model=FunctionModel(problem.model.logits_fn))
            problem = replace(problem, num_logits=_number_of_logits(problem), projection=projection)
            budget = None if memory_gb is None else MemoryBudget.from_gb(memory_gb)
            chosen = make_engine(problem, engine, budget, tuning)
            plan = chosen.plan(TileRequest(train_tile, x_tile))
            kernel = assemble(progress(chosen.blocks(plan)), plan, problem)
            _check_finite(kernel, functional.all_parameters(model) | problem.params)
    return kernel if problem.formula.is_asymmetric else kernel[0]


def _problem(
    model: nn.Module | Callable[[Parameters, Batch], Any],
    train_batches: Iterable[Any],
    x_batches: Iterable[Any] | None,
    params: Parameters | None,
    formula: Formula,
) -> KernelProblem:
    """Return the kernel that is asked for; its number of logits is found later."""
    module = model if isinstance(model, nn.Module) else None
    chosen, params = functional.engine_model(model, params)
    device = next(iter(params.values())).device
    train = read_batches("train_batches", train_batches, module, device)
    if not len(train):
        raise ValueError("`train_batches` holds no example")
    x = None if x_batches is None else read_batches("x_batches", x_batches, module, device)
    return KernelProblem(train=train, x=x, formula=formula, num_logits=0, model=chosen, params=params)


def _number_of_logits(problem: KernelProblem) -> int:
    """Return C, and check that an example's outputs depend on neither the call nor the rest of the batch."""
    examples = problem.train
    like = [index for index, shape in enumerate(examples.shapes) if shape == examples.shapes[0]]
    try:
        outputs = problem.model.logits_fn(problem.params, examples.batch([0, like[-1]]))
        alone, *_ = [problem.model.logits_fn(problem.params, side.batch([0])) for side in (examples, problem.x) if side]
    except Exception as error:  # a model may raise anything for inputs that it cannot take
        raise ValueError(f"the model cannot be called with the examples: {type(error).__name__}: {error}") from error
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or len(outputs) != 2:
        found = f"a tensor {list(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise ValueError(
            f"for a batch of 2 examples the model returns {found}, but it must return its outputs as a tensor [2, C]: "
            "wrap it in a module or function that does"
        )
    allowed = max(torch.finfo(outputs.dtype).eps ** 0.5, 1e-4) * float(outputs.nan_to_num(0, 0, 0).abs().max())
    if not torch.allclose(outputs[:1], alone, rtol=0, atol=allowed, equal_nan=True):
        raise ValueError(
            "the model's outputs for an example differ from call to call, or with the other examples of its batch: "
            "call `model.eval()`, and remove modules that mix examples"
        )
    return outputs.shape[1]


def _check_finite(kernel: Tensor, params: Parameters) -> None:
    """Raise a ValueError for NaN or infinity in a kernel, ``[D, N, C, X, C]``, that names the parameter or example."""
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
