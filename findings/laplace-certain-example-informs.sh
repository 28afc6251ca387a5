#!/usr/bin/env bash
# laplace-torch 0.3: Laplace(model, "classification", hessian_structure="gp"), the Gaussian process of a model's kernel.
#
# Expected: a train example that the model is ever surer of has a likelihood of ever smaller curvature p(1 - p), and so
#           tells ever less: the posterior variance at it goes to that of the prior, 1 here.
# Found:    once softmax rounds p to 1, from a logit difference of 17 in float32 on, p(1 - p) is exactly 0, the noise
#           1/0 is replaced by 10, and the variance of that logit drops from 1.000 to 0.909, while the other logit's,
#           whose p is 1e-8, stays at 1.
# Effect:   fine-tuned models, which are sure of their train examples, get a variance that is too small, in jumps.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 laplace-torch==0.3 \
    'setuptools<81'
"$place/venv/bin/pip" uninstall --quiet --yes torchvision # no need of it; that of another torch stops the import
cd "$place"
venv/bin/python - <<'PY'
import sys
import warnings
from importlib.metadata import version

import torch
from torch import nn

warnings.simplefilter("ignore")
from laplace import Laplace  # noqa: E402

print("laplace-torch", version("laplace-torch"), "torch", torch.__version__)
x, y = torch.tensor([[1.0]]), torch.tensor([1])
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y))
found = {}
for difference in (0, 4, 8, 15, 17, 30):
    model = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-difference / 2], [difference / 2]]))
    posterior = Laplace(model, "classification", hessian_structure="gp", subset_of_weights="all", n_subset=1)
    posterior.fit(data)
    variance = posterior._glm_predictive_distribution(x)[1][0].diagonal()
    p = float(torch.softmax(model(x), dim=1)[0, 1])
    found[difference] = float(variance[1])
    print(f"logit difference {difference:2d}: 1 - p = {1 - p:.1e}, variances {variance[0]:.4f} {variance[1]:.4f}")
as_described = found[0] < found[4] < found[8] < 1.0001 and found[15] > 0.999 and abs(found[17] - 10 / 11) < 1e-3
sys.exit(0 if as_described else "certain examples are now treated in another way")
PY
