#!/usr/bin/env bash
# captum 0.9: TracInCPFastRandProj, influences from random projections of the last layer's gradients.
#
# Expected: with projection_dim p the gradient of C × D numbers becomes p of them, and the scores come closer to those
#           of TracInCPFast as p grows.
# Found:    both factors of the gradient are projected to min(√p, their size), so that the C logits go through a random
#           C × C matrix, which saves nothing. With two classes their gradients all lie on one line, so that this matrix
#           multiplies all scores by one random number (half a chi-squared of two degrees), from 0.03 to 7 in 20 seeds,
#           up to the p at which nothing is projected.
# Effect:   more dimensions do not help, and scores of two seeds or widths cannot be compared or added.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 captum==0.9.0
"$place/venv/bin/python" - <<'PY'
import sys
import warnings
from importlib.metadata import version

import torch
from captum.influence import TracInCPFast, TracInCPFastRandProj
from captum.influence._utils.nearest_neighbors import NearestNeighbors
from torch import nn
from torch.utils.data import TensorDataset

warnings.simplefilter("ignore")
print("captum", version("captum"), "torch", torch.__version__)
torch.set_num_threads(1)
torch.manual_seed(0)
width, seeds = 384, range(20)
model = nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 2, bias=False))
train = TensorDataset(torch.randn(200, 20), torch.randint(0, 2, (200,)))
test = (torch.randn(50, 20), torch.randint(0, 2, (50,)))
loss = nn.CrossEntropyLoss(reduction="sum")
settings = {"checkpoints": ["this"], "checkpoints_load_func": lambda model, path: 1.0, "loss_fn": loss}


class Unused(NearestNeighbors):
    """Scores alone are asked for; the default needs another package."""

    def setup(self, data):
        pass

    def get_nearest_neighbors(self, query, k):
        raise NotImplementedError


def scores(width, seed):
    projected = TracInCPFastRandProj(
        model, model[2], train, batch_size=100, nearest_neighbors=Unused(), projection_dim=width, seed=seed, **settings
    )
    return projected.influence(test, k=None)


exact = TracInCPFast(model, model[2], train, batch_size=100, **settings).influence(test)
errors, factors = {}, {}
for dimensions in (64, 256, 700, 767):
    found = [scores(dimensions, seed) for seed in seeds]
    errors[dimensions] = [float((one - exact).norm() / exact.norm()) for one in found]
    factors[dimensions] = [float((one * exact).sum() / exact.square().sum()) for one in found]
    rest = [float((one / f - exact).norm() / exact.norm()) for one, f in zip(found, factors[dimensions], strict=True)]
    typical, smallest, largest = sorted(errors[dimensions])[10], min(factors[dimensions]), max(factors[dimensions])
    print(f"projection_dim {dimensions}: off by {100 * typical:.0f} % (median of 20 seeds), ", end="")
    print(f"scores multiplied by {smallest:.2f} to {largest:.2f}, {100 * sorted(rest)[10]:.0f} % off beside that")
of_whole = max(float((scores(768, seed) - exact).norm() / exact.norm()) for seed in seeds)
print(f"projection_dim 768, all there are: off by {100 * of_whole:.4f} %")
as_described = (
    sorted(errors[767])[10] > 0.3 and min(factors[767]) < 0.3 and max(factors[767]) > 1.8 and of_whole < 1e-5
)
sys.exit(0 if as_described else "the projection of two classes has changed")
PY
