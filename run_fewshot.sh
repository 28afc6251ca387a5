#!/usr/bin/env bash
# One few-shot run: environment variables → run.py. Works from any directory; the data and results it names are those
# of the repository. Further arguments go to run.py last, so that they override, and their paths are the caller's own.
#
#   TAG=kernel-prompting TRAINER=kernel TASK=SST-2 SEED=42 MODEL=roberta-base bash run_fewshot.sh --kernel_formula signgd
set -euo pipefail

TASK=${TASK:-SST-2}                    # a task of src/lmntk/tasks.py; with --custom_columns a name for your own data
SEED=${SEED:-13}                       # which k-shot split, and the seed of the run
K=${K:-16}                             # training examples per class
MODEL=${MODEL:-roberta-base}           # a folder, the caller's or the repository's, or a name on the model hub
TYPE=${TYPE:-prompt}                   # finetune, prompt or prompt-demo
TRAINER=${TRAINER:-standard}           # standard, kernel, linearised or linearhead
TAG=${TAG:-}                           # a word to find the run by
GRID_TAG=${GRID_TAG:-}                 # more of the output folder's name, for grids of settings under one tag
LOAD_KERNELS_TAG=${LOAD_KERNELS_TAG:-} # take the kernels of the run with that tag
AS_PUBLISHED=${AS_PUBLISHED:-0}        # 1: the settings of the published program, see docs/reference/as-published.md
NUM_GPU=${NUM_GPU:-1}                  # processes, one a GPU; 0: CPU only

say() { printf 'run_fewshot.sh: %s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

has_gpu() {
    case ${CUDA_VISIBLE_DEVICES-all} in '' | -1) return 1 ;; esac
    [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]]
}

is_number() { [[ ${1:-0} =~ ^[0-9]{1,9}$ ]]; }

# Run a program and wait for it. It gets each signal that this script gets, once, and ends as it sees fit.
attended() {
    local status
    child='' pending='' stopped=''
    for name in HUP INT TERM; do # before the start: the program may be heard of as soon as it runs
        # shellcheck disable=SC2064 # the name is that of now
        trap "stopped=$name pending=$name; pass_on" "$name"
    done
    set -m # a process group of its own: a terminal sends Ctrl-C to this script alone, and it can be passed on
    "$@" </dev/null &
    child=$!
    set +m
    pass_on
    while :; do
        status=0
        wait "$child" || status=$?
        kill -0 "$child" 2>/dev/null || break # a signal has ended the waiting, not the program
    done
    trap - HUP INT TERM
    case $stopped in HUP) status=129 ;; INT) status=130 ;; TERM) status=143 ;; esac
    return "$status"
}

pass_on() {
    local signal=$pending
    [[ -n $child && -n $signal ]] || return 0
    pending=''
    kill -s "$signal" -- "-$child" 2>/dev/null || true
}

find_python() {
    if [[ -n ${PYTHON:-} ]]; then
        printf '%s' "$PYTHON"
    # conda keeps its base environment active all the time: that is nobody's choice
    elif [[ -z ${VIRTUAL_ENV:-} && ${CONDA_DEFAULT_ENV:-base} == base && -x $root/.venv/bin/python ]]; then
        printf '%s' "$root/.venv/bin/python"
    else
        command -v python || command -v python3 || fail "no python found: activate an environment, or set PYTHON"
    fi
}

