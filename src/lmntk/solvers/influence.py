"""What train examples add to the predictions of `lstsq`, in closed form: exact, without fitting again.

Letters: E train examples, which have N = E · samples rows of the kernel, X examples to predict, C logits, G groups of
train examples that leave together.
"""

import numpy as np
from numpy.typing import ArrayLike
from threadpoolctl import threadpool_limits

from lmntk.errors import KernelMismatchError
from lmntk.solvers.problem import Array
from lmntk.solvers.ridge_problem import RidgeProblem


def influence(problem: RidgeProblem, x_kernel: ArrayLike, groups: ArrayLike | None = None, x_samples: int = 1) -> Array:
    """Return f(x) − f₋g(x): what each group of train examples adds to each prediction, in units of logits.

    f₋g is `lstsq` fitted to all other groups, with the term λ‖K‖₂ of the whole kernel. With A = K + λ‖K‖₂ I, B = A⁻¹
    and α = B y, the difference is (k_xᵀ B)_g B_gg⁻¹ α_g: the inverse of a bordered matrix, as in the prediction sum of
    squares (Allen 1974, "The Relationship between Variable Selection and Data Augmentation and a Method for
    Prediction"). f₀ of x falls out of the difference.

    Args:
        problem: The least-squares problem of the train examples.
        x_kernel: The kernel of train and x, ``[N, C, X · x_samples, C]``, or with a leading 2, of which [0] counts.
        groups: The number of each train example's group, ``[E]`` integers; by default each example is a group.
        x_samples: How many columns of the kernel each example x has, whose predictions are averaged.

    Returns:
        float64 ``[G, X, C]``, the groups in the order of their numbers; ``[E, X, C]`` by default.

    Raises:
        SolverError: A is singular; names a λ that would do.
        KernelMismatchError: The arrays do not match.

    Examples:
        >>> train = np.array([[2.0, 1.0], [1.0, 2.0]]).reshape(2, 1, 2, 1)
        >>> problem = RidgeProblem(train, np.array([1.0, -1.0]))
        >>> influence(problem, np.array([1.0, 0.0]).reshape(2, 1, 1, 1))[:, 0, 0].round(9).tolist()
        [1.0, 0.5]
    """
    given = np.asarray(x_kernel, dtype=np.float64)
    kernel = given[0] if given.ndim == 5 else given
    rows = (*problem.targets.shape, problem.num_logits)
    if kernel.ndim != 4 or kernel.shape[:2] + kernel.shape[3:] != rows or kernel.shape[2] % x_samples:
        raise KernelMismatchError(
            f"the kernel of {rows[0]} train rows and {rows[1]} logits and that of train and x {list(given.shape)} do "
            f"not go together: x must be [N, C, X, C] with {x_samples} columns for each example",
            shapes=[rows, given.shape],
        )
    with threadpool_limits(limits=1):
        left_out = problem.left_out_groups(groups)
        found = left_out.influence(problem.targets - problem.offset, kernel, problem.settings.regularization)
    return found.reshape(len(found), x_samples, -1, problem.num_logits).mean(axis=1)
