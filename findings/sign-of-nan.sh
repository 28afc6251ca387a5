#!/usr/bin/env bash
# torch 2.13 and numpy 2.4: the sign of NaN.
#
# Expected: NaN, as numpy has it.
# Found:    torch.sign and Tensor.sign_ give 0 (torch.sgn of a complex NaN gives NaN).
# Effect:   gradients that hold NaN pass through sign-based steps and sign-based kernels as if they were zero: a model
#           with one NaN weight gives a kernel of integers and chance accuracy, with nothing to notice.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.1
"$place/venv/bin/python" - <<'PY'
import math
import sys

import numpy as np
import torch

print("torch", torch.__version__, "numpy", np.__version__)
# Long enough for the vectorised code, and a length with a remainder.
found = {str(dtype): torch.sign(torch.full((37,), math.nan, dtype=dtype)) for dtype in (torch.float32, torch.float64, torch.bfloat16)}
for dtype, signs in found.items():
    print(f"torch.sign of 37 NaNs, {dtype}: {set(signs.tolist())}")
print("numpy.sign(nan):", np.sign(np.nan), " torch.sgn(complex nan):", torch.sgn(torch.tensor(complex(math.nan, 0))))
as_described = all((signs == 0).all() for signs in found.values()) and np.isnan(np.sign(np.nan))
sys.exit(0 if as_described else "torch.sign of NaN is no longer 0")
PY
