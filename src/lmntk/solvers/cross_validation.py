"""Cross-validation as the published program asks scikit-learn for it."""

import logging
from typing import Any

import numpy as np

from lmntk.errors import SolverError
from lmntk.solvers.problem import ClassIds

logger = logging.getLogger(__name__)

MOST_FOLDS = 5


def cross_validation_folds(
    train_classes: ClassIds, num_classes: int, remedy: str = "take `kernel_solver=lstsq`"
) -> int:
    """Choose the folds of cross-validation: five, or as many as the smallest class has examples.

    Args:
        train_classes: Class ids, [N].
        num_classes: The number of classes.
        remedy: What the error suggests beside more examples.

    Raises:
        SolverError: A class has fewer than two examples, so that no fold can both train and test on it.
    """
    counts = np.bincount(train_classes, minlength=num_classes)
    label, smallest = int(counts.argmin()), int(counts.min())
    if smallest < 2:
        raise SolverError(
            f"class {label} has {smallest} training example{'' if smallest else 's'}, but logistic regression is "
            f"cross-validated and needs two of each: raise K, or {remedy}",
            solver="logistic",
            label=label,
        )
    if smallest < MOST_FOLDS:
        message = "class %d has %d training examples: %d folds instead of %d"
        logger.warning(message, label, smallest, smallest, MOST_FOLDS)
    return min(MOST_FOLDS, smallest)


def cross_validated(folds: int, **options: Any) -> Any:
    """The published program's `LogisticRegressionCV`, not fitted yet.

    Args:
        folds: The number of folds.
        **options: Further arguments of scikit-learn.
    """
    from sklearn.linear_model import LogisticRegressionCV

    return LogisticRegressionCV(
        random_state=0,
        cv=folds,
        # The defaults so far (L2, accuracy), spelled out because scikit-learn is about to change them.
        l1_ratios=(0.0,),
        scoring="accuracy",
        use_legacy_attributes=False,
        **options,
    )
