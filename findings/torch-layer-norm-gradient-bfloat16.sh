#!/usr/bin/env bash
# torch 2.13: gradients of LayerNorm's weight and bias on a CPU, where its input is bfloat16.
#
# Expected: sums over the tokens are taken in float32 and rounded once, as for Linear, RMSNorm and GroupNorm; and under
#           autocast, which keeps the parameters in float32, nothing of them is rounded to bfloat16 at all.
# Found:    both gradients are summed in bfloat16, one sum per thread. One thread counts to 256 and no further; the
#           gradient is a float32 tensor under autocast, but its values are those. float16 stops at 2048.
# Effect:   training or a kernel of a BERT in bfloat16 has norms whose gradients are off by 10 to 97 %, more with more
#           tokens and fewer threads. Norms in float32 (`model.norm(x.float())`) or batches of few tokens avoid it.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$place/venv/bin/python" - <<'PY'
import copy
import sys

import torch
from torch import nn

print("torch", torch.__version__)
torch.set_num_threads(1)
torch.manual_seed(0)
tokens, width = 8192, 64
texts = torch.randn(tokens, width).bfloat16()
signal = (torch.randn(tokens, width) + 0.1).bfloat16()  # what arrives from the loss


def gradients(layer):
    layer(texts.to(next(layer.parameters()).dtype)).backward(signal.to(next(layer.parameters()).dtype))
    return {name: parameter.grad.double() for name, parameter in layer.named_parameters()}


def off(layer):
    wanted = gradients(copy.deepcopy(layer).double())
    got = gradients(layer.bfloat16())
    return {name: float((got[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted}


layers = [nn.LayerNorm(width), nn.RMSNorm(width), nn.GroupNorm(1, width), nn.Linear(width, width)]
errors = {type(layer).__name__: off(layer) for layer in layers}
for name, of_parameters in errors.items():
    print(f"{name}: " + ", ".join(f"{key} off by {100 * error:.1f} %" for key, error in of_parameters.items()))

network = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, width))
with torch.autocast("cpu", torch.bfloat16):
    network(texts.float()).sum().backward()
got, wanted = network[1].bias.grad, tokens * network[2].weight.detach().sum(0)
under_autocast = float((got - wanted).norm() / wanted.norm())
print(f"under autocast: bias is {got.dtype}, off by {100 * under_autocast:.1f} %")
sums = {}
for threads in (1, 2):
    torch.set_num_threads(threads)
    norm = nn.LayerNorm(width)
    norm(texts).sum().backward()
    sums[threads] = norm.bias.grad.unique().tolist()
print(f"sum of {tokens} ones as a bias's gradient: {sums[1]} with one thread, {sums[2]} with two")
right = max(error for name, of in errors.items() if name != "LayerNorm" for error in of.values())
as_described = (
    min(errors["LayerNorm"].values()) > 0.05 and right < 0.005 and under_autocast > 0.9 and sums == {1: [256], 2: [512]}
)
sys.exit(0 if as_described else "the gradients of LayerNorm now are sums in float32")
PY
