#!/usr/bin/env bash
# transformers 5.23: what `from transformers import BertForMaskedLM` imports, in an environment that has scipy and peft.
#
# Expected: torch and the code of BERT; scipy and peft only where a function of theirs is called.
# Found:    the loss functions of all tasks come along, object detection among them, which imports scipy.optimize if
#           scipy is installed; so do torch's distributed tensors, dynamo and sympy. `transformers.trainer` adds all of
#           peft if it is installed. transformers asks once for each package whether it is there and keeps the answer: a
#           program that hides scipy and peft at that moment, and only then, imports neither, and may import them itself
#           later on.
# Effect:   a third of the start-up time of a program that never detects an object and has no adapters.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 scipy==1.17.1 peft==0.21.2 numpy==2.4.6
cd "$place"
cat > imports.py <<'PY'
import sys

PACKAGES = ("scipy.optimize", "peft")
if sys.argv[1] == "hidden":
    sys.modules.update(scipy=None, peft=None)
    from transformers.utils import import_utils

    import_utils.is_scipy_available()
    import_utils.is_peft_available()
    del sys.modules["scipy"], sys.modules["peft"]

import transformers
from transformers import BertForMaskedLM

of_bert = [name for name in PACKAGES if name in sys.modules]
import transformers.trainer

of_trainer = [name for name in PACKAGES if name in sys.modules]
losses = "transformers.loss.loss_for_object_detection" in sys.modules
count = len(sys.modules)
import peft
import scipy.optimize

print(f"{sys.argv[1]}: BERT imports {of_bert}, the trainer as well {of_trainer}; object detection: {losses}; {count} modules")
expected = ([], []) if sys.argv[1] == "hidden" else (["scipy.optimize"], ["scipy.optimize", "peft"])
sys.exit(0 if (of_bert, of_trainer) == expected and losses else "transformers imports something else now")
PY
venv/bin/python -c "import torch, transformers; print('torch', torch.__version__, 'transformers', transformers.__version__)"
venv/bin/python imports.py seen
venv/bin/python imports.py hidden
