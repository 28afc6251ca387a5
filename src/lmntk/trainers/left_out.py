"""What leave-one-out says of a fitted `lstsq`: metrics beside those of dev and test."""

import logging
import math

import numpy as np
from threadpoolctl import threadpool_limits

from lmntk.errors import SolverError
from lmntk.solvers.ridge_problem import RidgeProblem
from lmntk.solvers.selection import Score

logger = logging.getLogger(__name__)


def leave_one_out_metrics(problem: RidgeProblem, metric: str, score: Score) -> dict[str, float]:
    """Score the train examples, each predicted by `lstsq` fitted to all others.

    Args:
        problem: The least-squares problem that `lstsq` has fitted.
        metric: The name of the score, such as ``"acc"``.
        score: Scores the predicted logits of the train examples, ``[E, C]``.

    Returns:
        ``loo_acc`` (named by the metric), ``loo_loss``, the mean squared error, and ``gcv`` where an example has one
        sample; nothing where leave-one-out is not defined, and a line in the log says which λ would do.
    """
    with threadpool_limits(limits=1), np.errstate(over="ignore", invalid="ignore"):
        try:
            left_out = problem.leave_one_out()
        except SolverError as error:
            logger.info("the metrics loo_%s, loo_loss and gcv are left out: %s", metric, error)
            return {}
        found = {f"loo_{metric}": score(left_out), "loo_loss": problem.leave_one_out_loss()}
        gcv = problem.gcv()
        if not math.isnan(gcv):
            return found | {"gcv": gcv}
        reason = "it takes the prompts of an example for independent examples" if problem.samples > 1 else "it is 0 / 0"
        logger.info("the metric gcv is left out: %s", reason)
        return found
