#!/usr/bin/env bash
# bergson 2.5: GradientProcessor(reshape_to_square=True), and `reshape_to_square` of its command line.
#
# Expected: what its documentation says: gradients are reshaped to a nearly square matrix before they are projected,
#           which is useful for layers far from square, such as adapters.
# Found:    the setting is read and stored, and used by nothing: the features are the same, bit for bit.
# Effect:   the gradient of an adapter of rank 4 is "compressed" to 16 × 16 numbers, of which the side of 4 is blown up,
#           whatever is set; a kernel of such features is as far off as without it.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0 \
    bergson==2.5.1
# Builds of these for another kind of torch keep transformers from being imported; nothing here needs them.
"$place/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio
cd "$place"
venv/bin/python - 2>&1 <<'PY' | grep -v -e WARNING -e Warning
import sys
from importlib.metadata import version

import torch
from bergson import GradientProcessor, IndexConfig, InMemoryCollector
from datasets import Dataset
from torch import nn

print("bergson", version("bergson"), "torch", torch.__version__)


class Adapter(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.device = nn.Linear(1024, 4, bias=False), torch.device("cpu")
        self.dtype = torch.float32

    def forward(self, inputs):
        return self.down(inputs).tanh().sum(dim=(1, 2))


torch.manual_seed(0)
model, inputs = Adapter(), torch.randn(20, 6, 1024, requires_grad=True)


def features(square):
    collector = InMemoryCollector(
        model=model,
        processor=GradientProcessor(projection_dim=16, reshape_to_square=square),
        data=Dataset.from_dict({"input_ids": [[0]] * len(inputs)}),
        cfg=IndexConfig(run_path="run", projection_dim=16, reshape_to_square=square),
    )
    with collector.with_batch():
        outputs = model(inputs)
        outputs.sum().backward()
    collector.process_batch(list(range(len(inputs))), losses=outputs)
    collector.teardown()
    return collector.gradients["down"].clone()


plain, square = features(False), features(True)
same = torch.equal(plain, square)
print(f"features of a weight of 4 × 1024: {tuple(plain.shape)}; with reshape_to_square: {tuple(square.shape)}")
print("the same numbers with and without it:", same)
sys.exit(0 if same else "the setting now has an effect")
PY
