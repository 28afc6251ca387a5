#!/usr/bin/env bash
# transformers 5.23: is a model after .double() a function in float64?
#
# Expected: yes: its weights, its inputs and its logits are float64.
# Found:    for many families no: their norms compute in float32 whatever the dtype (Llama, Qwen2, Gemma, OLMo ...), and
#           so do rotary embeddings and the softmax of eager attention (Phi, OPT). The logits come out as float64 with
#           the digits of float32. GPT-2 and BERT are float64 throughout. For OPT and Phi it depends on
#           attn_implementation: "sdpa" keeps float64 in the softmax, "eager" does not.
# Effect:   finite differences with the step that float64 allows are noise (off by more than their own size), two
#           computations of one kernel agree to 1e-7 and not to 1e-15, and a float64 "oracle" is a float32 one.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0
HF_HUB_OFFLINE=1 "$place/venv/bin/python" - <<'PY'
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

print("torch", torch.__version__, "transformers", transformers.__version__)
SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "n_embd": 32, "n_layer": 2, "n_head": 4, "ffn_dim": 37, "word_embed_proj_dim": 32,
}  # fmt: skip


def mismatch(family, attention):
    """Compare the slope of the logits along one direction at a step of 1e-4 with that at 1e-8, relative."""
    config = AutoConfig.for_model(family)
    for name, value in SIZES.items():
        if hasattr(config, name):
            setattr(config, name, value)
    kind = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    torch.manual_seed(0)
    model = kind.from_config(config, attn_implementation=attention).double().eval()
    ids = torch.arange(5, 15)[None]
    weight = model.get_input_embeddings().weight
    direction = torch.zeros_like(weight)
    direction[7] = torch.randn(32, dtype=torch.float64)

    def logits(step):
        weight.data.add_(step * direction)
        found = model(input_ids=ids).logits
        weight.data.sub_(step * direction)
        assert found.dtype == torch.float64
        return found[0, -1]

    with torch.no_grad():
        wide, narrow = ((logits(step) - logits(-step)) / (2 * step) for step in (1e-4, 1e-8))
    return float((wide - narrow).norm() / wide.norm())


INSIDE = {("llama", "sdpa"), ("qwen2", "sdpa"), ("gemma", "sdpa"), ("olmo", "sdpa"), ("phi", "eager"), ("opt", "eager")}
SOUND = {("gpt2", "eager"), ("gpt2", "sdpa"), ("bert", "eager"), ("bert", "sdpa"), ("opt", "sdpa")}
found = {pair: mismatch(*pair) for pair in sorted(INSIDE | SOUND)}
for (family, attention), value in found.items():
    print(f"{family}, {attention}: slopes at steps of 1e-4 and 1e-8 differ by {value:.0e}")
as_described = all(found[pair] > 1e-3 for pair in INSIDE) and all(found[pair] < 1e-5 for pair in SOUND)
sys.exit(0 if as_described else "which families compute in float32 has changed")
PY
