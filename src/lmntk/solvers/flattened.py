"""Classifiers of several logits as the published program has them: one model of two classes on the flattened kernel.

Every logit of an example is a row of its own, ``[N·C]`` in all, of class 1 where it is the logit of the example's class
and of class 0 elsewhere. What the model says of the C rows of an example are its logits. All rows of the model are
treated alike: nothing tells it that just one of an example's logits is of class 1.
"""

import numpy as np
from scipy.special import log_expit

from lmntk.solvers import lbfgs
from lmntk.solvers.logistic import cross_validation_folds, fit_rows
from lmntk.solvers.problem import ClassIds, FitInputs, Predict, PredictInputs, Prediction, squared_error, targets
from lmntk.solvers.svm import classification


def logistic(train: FitInputs) -> Predict:
    """Logistic regression on the rows of the flattened kernel; logits: log-odds; loss: a mean over all rows."""
    rows = _one_hot(train.classes, train.num_logits)
    fit = lbfgs.fit_rows if train.settings.plain_lbfgs else fit_rows
    weights, intercepts = fit(train.flat(), rows, cross_validation_folds(rows, 2))

    def predict(x: PredictInputs) -> Prediction:
        log_odds = x.flat().T @ weights[0] + intercepts[0]
        wanted = _one_hot(x.classes, train.num_logits)
        loss = -float(np.mean(log_expit(np.where(wanted, log_odds, -log_odds))))
        return Prediction(log_odds.reshape(-1, train.num_logits), loss, {})

    return predict


def svc(train: FitInputs) -> Predict:
    """Support vector classification of the rows; logits: decisions, -1 or +1, of which the first largest predicts.

    The loss is the published one too: the mean squared difference between the decisions and the targets 0 and 1.
    """
    values = classification(train.flat(), _one_hot(train.classes, train.num_logits) == 1)

    def predict(x: PredictInputs) -> Prediction:
        # libsvm decides for class 1 at 0.
        decisions = np.where(values(x.flat().T) >= 0, 1.0, -1.0)
        loss = squared_error(decisions, targets(x.classes, train.num_logits).reshape(-1))
        return Prediction(decisions.reshape(-1, train.num_logits), loss, {})

    return predict


def _one_hot(classes: ClassIds, num_logits: int) -> ClassIds:
    """Class ids ``[N]`` as the classes of the rows, ``[N·C]``."""
    return np.eye(num_logits, dtype=np.int64)[classes].reshape(-1)
