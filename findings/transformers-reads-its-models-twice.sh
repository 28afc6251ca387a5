#!/usr/bin/env bash
# transformers 5.23: how many of its own files `import transformers` and `import transformers.models` read.
#
# Expected: every model's folder is listed and read once: create_import_structure_from_path has an lru_cache.
# Found:    the cache holds 128 folders, functools' default, and there are more than 500. When transformers.models asks for
#           the same folders in the same order, each has just been dropped: all files are opened and searched again.
# Effect:   0.2 to 0.3 s of every start of a program that loads a model.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0
cd "$place"
venv/bin/python - <<'PY'
import sys
from collections import Counter

counts, stage = Counter(), "transformers"


def count(event, arguments):
    if event == "open" and "/transformers/models/" in str(arguments[0]) and str(arguments[0]).endswith(".py"):
        counts[stage] += 1


sys.addaudithook(count)
import transformers
from transformers.utils.import_utils import create_import_structure_from_path

stage = "transformers.models"
import transformers.models

info = create_import_structure_from_path.cache_info()
print("transformers", transformers.__version__, "model files opened:", dict(counts), info)
twice = counts["transformers"] > 1000 and counts["transformers.models"] > 1000
sys.exit(0 if twice and info.maxsize == 128 and info.hits == 0 else "transformers reads its models once now")
PY
