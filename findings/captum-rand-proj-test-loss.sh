#!/usr/bin/env bash
# captum 0.9: TracInCPFastRandProj with test_loss_fn, a function of the test examples of which influences are asked.
#
# Expected: scores are products of a train example's gradient of loss_fn with a test example's gradient of test_loss_fn,
#           as the documentation says and TracInCPFast computes.
# Found:    the train examples' gradients are those of test_loss_fn, too; loss_fn is not used. No projection is needed
#           to see it.
# Effect:   "which train examples raise this logit" is answered without reading one label: all train labels may be
#           changed and the scores stay the same.
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
from torch.nn import functional
from torch.utils.data import TensorDataset

warnings.simplefilter("ignore")
print("captum", version("captum"), "torch", torch.__version__)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3, bias=False))
texts, labels = torch.randn(200, 20), torch.randint(0, 3, (200,))
test = (torch.randn(50, 20), torch.randint(0, 3, (50,)))


def logit_of_class_one(logits, labels):
    return logits[:, 1].sum()


class Unused(NearestNeighbors):
    """Scores alone are asked for; the default needs another package."""

    def setup(self, data):
        pass

    def get_nearest_neighbors(self, query, k):
        raise NotImplementedError


def scores(kind, labels, **settings):
    shared = {"checkpoints": ["this"], "checkpoints_load_func": lambda model, path: 1.0, "batch_size": 100}
    loss = nn.CrossEntropyLoss(reduction="sum")
    train = TensorDataset(texts, labels)
    of = kind(model, model[2], train, loss_fn=loss, test_loss_fn=logit_of_class_one, **shared, **settings)
    return of.influence(test, k=None)


with torch.no_grad():
    hidden, hidden_test = model[:2](texts), model[:2](test[0])
    signal = model(texts).softmax(1) - functional.one_hot(labels, 3)
wanted = (hidden_test @ hidden.T) * signal[:, 1]
fast = scores(TracInCPFast, labels)
projected = scores(TracInCPFastRandProj, labels, nearest_neighbors=Unused())
relabelled = scores(TracInCPFastRandProj, 2 - labels, nearest_neighbors=Unused())
errors = [float((found - wanted).norm() / wanted.norm()) for found in (fast, projected)]
as_without_labels = float((projected - hidden_test @ hidden.T).norm() / projected.norm())
print(f"TracInCPFast off by {errors[0]:.1e}, TracInCPFastRandProj without projection by {100 * errors[1]:.0f} %")
print(f"which is the product of the inputs of the last layer to {as_without_labels:.1e}")
print("and the same after the train labels were changed:", torch.equal(projected, relabelled))
as_described = (
    errors[0] < 1e-5 and errors[1] > 0.5 and as_without_labels < 1e-5 and torch.equal(projected, relabelled)
)
sys.exit(0 if as_described else "train examples now have the gradients of loss_fn")
PY
