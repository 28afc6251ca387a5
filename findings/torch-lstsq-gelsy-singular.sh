#!/usr/bin/env bash
# torch 2.13: torch.linalg.lstsq(driver="gelsy") on singular kernels.
#
# Expected: the rank and the minimum-norm solution, the same at every call.
# Found:    both depend on what freed memory holds. LAPACK's gelsy reads its pivot array as input (a non-zero entry moves
#           that column to the front), and torch passes an array that it never sets (pytorch issue 187411).
# Effect:   least squares on the kernel of a data set with a repeated text predicts different numbers at every call.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.1 scipy==1.17.0
"$place/venv/bin/python" - <<'PY'
import sys

import numpy as np
import scipy.linalg
import torch

print("torch", torch.__version__, "numpy", np.__version__, "scipy", scipy.__version__)
torch.manual_seed(0)
n, rank = 64, 32
features = torch.randn(rank, 500, dtype=torch.float64)
features = torch.cat([features, features])  # every text twice
kernel, y = features @ features.T, torch.randn(n, 1, dtype=torch.float64)
cut_off = n * np.finfo(np.float64).eps
solution, _, scipy_rank, _ = scipy.linalg.lstsq(kernel.numpy(), y.numpy(), cond=cut_off, lapack_driver="gelsy")
fitted = kernel @ torch.from_numpy(solution)


def of_torch(driver):
    ranks, largest = set(), 0.0
    for _ in range(30):
        used = [torch.randint(0, 2, (n,), dtype=torch.int32) for _ in range(200)]  # ordinary tensors of earlier work
        del used
        got = torch.linalg.lstsq(kernel, y, driver=driver)
        ranks.add(int(got.rank))
        largest = max(largest, float((kernel @ got.solution - fitted).norm() / fitted.norm()))
    return ranks, largest


print("scipy, gelsy: rank", scipy_rank, "numpy: rank", np.linalg.matrix_rank(kernel.numpy(), hermitian=True))
found = {driver: of_torch(driver) for driver in ("gelsy", "gelsd")}
for driver, (ranks, largest) in found.items():
    print(f"torch, {driver}, 30 calls: ranks {sorted(ranks)}, fitted values off by up to {largest:.2g} of their norm")
as_described = (
    scipy_rank == rank
    and len(found["gelsy"][0]) > 1
    and found["gelsy"][1] > 0.1
    and found["gelsd"][0] == {rank}
    and found["gelsd"][1] < 1e-10
)
sys.exit(0 if as_described else "torch's gelsy no longer behaves as described above")
PY
