#!/usr/bin/env bash
# Submit the scripts of slurm/ to a real Slurm on this machine, and check what comes out: `make test-slurm`.
#
#   PYTHON=.venv/bin/python tests/slurm/run.sh
#
# PYTHON is of an environment with mpisave, mpi4py on MPICH, h5py, scikit-learn, pytest and pytest-mpi. Takes about three
# minutes on two cores. Prints a line a check, and `N passed, M failed` in the end.
set -euo pipefail

cd "$(dirname "$0")/../.."
PYTHON=$(realpath --no-symlinks "${PYTHON:-.venv/bin/python}")  # a virtual environment is found by its symlink
[[ -x $PYTHON ]] || { echo "run.sh: no $PYTHON: set PYTHON." >&2; exit 2; }
# Of a Slurm job that this may run in, and settings of the scripts that would change what is checked.
unset "${!SLURM@}" "${!SBATCH@}" "${!SRUN@}" MPI_TYPE TESTS MARKS

work=$(mktemp --directory)
lab=$work/lab
passed=0
failed=0

clean_up() {
    timeout 60 tests/slurm/lab.sh stop "$lab" >/dev/null || failed=$((failed + 1))
    if ((failed)); then
        echo "The files are kept in $work."
    else
        rm -rf "$work"
    fi
}
trap clean_up EXIT
# A signal that ends the shell must take the way through `exit`.
trap 'exit 130' INT TERM HUP

# check WHAT COMMAND...: one line; the command's output only where it fails.
check() {
    local what=$1 said
    shift
    if said=$("$@" 2>&1); then
        echo "PASS  $what"
        passed=$((passed + 1))
    else
        echo "FAIL  $what"
        printf '%s\n' "$said" | tail --lines=30 | sed 's/^/      /'
        failed=$((failed + 1))
    fi
}

# submit NAME [SETTING=VALUE]...: run slurm/NAME.sbatch to its end; its output is $work/NAME.out afterwards.
submit() {
    local name=$1
    shift
    # --wait exits as the job does. --foreground: Ctrl-C reaches it.
    env PYTHON="$PYTHON" "$@" timeout --foreground 200 sbatch --wait --parsable --nodes=2 --ntasks-per-node=2 \
        --output="$work/$name.out" "slurm/$name.sbatch" >"$work/$name.id" || {
        local status=$?
        cat "$work/$name.out"
        # A job that goes on would keep the nodes from the next one.
        timeout 10 scancel --user="$(id -un)"
        return "$status"
    }
}

prints() {  # NAME REGEX: the job's output has such a line
    grep --extended-regexp "$2" "$work/$1.out" || { echo "no line of $1.out matches $2"; return 1; }
}

# Each node has launched tasks of the job's first step.
used_both_nodes() {
    local id node
    id=$(<"$work/$1.id")
    for node in n1 n2; do
        grep "launch task StepId=$id\.0 " "$lab/log/slurmd.$node.log" || { echo "none on $node"; return 1; }
    done
}

# One process, no MPI, no mpisave: does whoever gets the file find arrays in it?
opens_in_stock_readers() {
    timeout 60 "$PYTHON" - "$@" <<'END'
import pickle
import sys
from pathlib import Path

import h5py
import numpy as np


def count(state):
    if isinstance(state, dict):
        return sum(map(count, state.values()))
    return int(isinstance(state, np.ndarray))


for path in map(Path, sys.argv[1:]):
    arrays = []
    if h5py.is_hdf5(path):
        with h5py.File(path) as file:
            file.visititems(lambda _, item: arrays.append(item[()]) if isinstance(item, h5py.Dataset) else None)
        number = len(arrays)
    else:
        number = count(pickle.loads(path.read_bytes()))
    print(f"{path.name}: {number} arrays")
    assert number
assert "mpisave" not in sys.modules
END
}

# srun's tasks do not know of one another: every single one must refuse, rather than write over the others' files.
refuses_without_mpi() {
    # shellcheck disable=SC2016  # expanded in the task
    timeout --foreground 60 srun --mpi=none --nodes=2 --ntasks-per-node=2 \
        bash -c '"$0" -m mpi4py slurm/save_load.py --out "$1" --mib 1; echo "exit status $?"' \
        "$PYTHON" "$work/refused" >"$work/refused.out" 2>&1
    cat "$work/refused.out"
    [[ $(grep --count --extended-regexp 'exit status [1-9]' "$work/refused.out") == 4 ]] &&
        grep --quiet SLURM "$work/refused.out" && [[ -z $(ls -A "$work/refused") ]]
}

