#!/usr/bin/env bash
# torch 2.13: which of the two interfaces to TF32 still answers, after the other has set it.
#
# Expected: torch.backends.cuda.matmul.fp32_precision and the older set_float32_matmul_precision and allow_tf32 show one
#           state, whichever was used.
# Found:    after fp32_precision = "tf32" the older getters raise RuntimeError, even where nothing is computed and no GPU is
#           there; after set_float32_matmul_precision("high") the newer attribute reads "tf32".
# Effect:   a library that only reads the setting, to print it or to choose a tolerance, fails in a program that uses the
#           recommended interface.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$place"
cat > read.py <<'PY'
import sys

import torch

matmul = torch.backends.cuda.matmul
if sys.argv[1] == "new":
    matmul.fp32_precision = "tf32"
else:
    torch.set_float32_matmul_precision("high")


def answer(read):
    try:
        return read()
    except RuntimeError as error:
        return type(error).__name__


found = [
    answer(lambda: matmul.fp32_precision), answer(torch.get_float32_matmul_precision), answer(lambda: matmul.allow_tf32)
]
print("torch", torch.__version__, f"set by the {sys.argv[1]} interface:", found)
wanted = {"new": ["tf32", "RuntimeError", "RuntimeError"], "old": ["tf32", "high", True]}
sys.exit(0 if found == wanted[sys.argv[1]] else "the two interfaces answer in another way now")
PY
venv/bin/python read.py new
venv/bin/python read.py old
