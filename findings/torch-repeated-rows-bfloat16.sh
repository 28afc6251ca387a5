#!/usr/bin/env bash
# torch 2.13: adding many rows into one, in bfloat16 on a CPU.
#
# Expected: all of these add in the same precision: the gradients of table[ids], index_select, Embedding, EmbeddingBag
#           and gather, and index_add, index_put, scatter_add and index_reduce themselves.
# Found:    1000 ones are 1000 for index_select, gather, index_add and scatter_add, and 256 for the others, which
#           round to bfloat16 after each one. Their mean is 0.256 for index_reduce and 0.5 for scale_grad_by_freq.
# Effect:   the gradients of frequent tokens (a word of the prompt's template stands in every text) are cut off, of rare
#           ones they are right; table[ids] in place of table.index_select(0, ids) makes a gradient four times smaller.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$place/venv/bin/python" - <<'PY'
import sys
import warnings

import torch
from torch import nn
from torch.nn import functional

warnings.simplefilter("ignore")  # index_reduce is in beta
print("torch", torch.__version__)
times, width = 1000, 8
ids, ones = torch.zeros(times, dtype=torch.long), torch.ones(times, width, dtype=torch.bfloat16)
wide = ids[:, None].expand(times, width)


def table():
    return torch.zeros(3, width, dtype=torch.bfloat16)


def backward(look_up):
    weight = table().requires_grad_()
    look_up(weight).backward(ones)
    return float(weight.grad[0, 0])


def module(layer, shape):
    layer(ids.reshape(shape)).sum().backward()
    return float(layer.weight.grad[0, 0])


found = {
    "index_select, backward": backward(lambda weight: weight.index_select(0, ids)),
    "gather, backward": backward(lambda weight: weight.gather(0, wide)),
    "index_add": float(table().index_add(0, ids, ones)[0, 0]),
    "scatter_add": float(table().scatter_add(0, wide, ones)[0, 0]),
    "embedding, backward": backward(lambda weight: functional.embedding(ids, weight)),
    "table[ids], backward": backward(lambda weight: weight[ids]),
    "EmbeddingBag, backward": module(nn.EmbeddingBag(3, width, mode="sum", dtype=torch.bfloat16), (1, times)),
    "index_put": float(table().index_put((ids,), ones, accumulate=True)[0, 0]),
}
means = {
    "index_reduce, mean": float(table().index_reduce(0, ids, ones, "mean", include_self=False)[0, 0]),
    "Embedding(scale_grad_by_freq=True), backward": module(
        nn.Embedding(3, width, scale_grad_by_freq=True, dtype=torch.bfloat16), (times,)
    ),
}
for name, value in found.items():
    print(f"{times} ones added by {name}: {value:g}")
for name, value in means.items():
    print(f"mean of {times} ones by {name}: {value:g}")
as_described = list(found.values()) == [1000] * 4 + [256] * 4 and all(value <= 0.5 for value in means.values())
sys.exit(0 if as_described else "the sums are no longer as described above")
PY