# A rank is killed within save, and Slurm lets the others live: they raise, the job ends, the old file is whole.
lose_a_rank() {  # PATH VICTIM STEP GATHER_TO
    local path=$1 victim=$2 step=$3 gather_to=$4 status=0
    # As by default, but whatever slurm.conf says.
    timeout --foreground 120 srun --mpi=pmi2 --kill-on-bad-exit=0 --nodes=2 --ntasks-per-node=2 \
        "$PYTHON" -m mpi4py tests/slurm/lost_rank.py lose "$path" "$victim" "$step" "$gather_to" \
        >"$path.out" 2>&1 || status=$?
    tail --lines=30 "$path.out"
    # The rank is killed, and whoever raises first ends the others.
    [[ $status != 0 && $status != 124 ]] || { echo "srun ended with status $status"; return 1; }
    timeout 60 "$PYTHON" tests/slurm/lost_rank.py look "$path" "$victim"
}

save_again() {  # PATH GATHER_TO
    timeout --foreground 60 srun --mpi=pmi2 --nodes=2 --ntasks-per-node=2 \
        "$PYTHON" -m mpi4py tests/slurm/lost_rank.py again "$1" "$2" &&
        timeout 60 "$PYTHON" tests/slurm/lost_rank.py look_again "$1"
}

check "the lab starts" timeout 300 tests/slurm/lab.sh start "$lab"
if ((failed == 0)); then
    # shellcheck source=/dev/null
    . "$lab/env"

    check "save_load.sbatch runs" submit save_load OUT="$work/save_load" MIB=16
    check "save_load.sbatch: all readers find what was saved" prints save_load '^save_load: ok$'
    check "save_load.sbatch: MPI sees two nodes" prints save_load '^save_load: 4 rank\(s\) on 2 node\(s\): n1 n2$'
    check "save_load.sbatch: two nodes used" used_both_nodes save_load
    check "save_load.sbatch: files open in stock readers" opens_in_stock_readers \
        "$work"/save_load/{pickle,hdf5}.pd{params,opt}

    check "train_cpu.sbatch runs" submit train_cpu OUT="$work/train_cpu" EPOCHS=2
    check "train_cpu.sbatch: finishes" prints train_cpu '^finished:'
    check "train_cpu.sbatch: two nodes used" used_both_nodes train_cpu
    check "train_cpu.sbatch: files open in stock readers" opens_in_stock_readers \
        "$work"/train_cpu/epoch-00{1,2}.pd{params,opt}
    check "train_cpu.sbatch runs, submitted again" submit train_cpu OUT="$work/train_cpu" EPOCHS=3
    check "train_cpu.sbatch: goes on from the newest epoch" prints train_cpu '^resumed from epoch 2 '

    check "train_gpu.sbatch runs, on CPUs" submit train_gpu OUT="$work/train_gpu" EPOCHS=2 DEVICE=cpu
    check "train_gpu.sbatch: finishes" prints train_gpu '^finished:'
    check "train_gpu.sbatch: two nodes used" used_both_nodes train_gpu
    check "train_gpu.sbatch: files open in stock readers" opens_in_stock_readers \
        "$work"/train_gpu/epoch-00{1,2}.pd{params,opt}

    check "test_mpi.sbatch runs" submit test_mpi OUT="$work/test_mpi"
    check "test_mpi.sbatch: tests passed" prints test_mpi '[1-9][0-9]* passed'
    check "test_mpi.sbatch: two nodes used" used_both_nodes test_mpi

    mkdir "$work/lost"
    check "a rank is killed while all write: the others say which" \
        lose_a_rank "$work/lost/direct.params" 3 write None
    check "a rank is killed while all write: a later save works" save_again "$work/lost/direct.params" None
    check "the root is killed while it gathers: the others say which" \
        lose_a_rank "$work/lost/gathered.h5params" 0 "gather and write" 0
    check "the root is killed while it gathers: a later save works" save_again "$work/lost/gathered.h5params" 0

    check "the wrong --mpi: every process refuses" refuses_without_mpi
fi

clean_up
trap - EXIT
echo "$passed passed, $failed failed"
((failed == 0))
