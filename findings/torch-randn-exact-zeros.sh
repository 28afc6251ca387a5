#!/usr/bin/env bash
# torch 2.13: does torch.randn draw exact zeros?
#
# Expected: no: a normal number is zero with probability nought, and float32 has a billion numbers below 0.1.
# Found:    on the CPU 16.8 million float32 draws hold about one zero, since the uniform numbers behind them have 24
#           bits; float64 draws hold none.
# Effect:   gradients of random weights, or random directions, have zeros by chance: what counts signs, or divides by
#           such numbers, must handle them. A fast path for "no zeros" is not taken by random test data.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$place"
venv/bin/python - <<'PY'
import sys

import torch

zeros = {}
for dtype in (torch.float32, torch.float64):
    draws = (torch.randn(2**24, dtype=dtype, generator=torch.Generator().manual_seed(seed)) for seed in range(8))
    zeros[str(dtype)] = [int((draw == 0).sum()) for draw in draws]
print("torch", torch.__version__, "zeros among 2**24 draws, seeds 0 to 7:", zeros)
sys.exit(0 if sum(zeros["torch.float32"]) > 4 and sum(zeros["torch.float64"]) == 0 else "randn draws other zeros now")
PY
