#!/usr/bin/env bash
# scikit-learn 1.4 and 1.8: LogisticRegressionCV of two classes, and what its decision function means.
#
# Expected: decision_function is the log-odds of the second class, whatever multi_class says: so the binary fit has it.
# Found:    in 1.4, multi_class="multinomial" fits a softmax of (-s, s): decision_function and coef_ are half of the
#           log-odds, and the penalty is that of a binary fit whose C is twice as large. 1.8 has no multi_class, and the
#           same call without it gives the whole log-odds of the binary fit at C.
# Effect:   a linear head written from coef_ with 1.4 has half the logits of one written with 1.8; every kernel that is
#           computed at such a head differs, and so do published ones from new ones.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cat >"$place/fit.py" <<'PY'
import json
import sys
import warnings

import numpy as np
import sklearn
from sklearn.linear_model import LogisticRegressionCV

warnings.simplefilter("ignore")
x = np.random.default_rng(0).normal(size=(40, 5))
y = (x[:, 0] + np.random.default_rng(1).normal(size=40) > 0).astype(int)


def fit(c, **options):
    model = LogisticRegressionCV(Cs=[c], cv=5, max_iter=10000, tol=1e-10, **options).fit(x, y)
    p = model.predict_proba(x)
    odds = np.log(p[:, 1] / p[:, 0])
    return {"share": float((model.decision_function(x) / odds).mean()), "coef": model.coef_[0].tolist()}


old = sklearn.__version__ < "1.5"
found = {"multinomial": fit(0.7, multi_class="multinomial")} if old else {}
found |= {"at C": fit(0.7), "at 2 C": fit(1.4)}
print("scikit-learn", sklearn.__version__, {name: round(row["share"], 4) for name, row in found.items()})
print(json.dumps(found), file=open(sys.argv[1], "w"))
PY
for pins in "scikit-learn==1.4.2 numpy==1.26.4" "scikit-learn==1.8.0 numpy==2.4.1"; do
    python3 -m venv "$place/venv-${pins:14:3}"
    # shellcheck disable=SC2086
    "$place/venv-${pins:14:3}/bin/pip" install --quiet --disable-pip-version-check $pins
    "$place/venv-${pins:14:3}/bin/python" "$place/fit.py" "$place/${pins:14:3}.json"
done
python3 - "$place/1.4.json" "$place/1.8.json" <<'PY'
import json
import sys

old, new = (json.load(open(path)) for path in sys.argv[1:])


def alike(first, second, factor):
    return all(abs(a - factor * b) < 1e-5 for a, b in zip(first["coef"], second["coef"], strict=True))


multinomial = old["multinomial"]
checks = {
    "1.4: multinomial's decision function is half the log-odds": abs(multinomial["share"] - 0.5) < 1e-6,
    "1.4: its coefficients are half of the binary fit's at 2 C": alike(multinomial, old["at 2 C"], 0.5),
    "1.4 and 1.8: the binary fits are the same": alike(old["at C"], new["at C"], 1) and abs(new["at C"]["share"] - 1) < 1e-6,
}
for what, holds in checks.items():
    print("holds" if holds else "NO LONGER", what, sep=": ")
sys.exit(not all(checks.values()))
PY
