#!/usr/bin/env bash
# transformers 5.23: a byte-pair tokenizer whose merges.txt was cut off, beside a whole vocab.json.
#
# Expected: an error, or a warning that the tokens of the vocabulary can no longer be reached.
# Found:    AutoTokenizer loads it without a word. Words fall apart into letters, each of which is in the vocabulary, so
#           that there are no unknown tokens either.
# Effect:   a download that ended early gives a model that reads letters: near-chance accuracy and no error.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0
cd "$place"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PY' 2>&1
import json
import sys
from pathlib import Path

import transformers
from transformers import AutoTokenizer

print("transformers", transformers.__version__)
merges = ["f i", "l m", "fi lm", "Ġ film"]
letters = [*"film", "Ġ", "fi", "lm", "film", "Ġfilm", "<|endoftext|>"]


def saved(name, kept):
    folder = Path(name)
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges[:kept]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    config = {"model_type": "gpt2", "vocab_size": len(letters), "bos_token_id": 9, "eos_token_id": 9}
    (folder / "config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(name)


whole, cut = (saved(name, kept).tokenize(" film film") for name, kept in (("whole", 4), ("cut", 0)))
print("whole merges.txt:", whole, "  cut:", cut)
as_described = whole == ["Ġfilm", "Ġfilm"] and cut == [*"Ġfilm", *"Ġfilm"]
sys.exit(0 if as_described else "a cut merges.txt no longer loads as described")
PY
