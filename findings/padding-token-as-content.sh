#!/usr/bin/env bash
# transformers 5.23 and torch 2.13: the gradient of a token that is the padding token and also stands in the text.
#
# Expected: a token that the attention mask counts gets a gradient, and torch.func's forward and reverse mode agree.
# Found:    many checkpoints pad with a token that texts hold (SmolLM2-Instruct: <|im_end|>, which ends every turn of a
#           chat). transformers makes it the embedding's padding_idx whatever the mask says; reverse mode then
#           leaves its row out, and forward mode does not: <u, Jv> and <J'u, v> differ, and central differences agree
#           with forward mode.
# Effect:   training never moves the input embedding of such a token, a kernel from gradients lacks its share, and a
#           linearisation by Jacobian-vector products has it once the row moves, by weight decay or a tied decoder.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0
HF_HUB_OFFLINE=1 "$place/venv/bin/python" - <<'PY'
import sys

import torch
import transformers
from torch.func import functional_call, jvp, vjp
from transformers import LlamaConfig, LlamaForCausalLM

print("torch", torch.__version__, "transformers", transformers.__version__)
END = 2
STEP = 1e-2  # not smaller: norms and softmax of this model round to float32
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    pad_token_id=END, eos_token_id=END, tie_word_embeddings=False, attn_implementation="eager",
)
model = LlamaForCausalLM(config).double().eval()
text = torch.tensor([[5, 9, END, 7, 11]])
seen = torch.ones_like(text)
name = "model.embed_tokens.weight"
weight = model.get_parameter(name).detach()
weight[END] = torch.randn(16, dtype=torch.float64) / 50  # as trained, and not the zeros of a new model
print("padding_idx:", model.get_input_embeddings().padding_idx, "- tokens of the text:", text.tolist()[0])


def logits(weight):
    inputs = {"input_ids": text, "attention_mask": seen}
    return functional_call(model, {name: weight}, kwargs=inputs).logits[0, -1]


found = {}
for token in (9, END):
    direction = torch.zeros_like(weight)
    direction[token] = torch.randn(16, dtype=torch.float64) / 50
    probe = torch.randn(50, dtype=torch.float64)
    forward = float((probe @ jvp(logits, (weight,), (direction,))[1]).detach())
    (gradient,) = vjp(logits, weight)[1](probe)
    reverse = float((gradient * direction).sum().detach())
    difference = logits(weight + STEP * direction) - logits(weight - STEP * direction)
    central = float((probe @ difference).detach()) / (2 * STEP)
    found[token] = forward, reverse, central
    print(f"token {token}: forward {forward:+.8f}, reverse {reverse:+.8f}, central differences {central:+.8f}")

forward, reverse, central = found[9]
other_agrees = abs(forward - reverse) < 1e-5 and abs(forward - central) < 1e-4
forward, reverse, central = found[END]
as_described = reverse == 0 and abs(forward) > 0.01 and abs(forward - central) < 1e-4
sys.exit(0 if other_agrees and as_described else "the padding token's gradient is no longer as described above")
PY
