#!/usr/bin/env bash
# dattri 0.3: several attributors in one program, TRAKAttributor and TracInAttributor with projector_kwargs.
#
# Expected: each one projects as it was told, with its own width and seed.
# Found:    all attributors of a class hold one dictionary, and each new one writes its settings into it. Those made
#           before change too: five seeds give five equal results, all of the last one's seed and width.
# Effect:   a comparison of seeds finds no spread at all, and the mean over seeds is one draw; one attributor without
#           projection turns it off for all that follow. Making and using one after the other, with all settings named,
#           avoids it.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 scipy==1.17.1 \
    scikit-learn==1.9.1 dattri==0.3.0
cd "$place"
venv/bin/python - <<'PY' 2>log || { tail -3 log; exit 1; }
import sys
from importlib.metadata import version

import torch
from dattri.algorithm import TracInAttributor, TRAKAttributor
from dattri.task import AttributionTask
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

print("dattri", version("dattri"), "torch", torch.__version__)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3))
train, test = (
    DataLoader(TensorDataset(torch.randn(n, 20), torch.randint(0, 3, (n,))), batch_size=50) for n in (100, 30)
)


def loss(parameters, data):
    text, label = data
    return cross_entropy(functional_call(model, parameters, text[None]), label[None])


def probability(parameters, data):
    return torch.exp(-loss(parameters, data))


task = AttributionTask(loss_func=loss, model=model, checkpoints=[model.state_dict()])


def tracin(**projection):
    kwargs = projection or None
    return TracInAttributor(task, weight_list=torch.ones(1), normalized_grad=False, projector_kwargs=kwargs)


def trak(**projection):
    return TRAKAttributor(task, probability, projector_kwargs=projection, regularization=1.0)


def gradients(loader):
    rows = []
    for text, label in loader.dataset:
        rows.append(torch.autograd.grad(cross_entropy(model(text[None]), label[None]), list(model.parameters())))
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


exact = gradients(train) @ gradients(test).T


def off(scores):
    return float((scores - exact).norm() / exact.norm())


alone = [off(tracin(proj_dim=512, proj_seed=seed).attribute(train, test)) for seed in range(3)]
print("TracIn, one after the other, seeds 0 to 2: off by", [round(error, 3) for error in alone])
of_all = [tracin(proj_dim=512, proj_seed=0), tracin(proj_dim=512, proj_seed=1), tracin(proj_dim=32, proj_seed=2)]
scores = [attributor.attribute(train, test) for attributor in of_all]
tracin_equal = all(torch.equal(one, scores[-1]) for one in scores)
print("made first: off by", [round(off(one), 3) for one in scores], "though only the last has width 32")
attributors = [trak(proj_dim=64, proj_seed=seed) for seed in range(5)]
scores = [attributor.attribute(train_dataloader=train, test_dataloader=test) for attributor in attributors]
trak_equal = all(torch.equal(one, scores[-1]) for one in scores)
print("TRAK with five seeds: all scores equal:", trak_equal)
tracin(proj_dim=512)
before = off(tracin().attribute(train, test))
tracin(proj_type="identity")
after = off(tracin().attribute(train, test))
print(f"TracIn as it is by default: off by {before:.3f}, by {after:.1e} after another one asked for no projection")
as_described = len(set(alone)) == 3 and tracin_equal and trak_equal and before > 0.05 and after < 1e-5
sys.exit(0 if as_described else "attributors now keep their own settings")
PY
