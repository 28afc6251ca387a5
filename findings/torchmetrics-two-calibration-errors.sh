#!/usr/bin/env bash
# torchmetrics 1.9: the expected calibration error of a classifier of two classes, given as one probability or as two.
#
# Expected: the same number, since the predictions are the same.
# Found:    with task="binary" the probability of class 1 is compared with how often class 1 is true; with
#           task="multiclass" the larger probability with how often it is right (Guo et al. 2017). In the second, errors
#           of opposite signs at p and 1 - p cancel: 0.215 against 0.119 on the same 2,000 predictions.
# Effect:   calibration errors of two-class tasks can be compared only if both name the spelling.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 torchmetrics==1.9.0
cd "$place"
venv/bin/python - <<'PY'
import sys

import torch
import torchmetrics
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

print("torchmetrics", torchmetrics.__version__, "torch", torch.__version__)
random = torch.Generator().manual_seed(0)
p = torch.rand(2000, generator=random)
labels = (torch.rand(2000, generator=random) < 0.4 + 0.6 * p).long()  # class 1 is more frequent than predicted
one = float(binary_calibration_error(p, labels, n_bins=15))
two = float(multiclass_calibration_error(torch.stack([1 - p, p], dim=1), labels, num_classes=2, n_bins=15))
print(f"one probability: {one:.4f}   two probabilities: {two:.4f}")
sys.exit(0 if one > 1.5 * two > 0.1 else "the two now agree")
PY
