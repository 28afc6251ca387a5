#!/usr/bin/env bash
# scikit-learn 1.9: check_estimator and an estimator that takes texts.
#
# Expected: an estimator whose input is strings declares so in its tags (`two_d_array = False`, `string = True`), and
#           check_estimator runs the checks that do not need numbers: clone, get_params, fit returns self, not fitted …
# Found:    it runs one check, that the estimator can be cloned, and nothing that calls fit or predict; a warning says so.
#           A classifier whose `fit` and `predict` do nothing and return None passes.
# Effect:   "passes check_estimator" says nothing of a classifier of texts. Wrap it so that it takes numbers, and check that.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check scikit-learn==1.9.1 numpy==2.4.1
"$place/venv/bin/python" - <<'PY'
import sys
import warnings

import sklearn
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.estimator_checks import check_estimator


class Broken(ClassifierMixin, BaseEstimator):
    def __init__(self, word="good"):
        self.word = word

    def fit(self, texts, labels):
        return None  # the convention is self

    def predict(self, texts):
        return None


class BrokenOfTexts(Broken):
    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.string = False, True
        return tags


print("scikit-learn", sklearn.__version__)
try:
    check_estimator(Broken())
    of_numbers = "passes"
except Exception as error:
    of_numbers = f"fails: {type(error).__name__}"
print("the broken classifier, declared as one of numbers:", of_numbers)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        names = [result["check_name"] for result in check_estimator(BrokenOfTexts())]
    except Exception as error:
        sys.exit(f"check_estimator now refuses the broken classifier of texts: {type(error).__name__}")
print("the same, declared as one of texts: passes", len(names), "checks:", *names)
print("warnings:", [str(warning.message)[:80] for warning in caught])
sys.exit(0 if of_numbers != "passes" else "check_estimator no longer refuses the broken classifier of numbers")
PY
