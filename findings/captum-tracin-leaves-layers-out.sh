#!/usr/bin/env bash
# captum 0.9: TracInCP of a BERT with sample_wise_grads_per_batch=True, the fast way that its documentation offers.
#
# Expected: the influences of the slow way, or an error: the documentation says that linear layers and 2-D convolutions
#           are supported.
# Found:    the gradients of all other parameters (embeddings, norms: half of this model) are left out without a word:
#           the influences are exactly the kernel of the linear layers alone, 11 % off.
# Effect:   influences of language models by the fast way are of another kernel than those by the slow one.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 \
    transformers==5.23.0 captum==0.9.0
cd "$place"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PY'
import sys
import warnings

import captum
import torch
import transformers
from captum.influence import TracInCP
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification

print("torch", torch.__version__, "transformers", transformers.__version__, "captum", captum.__version__)


class Logits(nn.Module):
    def __init__(self):
        super().__init__()
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        self.bert = BertForSequenceClassification(BertConfig(vocab_size=100, num_labels=3, **sizes))

    def forward(self, ids):
        return self.bert(input_ids=ids).logits


torch.manual_seed(0)
model = Logits().double().eval()
ids, labels = torch.randint(5, 100, (6, 12)), torch.randint(0, 3, (6,))
parameters = dict(model.named_parameters())
rows = {name: [] for name in parameters}
for one, label in zip(ids.split(1), labels.split(1), strict=True):
    gradients = torch.autograd.grad(cross_entropy(model(one), label), list(parameters.values()))
    for name, gradient in zip(parameters, gradients, strict=True):
        rows[name].append(gradient.flatten())
kernels = {name: torch.stack(found) @ torch.stack(found).T for name, found in rows.items()}
layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
of_linear = {f"{name}.{kind}" for name in layers for kind in ("weight", "bias")}
whole, linear = sum(kernels.values()), sum(kernels[name] for name in of_linear)
share = sum(parameters[name].numel() for name in of_linear) / sum(p.numel() for p in parameters.values())
print(f"linear layers have {share:.0%} of the parameters")
torch.save(model.state_dict(), "checkpoint.pt")


def load(model, path):
    model.load_state_dict(torch.load(path, weights_only=True))
    return 1.0


def off(fast, kernel):
    loss = nn.CrossEntropyLoss(reduction="sum" if fast else "none")
    data = torch.utils.data.TensorDataset(ids, labels)
    tracin = TracInCP(
        model, data, ["checkpoint.pt"], load, loss_fn=loss, batch_size=6, sample_wise_grads_per_batch=fast
    )
    return float((tracin.influence((ids, labels)) - kernel).norm() / kernel.norm())


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    slow, fast, fast_linear = off(False, whole), off(True, whole), off(True, linear)
texts = [str(warning.message) for warning in caught]
said = [text for text in texts if "Embedding" in text or "support" in text]
print(f"slow way, against all parameters' kernel: {slow:.1e}")
print(f"fast way, against all parameters' kernel: {fast:.3f}, against the linear layers': {fast_linear:.1e}")
print("warnings about what is left out:", said)
as_described = slow < 1e-12 and fast > 0.05 and fast_linear < 1e-12 and not said
sys.exit(0 if as_described else "the fast way now differs from what is described above")
PY
