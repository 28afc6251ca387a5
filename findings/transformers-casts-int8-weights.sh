#!/usr/bin/env bash
# transformers 5.23: a checkpoint whose safetensors file holds int8 weights and whose config names no quantisation.
#
# Expected: an error, or a warning, since the scales that the integers need are not there.
# Found:    the integers are cast to float32 and used as weights, without a word. The loading report has nothing missing.
# Effect:   predictions are those of a model with weights of up to 127: finite numbers, and noise.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.1 transformers==5.23.0
cd "$place"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PY'
import contextlib
import io
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

print("transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
config = BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
BertForMaskedLM(config).save_pretrained("model")
path, name = "model/model.safetensors", "bert.encoder.layer.0.intermediate.dense.weight"
weights = load_file(path)
scale = weights[name].abs().max() / 127
weights[name] = (weights[name] / scale).round().to(torch.int8)
save_file(weights, path, metadata={"format": "pt"})
said = io.StringIO()
with contextlib.redirect_stderr(said):
    model, report = AutoModelForMaskedLM.from_pretrained("model", dtype=torch.float32, output_loading_info=True)
loaded = model.get_parameter(name)
print("stored:", weights[name].dtype, "loaded:", loaded.dtype, "largest:", float(loaded.detach().abs().max()))
print("report:", {key: list(value) for key, value in report.items() if value} or "nothing")
words = [line for line in said.getvalue().splitlines() if "int8" in line or name in line]
print("messages that name the weight or its type:", words or "none")
as_described = float(loaded.detach().abs().max()) == 127 and not any(report.values()) and not words
sys.exit(0 if as_described else "integers are no longer taken as weights in silence")
PY
