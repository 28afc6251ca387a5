#!/usr/bin/env bash
# opacus 1.6: per-example gradients of an embedding with a padding token.
#
# Expected: those of autograd, one example at a time, in each of its modes.
# Found:    in the modes "hooks" and "ew" the row of the padding token gets a gradient that autograd does not give it;
#           in the mode "functorch" it gets none. All other entries agree to rounding.
# Effect:   where padding reaches the logits, or the padding token stands in texts, the norms of examples, and so what
#           clipping leaves of them, count a row that training should not move; products of such gradients are not the
#           kernel that plain training follows.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 opacus==1.6.0
"$place/venv/bin/python" - <<'PY'
import copy
import sys
import warnings

import opacus
import torch
from opacus.grad_sample.utils import wrap_model
from torch import nn

warnings.simplefilter("ignore")
print("torch", torch.__version__, "opacus", opacus.__version__)
PAD = 0


class MeanOfWords(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.last = nn.Embedding(20, 8, padding_idx=PAD), nn.Linear(8, 3)

    def forward(self, ids):
        return self.last(self.words(ids).tanh().mean(dim=1))


torch.manual_seed(0)
model = MeanOfWords().double()
short, long = [5, 7, 11, PAD, PAD, PAD], [3, 9, 4, 17, 6, 8]
ids, labels = torch.tensor([short, long]), torch.tensor([1, 2])
loss = nn.CrossEntropyLoss(reduction="sum")
wanted = {name: [] for name, _ in model.named_parameters()}
for one, label in zip(ids.split(1), labels.split(1), strict=True):
    gradients = torch.autograd.grad(loss(model(one), label), list(model.parameters()))
    for name, gradient in zip(wanted, gradients, strict=True):
        wanted[name].append(gradient)

padding, others = {}, {}
for mode in ("hooks", "ew", "functorch"):
    fresh = copy.deepcopy(model)
    loss(wrap_model(fresh, grad_sample_mode=mode, loss_reduction="sum")(ids), labels).backward()
    off = {name: (p.grad_sample - torch.stack(wanted[name])).abs() for name, p in fresh.named_parameters()}
    padding[mode] = float(off["words.weight"][:, PAD].max())
    off["words.weight"][:, PAD] = 0
    others[mode] = max(float(values.max()) for values in off.values())
    print(f"{mode}: off by {padding[mode]:.3g} in the row of the padding token, by {others[mode]:.1g} elsewhere")
as_described = (
    padding["hooks"] > 1e-3 and padding["ew"] > 1e-3 and padding["functorch"] == 0 and max(others.values()) < 1e-15
)
sys.exit(0 if as_described else "the gradient of the padding row has changed")
PY
