#!/usr/bin/env bash
# pydvl 0.10: influence functions, the Hessian of the train loss by batches.
#
# Expected: CgInfluence and ArnoldiInfluence (with all directions kept) solve with the Hessian of the mean loss and
#           agree with DirectInfluence to their tolerance, whatever the batch size of the loader.
# Found:    they average the batches' Hessians without weights: where the last batch is small, its examples count more.
#           With 105 examples in batches of 100, five examples make half of the Hessian. DirectInfluence weighs rightly.
# Effect:   influences off by 15 to 50 % and converged to it: no tolerance, rank or iteration helps. A loader whose
#           batch size divides the number of examples avoids it.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==1.26.4 \
    scipy==1.17.1 scikit-learn==1.9.1 'pydvl[influence]==0.10.0' setuptools==79.0.1
"$place/venv/bin/python" - <<'PY'
import sys
import warnings
from importlib.metadata import version

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")
from pydvl.influence.torch import ArnoldiInfluence, CgInfluence, DirectInfluence  # noqa: E402

print("pydvl", version("pydvl"), "torch", torch.__version__)
torch.manual_seed(0)
texts, labels = torch.randn(105, 6).double(), torch.randint(0, 3, (105,))
test = (torch.randn(8, 6).double(), torch.randint(0, 3, (8,)))
model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
parameters = dict(model.named_parameters())
count = sum(parameter.numel() for parameter in parameters.values())


def gradients(texts, labels):
    rows = []
    for text, label in zip(texts, labels, strict=True):
        parts = torch.autograd.grad(cross_entropy(model(text[None]), label[None]), list(parameters.values()))
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def hessian(texts, labels):
    flat = torch.autograd.grad(cross_entropy(model(texts), labels), list(parameters.values()), create_graph=True)
    flat = torch.cat([part.flatten() for part in flat])
    rows = [torch.autograd.grad(one, list(parameters.values()), retain_graph=True) for one in flat]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


shift = 0.5 * torch.eye(count, dtype=torch.float64)
train_gradients, test_gradients = gradients(texts, labels), gradients(*test)


def influences_of(hessian):
    return test_gradients @ torch.linalg.solve(hessian + shift, train_gradients.T)


def off(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


exact = influences_of(hessian(texts, labels))
unweighted = influences_of((hessian(texts[:100], labels[:100]) + hessian(texts[100:], labels[100:])) / 2)
kinds = {
    "direct": lambda: DirectInfluence(model, cross_entropy, regularization=0.5),
    "conjugate gradients": lambda: CgInfluence(model, cross_entropy, regularization=0.5, rtol=1e-10),
    "Arnoldi": lambda: ArnoldiInfluence(model, cross_entropy, regularization=0.5, rank=count - 1),
}
errors = {}
for size in (105, 21, 50, 100):
    loader = DataLoader(TensorDataset(texts, labels), batch_size=size)
    found = {name: make().fit(loader).influences(*test, texts, labels) for name, make in kinds.items()}
    errors[size] = {name: off(values, exact) for name, values in found.items()}
    print(f"batches of {size}: " + ", ".join(f"{name} off by {100 * e:.2f} %" for name, e in errors[size].items()))
as_mean = off(found["conjugate gradients"], unweighted)
print(f"with batches of 100 and 5, conjugate gradients are those of both batches' plain mean to {as_mean:.1e}")
right = max(max(errors[size].values()) for size in (105, 21)), max(of["direct"] for of in errors.values())
as_described = max(right) < 1e-4 and errors[100]["conjugate gradients"] > 0.2 and as_mean < 1e-6
sys.exit(0 if as_described else "batches are now weighted by their examples")
PY
