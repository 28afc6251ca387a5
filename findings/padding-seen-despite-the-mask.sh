#!/usr/bin/env bash
# transformers 5.23: masked language models whose logits depend on padding, although the attention mask is passed.
#
# Expected: with attention_mask, the logits of a text are the same alone and in a batch with a longer text.
# Found:    BERT keeps this. FNet has no mask at all (its Fourier transform runs over the padding); the convolutions of
#           ConvBERT and Nystromformer read the padding although both models take an attention_mask.
# Effect:   accuracies, gradients and kernels of these models depend on the batch that a text is in.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.1 transformers==5.23.0
"$place/venv/bin/python" - <<'PY'
import inspect
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForMaskedLM

print("transformers", transformers.__version__, "torch", torch.__version__)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 100, "pad_token_id": 0}
MODELS = {
    "bert": {"num_attention_heads": 4},
    "fnet": {},
    "convbert": {"num_attention_heads": 4, "embedding_size": 32},
    "nystromformer": {"num_attention_heads": 4},
}


def change(name):
    """The largest change of the logits of a text of 8 tokens, as 8 tokens of padding come behind it."""
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(name, **SIZES, **MODELS[name])).double().eval()
    alone = torch.arange(5, 13)[None]
    padded = torch.cat([alone, torch.zeros(1, 8, dtype=torch.long)], dim=1)
    takes_mask = "attention_mask" in inspect.signature(model.forward).parameters
    with torch.no_grad():
        first, second = (
            model(ids, **({"attention_mask": (ids != 0).long()} if takes_mask else {})).logits[0, :8]
            for ids in (alone, padded)
        )
    return takes_mask, float((first - second).abs().max() / first.abs().max())


found = {name: change(name) for name in MODELS}
for name, (takes_mask, by) in found.items():
    print(f"{name}: attention_mask {'taken' if takes_mask else 'not taken'}, logits change by {by:.2g} of the largest")
as_described = found["bert"][1] < 1e-12 and all(found[name][1] > 1e-3 for name in MODELS if name != "bert")
as_described &= not found["fnet"][0] and found["convbert"][0] and found["nystromformer"][0]
sys.exit(0 if as_described else "padding is no longer seen as described above")
PY
