#!/usr/bin/env bash
# dattri 0.3: dattri.metric.loo_corr, the correlation of attribution scores with really leaving examples out.
#
# Expected: its ground truth is a pair, the outputs of each retrained model and the index that each was trained without,
#           so that row m belongs to the train example indices[m].
# Found:    the indices are not read: row m is compared with train example m. Perfect scores get 1 only if examples were
#           left out in their order; with any other order the number is one of unrelated pairs, without a word.
# Effect:   leave-one-out runs that finish in another order, as parallel ones do, make exact influences look like noise.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 scipy==1.17.1 \
    scikit-learn==1.9.1 dattri==0.3.0
cd "$place"
venv/bin/python - <<'PY'
import sys
from importlib.metadata import version

import torch
from dattri.metric import loo_corr

print("dattri", version("dattri"), "torch", torch.__version__)
generator = torch.Generator().manual_seed(0)
influence = torch.randn(40, 5, generator=generator)  # train × test, exact: the outputs of leaving out are these
in_order = torch.arange(40)
shuffled = torch.randperm(40, generator=generator)
first, _ = loo_corr(influence, (influence[in_order], in_order))
second, _ = loo_corr(influence, (influence[shuffled], shuffled))
print("left out in order:        ", [round(float(value), 3) for value in first])
print("left out in another order:", [round(float(value), 3) for value in second])
as_described = bool((first > 0.999).all()) and bool((second.abs() < 0.6).all())
sys.exit(0 if as_described else "the indices now count")
PY
