#!/usr/bin/env bash
# torch 2.13: torchrun --max-restarts with the gloo backend.
#
# Expected: after a worker has failed, all workers start again and init_process_group connects them.
# Found:    torchrun keeps one key-value store for all starts, and gloo looks its peers up under the same keys. A worker
#           that looks before its peer has stored its new address finds the address of the dead process, and the start
#           fails with "Connection refused". It is a race: of six restarts below, three to six failed. A store under a
#           prefix that names the start ends it.
# Effect:   --max-restarts does not save a long run unless the program meets under such a prefix.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.1
cat >"$place/worker.py" <<'PY'
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

rank, start = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
store = None
if "prefix" in sys.argv:
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store = dist.PrefixStore(f"start {start}", store)
where = {} if store is None else {"store": store, "rank": rank, "world_size": int(os.environ["WORLD_SIZE"])}
dist.init_process_group("gloo", timeout=timedelta(seconds=20), **where)
total = torch.ones(1)
dist.all_reduce(total)
print(f"start {start}, rank {rank}: sum {int(total)}", flush=True)
if start == 0 and rank == 1:
    sys.exit("a failure that a restart should mend")
dist.barrier()
dist.destroy_process_group()
PY
"$place/venv/bin/python" -c 'import torch; print("torch", torch.__version__)'
failures() { # of six runs with one restart each
    failed=0
    refused=0
    for _ in 1 2 3 4 5 6; do
        OMP_NUM_THREADS=1 "$place/venv/bin/torchrun" --nproc_per_node 2 --master_port "$((20000 + RANDOM % 9000))" \
            --max-restarts 1 "$place/worker.py" "$@" >"$place/output" 2>&1 || failed=$((failed + 1))
        if grep -q 'Connection refused' "$place/output"; then refused=$((refused + 1)); fi
    done
}
failures
plain=$refused
echo "as torch does it: $failed of 6 restarts failed, $refused with a refused connection"
failures prefix
echo "under a prefix for each start: $failed of 6 restarts failed"
if [ "$plain" -eq 0 ] || [ "$failed" -ne 0 ]; then
    echo "restarts no longer behave as described above" >&2
    exit 1
fi