is_number "$NUM_GPU" || fail "NUM_GPU is '$NUM_GPU', but it must be a number: 0 for the CPU, else how many GPUs"
NUM_GPU=$((10#$NUM_GPU))
for name in NNODES NODE_RANK MASTER_PORT; do
    is_number "${!name:-}" || fail "$name is '${!name}', but it must be a number"
done
nodes=$((10#${NNODES:-1}))
if ((10#${NODE_RANK:-0} >= nodes)); then
    fail "NODE_RANK is ${NODE_RANK:-0}, but it must be less than NNODES, $nodes: 0 on the first machine, then 1 …"
fi
if [[ ${NNODES:-1} != 1 && (-z ${MASTER_ADDR:-} || -z ${NODE_RANK:-}) ]]; then
    fail "NNODES=$NNODES needs MASTER_ADDR (the first machine, the same on all) and NODE_RANK (0 on the first, then 1 …)"
fi

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
# Called from the repository itself, paths stay short in the log, as they always were.
if [[ $(pwd -P) == "$root" ]]; then base=; else base=$root/; fi

while [[ $MODEL == ?*/ ]]; do MODEL=${MODEL%/}; done # a folder is the same folder with a slash behind it
task_name=$(printf '%s' "$TASK" | tr '[:upper:]' '[:lower:]')
data_folder=$TASK
if [[ $task_name == mnli-mm ]]; then data_folder=MNLI; fi # one folder holds both test sets
model=$MODEL # run.py looks for a folder where the caller stands; what only the repository has is looked up here
if [[ ! -e $MODEL && -d $base$MODEL ]]; then model=$base$MODEL; fi
result=${base}result/$TASK-${MODEL//\//_}-$TYPE-$TRAINER

arguments=(
    --model_name_or_path "$model"
    --few_shot_type "$TYPE"
    --task_name "$task_name"
    --data_dir "${base}data/k-shot-1k-test/$data_folder/$K-$SEED"
    --output_dir "$result-$TAG$GRID_TAG/$K-$SEED"
    --overwrite_output_dir
    --do_train --do_eval --do_predict
    --num_k "$K"
    --tag "$TAG"
    --seed "$SEED"
    --trainer "$TRAINER"
)
case $AS_PUBLISHED in
    0) ;;
    1)
        # The published script, too, names the lengths of the task's row; they are not the general ones of its run.py.
        arguments+=(--as_published --task_defaults True)
        # Batches of one text. A kernel's tiles stay the engine's choice: they change no number.
        if [[ $TRAINER != kernel ]]; then
            arguments+=(--per_device_train_batch_size 1 --per_device_eval_batch_size 1)
        fi
        ;;
    *) fail "AS_PUBLISHED is '$AS_PUBLISHED', but it must be 1, for the settings of the published program, or 0" ;;
esac
if [[ -n $LOAD_KERNELS_TAG ]]; then
    arguments+=(--load_kernels "$result-$LOAD_KERNELS_TAG/$K-$SEED")
fi

processes=$((NUM_GPU > 0 ? NUM_GPU : 1))
if ((NUM_GPU == 0)); then
    arguments+=(--use_cpu)
elif ! has_gpu; then
    if ((NUM_GPU > 1)); then what="$NUM_GPU processes "; else what=; fi
    say "no GPU found: running ${what}on the CPU"
    arguments+=(--use_cpu)
fi

python=$(find_python)
launch=("$python")
if ((processes > 1)) || [[ ${NNODES:-1} != 1 ]]; then
    if [[ -z ${OMP_NUM_THREADS:-} ]]; then
        cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
        threads=$((cores / processes))
        export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
    fi
    launch+=(-m torch.distributed.run --nproc_per_node "$processes")
    if [[ -n ${NNODES:-}${NODE_RANK:-}${MASTER_ADDR:-}${MASTER_PORT:-} ]]; then
        if [[ -n ${NNODES:-} ]]; then launch+=(--nnodes "$NNODES"); fi
        if [[ -n ${NODE_RANK:-} ]]; then launch+=(--node_rank "$NODE_RANK"); fi
        if [[ -n ${MASTER_ADDR:-} ]]; then launch+=(--master_addr "$MASTER_ADDR"); fi
        if [[ -n ${MASTER_PORT:-} ]]; then launch+=(--master_port "$MASTER_PORT"); fi
    else
        launch+=(--standalone)
    fi
fi

if ((${#launch[@]} == 1)); then
    # A grid has a worker that does its runs: see src/lmntk/runs/workers.py.
    exec "$python" ${LMNTK_WORKER:+-IS "$root/src/lmntk/runs/worker_client.py"} "$root/run.py" "${arguments[@]}" "$@"
fi

# A mistake in the flags is told here, once, and not by every process.
case " $* " in *' --help '* | *' -h '*) exec "$python" "$root/run.py" --help ;; esac
attended "$python" "$root/tools/check_command.py" "${arguments[@]}" "$@" || exit

# torchrun ends with 1 whatever happened, and tells of every process that ends with another status than 0 at length:
# processes that end with one and the same mistake leave their status in a file, and end with 0.
LMNTK_STATUS_FILE=$(mktemp)
export LMNTK_STATUS_FILE
trap 'rm -f "$LMNTK_STATUS_FILE"' EXIT
status=0
attended "${launch[@]}" "$root/run.py" "${arguments[@]}" "$@" || status=$?
if ((status <= 1)) && [[ -s $LMNTK_STATUS_FILE ]]; then status=$(head -n 1 "$LMNTK_STATUS_FILE"); fi
exit "$status"
