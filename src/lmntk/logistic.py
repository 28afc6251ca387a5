"""Cross-validated logistic regression, as the published program asks scikit-learn for it: of kernels, linear heads."""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.linalg import LinAlgWarning

from lmntk.errors import UsageError
from lmntk.solver_problem import Array, ClassIds

logger = logging.getLogger(__name__)

MOST_FOLDS = 5

# Logistic regression, see `_fit_large`: the most train examples that are fitted exactly as in the published program,
# the iterations of L-BFGS after which Newton's method takes over, and the most unknowns its matrix may have.
LARGE = 256
FEW_ITERATIONS = 500
MOST_UNKNOWNS = 2048


def cross_validation_folds(
    train_classes: ClassIds, num_classes: int, way_out: str = "take --kernel_solver lstsq"
) -> int:
    """Choose the folds of cross-validation: five, or as many as the smallest class has examples.

    Args:
        train_classes: Class ids, [N].
        num_classes: The number of classes.
        way_out: What the error names beside more examples.

    Raises:
        UsageError: A class with fewer than two examples, which no split can both train and test on.
    """
    counts = np.bincount(train_classes, minlength=num_classes)
    label, smallest = int(counts.argmin()), int(counts.min())
    if smallest < 2:
        raise UsageError(
            f"class {label} has {smallest} training example{'' if smallest else 's'}, but logistic regression is "
            f"cross-validated and needs two of each: raise K, or {way_out}"
        )
    if smallest < MOST_FOLDS:
        logger.warning("class %d has %d training examples: %d folds instead of %d", label, *[smallest] * 2, MOST_FOLDS)
    return min(MOST_FOLDS, smallest)


def cross_validated(folds: int, scale: float = 1.0, **options: Any) -> Any:
    """The published program's `LogisticRegressionCV`, not fitted yet.

    Args:
        folds: How many the cross-validation takes.
        scale: What the features were divided by: C and the tolerance follow, so that the objective is the same.
        **options: Further arguments of scikit-learn.
    """
    from sklearn.linear_model import LogisticRegressionCV

    return LogisticRegressionCV(
        Cs=np.logspace(-4, 4, 10) * scale**2,
        tol=1e-4 / scale,
        random_state=0,
        cv=folds,
        # What the defaults have always been (L2, accuracy), spelled out because scikit-learn is about to change them.
        l1_ratios=(0.0,),
        scoring="accuracy",
        use_legacy_attributes=False,
        **options,
    )


def fit_rows(features: Array, classes: ClassIds, folds: int) -> tuple[Array, Array]:
    """Fit weights [1, F] (two classes) or [C, F], and intercepts [1 or C], to features [N, F] and classes [N]."""
    return (_fit_lbfgs if len(features) <= LARGE else _fit_large)(features, classes, folds)


def _fit_lbfgs(features: Array, classes: ClassIds, folds: int, max_iter: int = 10000) -> tuple[Array, Array]:
    """The published way: features [N, F], classes [N] → weights [1, F] (two classes) or [C, F], intercepts [1 or C]."""
    model = cross_validated(folds, max_iter=max_iter).fit(features, classes)
    return model.coef_, model.intercept_


def _fit_newton(features: Array, classes: ClassIds, folds: int, scale: float) -> tuple[Array, Array]:
    """The same objective at its minimum, by Newton's method on `features` / `scale`; shapes as for `_fit_lbfgs`."""
    from sklearn.linear_model import LogisticRegression

    newton: dict[str, Any] = {"solver": "newton-cholesky", "max_iter": 100}
    search = cross_validated(folds, scale, refit=False, **newton).fit(features / scale, classes)
    # The last fit goes from C to C, as those of the folds do. scikit-learn's own would start at the mean of their
    # weights, where examples may be so far from the decision that the Hessian vanishes.
    model = LogisticRegression(warm_start=True, tol=search.tol, **newton)
    for c in search.Cs_[: search.scores_.sum(axis=0).argmax() + 1]:
        model.set_params(C=c).fit(features / scale, classes)
    return model.coef_ / scale, model.intercept_


def _fit_large(features: Array, classes: ClassIds, folds: int) -> tuple[Array, Array]:
    """`_fit_lbfgs` for more than `LARGE` examples, where it may take ten thousand iterations for each C and fold.

    Where these do not converge soon, the features are rotated to as many as their rank, which leaves the objective as
    it is, and Newton's method goes all the way to the minimum, in units in which the features are of order 1: with a
    kernel's values, 1e4 and more, it would get stuck at rounding. With too many unknowns for its matrix L-BFGS goes on.
    """
    found = _if_converged(_fit_lbfgs, features, classes, folds, FEW_ITERATIONS)
    if found is not None:
        return found
    left, singular, right = np.linalg.svd(features, full_matrices=False)
    rank = int((singular > singular[0] * np.finfo(float).eps * max(features.shape)).sum())
    rotated = left[:, :rank] * singular[:rank]
    num_classes = int(classes.max()) + 1
    if rank * (num_classes if num_classes > 2 else 1) <= MOST_UNKNOWNS:
        found = _if_converged(_fit_newton, rotated, classes, folds, singular[0] / np.sqrt(len(features)))
        if found is not None:
            logger.warning(
                "logistic regression on %d train examples: L-BFGS did not converge in %d iterations, so Newton's "
                "method was used, which goes closer to the minimum",
                *(len(features), FEW_ITERATIONS),
            )
    # The same iterates but for rounding; only their end, at a largest entry of the gradient, depends on the rotation.
    weights, intercepts = found or _fit_lbfgs(rotated, classes, folds)
    return weights @ right[:rank], intercepts


def _if_converged(fit_rows: Callable[..., tuple[Array, Array]], *args: Any) -> tuple[Array, Array] | None:
    """What a fit returns, or None as soon as scikit-learn warns that it does not converge."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        warnings.simplefilter("error", LinAlgWarning)
        try:
            return fit_rows(*args)
        except (ConvergenceWarning, LinAlgWarning):
            return None
