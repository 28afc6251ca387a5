#!/usr/bin/env bash
# safetensors 0.8: is a file with metadata the same file each time it is written?
#
# Expected: yes: tensors are sorted, and the metadata are a small dictionary of strings.
# Found:    with two metadata keys or more their order in the header changes from call to call, within one process too;
#           with one key the bytes are always the same. What is read is equal.
# Effect:   hashes of checkpoints, and comparisons of files byte by byte, fail now and then although nothing has changed.
#           transformers writes one key (format), so its checkpoints are not affected; put all of your own into one key.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 safetensors==0.8.0
"$place/venv/bin/python" - <<'PY'
import hashlib
import sys
from collections import Counter

import numpy as np
import safetensors
from safetensors.numpy import load, save

print("safetensors", safetensors.__version__, "numpy", np.__version__)
tensors = {"weight": np.arange(4, dtype=np.float32)}
found = {}
for metadata in ({"step": "1"}, {"step": "1", "seed": "42"}, {"step": "1", "seed": "42", "task": "mr"}):
    files = [save(tensors, metadata) for _ in range(200)]
    assert all((load(content)["weight"] == tensors["weight"]).all() for content in files)
    counts = Counter(hashlib.sha256(content).hexdigest()[:8] for content in files)
    found[len(metadata)] = len(counts)
    print(f"{len(metadata)} metadata keys, 200 calls: {len(counts)} different files", dict(counts))
as_described = found[1] == 1 and found[2] == 2 and found[3] > 2
sys.exit(0 if as_described else "the order of metadata is no longer as described above")
PY
