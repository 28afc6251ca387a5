#!/usr/bin/env bash
# traker 0.3: the seeds of BasicProjector, the projection that TRAK takes on a CPU.
#
# Expected: two seeds give independent projections, and so do the checkpoints of an ensemble, whose number is part of
#           the seed.
# Found:    block i of a projection is drawn with seed + 1000 i + 100000 × checkpoint. With seed 1000 all blocks but
#           the last are those of seed 0, one place further; beyond 10,000 dimensions the first checkpoint's last
#           blocks are the second checkpoint's first.
# Effect:   the mean of kernels or scores over seeds 0, 1000, 2000 … is not closer to the truth than one of them, and
#           agreement between such seeds says nothing of the projection's error.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 traker==0.3.2
"$place/venv/bin/python" - <<'PY'
import sys
from importlib.metadata import version

import torch
from trak.projectors import BasicProjector, ProjectionType

print("traker", version("traker"), "torch", torch.__version__)


def project(gradients, seed, width, checkpoint=0):
    projector = BasicProjector(gradients.shape[1], width, seed, ProjectionType.normal, torch.device("cpu"))
    return projector.project(gradients, checkpoint)


gradients = torch.randn(30, 400, generator=torch.Generator().manual_seed(0))
kernel = gradients @ gradients.T


def off(seeds):
    features = [project(gradients, seed, 1000) for seed in seeds]
    mean = sum(one @ one.T / 1000 for one in features) / len(features)
    return float((mean - kernel).norm() / kernel.norm())


first, second = project(gradients, 0, 1000), project(gradients, 1000, 1000)
shared = torch.equal(first[:, 100:], second[:, :900])
print("numbers 101 to 1000 of seed 0 are numbers 1 to 900 of seed 1000:", shared)
wide = project(gradients[:, :5], 0, 10100)[:, 10000:]
narrow = project(gradients[:, :5], 0, 10100, checkpoint=1)[:, :100]
print("and numbers 10,001 to 10,100 of checkpoint 0 the first ones of checkpoint 1:", torch.equal(wide, narrow))
apart, one, thousands = off([0, 1, 2, 3, 4]), off([0]), off([0, 1000, 2000, 3000, 4000])
print(f"kernel off by {one:.3f} with seed 0, {apart:.3f} with the mean over seeds 0 to 4 ({one / 5**0.5:.3f} expected),")
print(f"{thousands:.3f} with the mean over seeds 0, 1000, 2000, 3000, 4000")
as_described = shared and torch.equal(wide, narrow) and apart < 0.55 * one and thousands > 0.65 * one
sys.exit(0 if as_described else "the seeds now are independent")
PY
