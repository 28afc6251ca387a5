#!/usr/bin/env bash
# safetensors 0.8 and torch 2.13: the length of a file's header decides how products of its weights round.
#
# Expected: equal weights give equal products.
# Found:    load_file returns tensors that lie in memory as they lie in the file, at any multiple of 8 bytes from a
#           multiple of 64. MKL's products of float32 matrices start their sums at an aligned address where its code path
#           is not the newest (SSE4.2 is set below; processors that are not Intel's also get other paths). So the same
#           weights with one more letter of metadata give other last digits. A clone() ends it.
# Effect:   a run with a model saved again differs by 1e-7, and kernels of signs by 1e-3.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.1 safetensors==0.8.0
cd "$place"
MKL_ENABLE_INSTRUCTIONS=SSE4_2 OMP_NUM_THREADS=1 venv/bin/python - <<'PY'
import platform
import sys

import safetensors
import torch
from safetensors.torch import load_file, save_file

print("torch", torch.__version__, "safetensors", safetensors.__version__, platform.machine())
torch.manual_seed(0)
weight, inputs = torch.randn(8, 16), torch.randn(1, 16)
products, offsets, cloned = [], [], []
for letters in range(0, 64, 8):
    save_file({"weight": weight}, "model.safetensors", metadata={"note": "x" * letters})
    loaded = load_file("model.safetensors")["weight"]
    assert torch.equal(loaded, weight)
    offsets.append(loaded.data_ptr() % 64)
    products.append(inputs @ loaded.T)
    cloned.append(inputs @ loaded.clone().T)
print("addresses modulo 64:", offsets)
print("products unlike the first:", [float((product - products[0]).abs().max()) for product in products])
same = all(torch.equal(product, cloned[0]) for product in cloned)
print("products of clones alike:", same)
as_described = any(offsets) and not all(torch.equal(product, products[0]) for product in products) and same
sys.exit(0 if as_described else "alignment no longer decides how products round")
PY
