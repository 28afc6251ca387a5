#!/usr/bin/env bash
# dattri 0.3: dattri.metric.mislabel_detection_auc, the area under the curve of finding mislabelled examples.
#
# Expected: scores that are all equal tell nothing, so that the area is 0.5, as scikit-learn's roc_auc_score has it.
# Found:    ties count in the order of the file: 0.07 if the mislabelled examples come last, 0.93 if they come first.
# Effect:   scores with ties, such as counts, clipped confidences or zeros of an example that nothing depends on, are
#           judged by where the flipped labels happen to stand; flipping the first rows of a file flatters any method.
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
from dattri.metric import mislabel_detection_auc
from sklearn.metrics import roc_auc_score

print("dattri", version("dattri"), "torch", torch.__version__)
scores, last, first = torch.ones(20), torch.zeros(20), torch.zeros(20)
last[-5:], first[:5] = 1, 1
found = [float(mislabel_detection_auc(scores, flipped)[0]) for flipped in (last, first)]
truth = [float(roc_auc_score(flipped, scores)) for flipped in (last, first)]
print("equal scores, mislabelled examples last and first:", [round(value, 3) for value in found])
print("scikit-learn:                                     ", truth)
as_described = found[0] < 0.1 and found[1] > 0.9 and truth == [0.5, 0.5]
sys.exit(0 if as_described else "ties are now treated in another way")
PY
