#!/bin/sh
# make demo: a run that goes through, and one that is stopped halfway and resumed from its
# files, must end with the same bits.
set -eu

BIN=${BIN:-.venv/bin}
RANKS=${RANKS:-4}
EPOCHS=${EPOCHS:-6}
OUT=${OUT:-demo-out}
HALF=$((EPOCHS / 2))

train() {
    # One thread a rank: the sums of a matrix product then have one order.
    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 \
        "$BIN/mpirun" -n "$RANKS" "$BIN/python" -m mpi4py slurm/train.py "$@"
}

# say LOG: show what a run printed, without some lines; a run that failed ends the demo.
say() {
    log=$1
    shift
    grep -v "$@" "$log"
}

rm -rf "$OUT"
mkdir -p "$OUT"
echo "== 1. $RANKS ranks train $EPOCHS epochs without a stop"
train --out "$OUT/straight" --epochs "$EPOCHS" >"$OUT/straight.log"
say "$OUT/straight.log" saved
echo "== 2. the same training, stopped after epoch $HALF; every epoch is saved"
train --out "$OUT/stopped" --epochs "$EPOCHS" --stop-after "$HALF" >"$OUT/stopped.log"
say "$OUT/stopped.log" finished
echo "== 3. resumed from the files of epoch $HALF"
train --out "$OUT/stopped" --epochs "$EPOCHS" --resume >"$OUT/resumed.log"
say "$OUT/resumed.log" saved
grep -q "^resumed from epoch $HALF on" "$OUT/resumed.log"
echo "== the newest files"
newest=$(printf '%s/stopped/epoch-%03d' "$OUT" "$EPOCHS")
ls -l "$newest.pdparams" "$newest.pdopt"
"$BIN/python" - "$newest" <<'PY'
import pickle
import sys

import h5py

stem = sys.argv[1]
with open(stem + ".pdparams", "rb") as file:
    params = pickle.load(file)
print("pickle.load:", ", ".join(f"{k} {v.shape}" for k, v in list(params.items())[:3]))
with h5py.File(stem + ".pdopt") as file:
    print("h5py.File:  ", ", ".join(list(file)[:3]), "...", dict(file.attrs))
PY
straight=$(grep finished "$OUT/straight.log")
resumed=$(grep finished "$OUT/resumed.log")
if [ "$straight" = "$resumed" ]; then
    echo "== the same bits as without the stop: $resumed"
else
    echo "== DIFFERENT BITS: $straight / $resumed" >&2
    exit 1
fi
