#!/usr/bin/env bash
# Checks the kernel engines on one CUDA card in under nine minutes: a table, and check_gpu.json. It installs nothing.
#
#   bash tools/check_gpu.sh                     the card of this machine
#   bash tools/check_gpu.sh --cpu --tiny        the check itself, on a machine without a card
#
# PYTHON names the interpreter; without it that of .venv counts, else python3.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
python=${PYTHON:-}
if [[ -z $python && -x $root/.venv/bin/python ]]; then python=$root/.venv/bin/python; fi
python=${python:-python3}
if ! command -v "$python" >/dev/null; then
    printf 'error: there is no %s: set PYTHON to a Python that has torch and transformers\n' "$python" >&2
    exit 2
fi
exec "$python" "$root/tools/check_gpu.py" "$@"
