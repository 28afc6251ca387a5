#!/usr/bin/env bash
# scikit-learn 1.9: RidgeCV, whose leave-one-out errors are in closed form, with sample weights.
#
# Expected: cv_results_ holds the squared error of each example left out, as really refitting gives it, and best_score_
#           is their weighted mean, as it is with scoring="neg_mean_squared_error".
# Found:    without `scoring` each error is multiplied by the example's weight, and best_score_ is the plain mean of
#           these products: with weights whose mean is 2 it is about twice the error. The two spellings of one criterion
#           differ, and scores of fits with other weights cannot be compared.
# Effect:   leave-one-out of reweighted train examples seems to get better with smaller weights.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 scipy==1.17.1 scikit-learn==1.9.1
cd "$place"
venv/bin/python - <<'PY'
import sys

import numpy as np
import sklearn
from sklearn.linear_model import Ridge, RidgeCV

print("scikit-learn", sklearn.__version__)
random = np.random.default_rng(0)
features, targets, weights = random.normal(size=(30, 5)), random.normal(size=30), random.uniform(1, 3, 30)
errors = np.empty(30)
for left_out in range(30):
    rest = np.arange(30) != left_out
    model = Ridge(1.0).fit(features[rest], targets[rest], sample_weight=weights[rest])
    errors[left_out] = (targets[left_out] - model.predict(features[[left_out]])[0]) ** 2
plain = RidgeCV([1.0], store_cv_results=True).fit(features, targets, sample_weight=weights)
named = RidgeCV([1.0], scoring="neg_mean_squared_error").fit(features, targets, sample_weight=weights)
ratio = plain.cv_results_[:, 0] / errors / weights
print(f"stored error / (real error × weight): {ratio.min():.9f} to {ratio.max():.9f}")
print(f"weighted mean of real errors:                     {np.average(errors, weights=weights):.6f}")
print(f"best_score_ with scoring named:                   {-named.best_score_:.6f}")
print(f"best_score_ without: {np.mean(errors * weights):.6f} is the mean of products, {-plain.best_score_:.6f}")
as_described = (
    np.allclose(ratio, 1, atol=1e-9)
    and np.isclose(-named.best_score_, np.average(errors, weights=weights))
    and np.isclose(-plain.best_score_, np.mean(errors * weights))
)
sys.exit(0 if as_described else "the errors are now weighted in another way")
PY
