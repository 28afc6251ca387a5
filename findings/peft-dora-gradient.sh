#!/usr/bin/env bash
# peft 0.21: the gradient of a DoRA adapter.
#
# Expected: autograd gives the derivative of the model's output, here checked by central differences in float64.
# Found:    it does not for lora_A and lora_B: peft detaches the weight's norm, as the DoRA paper proposes to save memory
#           (Liu et al. 2024, arXiv 2402.09353, section 4.3). For the magnitudes it does.
# Effect:   a neural tangent kernel of DoRA made from autograd predicts the steps that training takes, but it is not the
#           kernel of the function, and forward mode and finite differences need not agree with reverse mode.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.1 transformers==5.23.0 peft==0.21.2
HF_HUB_OFFLINE=1 "$place/venv/bin/python" - <<'PY'
import sys

import peft
import torch
from transformers import BertConfig, BertForMaskedLM

print("peft", peft.__version__, "torch", torch.__version__)
torch.manual_seed(0)
config = BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
lora = peft.LoraConfig(r=4, target_modules=["query", "value"], use_dora=True, init_lora_weights=False)
model = peft.get_peft_model(BertForMaskedLM(config).double(), lora).double().eval()
ids = torch.arange(5, 15)[None]


def output():
    return model(input_ids=ids).logits[0, 3, 7]


def ratio(word):
    """The directional derivative by autograd over that by central differences."""
    chosen = [parameter for name, parameter in model.named_parameters() if word in name]
    for parameter in chosen:
        parameter.requires_grad_(True)
    directions = [torch.randn_like(parameter) for parameter in chosen]
    gradients = torch.autograd.grad(output(), chosen)
    reverse = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    ends = []
    with torch.no_grad():
        for step in (1e-5, -1e-5):
            for parameter, direction in zip(chosen, directions, strict=True):
                parameter.add_(step * direction)
            ends.append(float(output()))
            for parameter, direction in zip(chosen, directions, strict=True):
                parameter.sub_(step * direction)
    return reverse, (ends[0] - ends[1]) / 2e-5


found = {word: ratio(word) for word in ("lora_A", "lora_B", "lora_magnitude_vector")}
for word, (reverse, central) in found.items():
    print(f"{word}: autograd {reverse:.6g}, central differences {central:.6g}")
off = {word: abs(reverse / central - 1) for word, (reverse, central) in found.items()}
as_described = off["lora_A"] > 0.01 and off["lora_B"] > 0.01 and off["lora_magnitude_vector"] < 1e-5
sys.exit(0 if as_described else "DoRA's gradient is no longer as described above")
PY
