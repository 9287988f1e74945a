"""Train on handwritten digits, data-parallel, with a sharded Adam; save and resume.

A multilayer perceptron on the 1,797 digits that ship with scikit-learn. Every rank
computes the gradient of its part of each batch, and Allreduce sums them. Adam's moments
are sharded as in ZeRO stage 1 (Rajbhandari et al., 2020): each rank keeps the moments
of some parameters only, updates these, and broadcasts them. So the parameters are the
same on all ranks, and the optimizer states of all ranks together are the whole one:
what mpisave saves as `params` (one value of each) and as `opt` (the union).

    mpirun -n 4 python -m mpi4py slurm/train.py --out runs/digits --epochs 10
    srun --mpi=pmi2 -n 4 python -m mpi4py slurm/train.py --out runs/digits --resume

Each epoch writes epoch-NNN.pdparams (pickle) and epoch-NNN.pdopt (HDF5), the optimizer
last: an epoch is there when both are.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from mpi4py import MPI
from sklearn.datasets import load_digits

import mpisave

if TYPE_CHECKING:
    from types import ModuleType

COMM = MPI.COMM_WORLD
Arrays = dict[str, Any]  # NumPy or CuPy arrays by name

WIDTHS = (64, 128, 64, 10)
BATCH = 96
LEARNING_RATE = 2e-3
BETAS = (0.9, 0.999)
EPSILON = 1e-8


def say(text: str) -> None:
    """Print on rank 0."""
    if COMM.rank == 0:
        print(text, flush=True)


def load_data(xp: ModuleType) -> tuple[Any, Any, Any, Any]:
    """Return images and labels to train on, and to test with: the last 297."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.data[order] / 16).astype(np.float32)
    labels = digits.target[order]
    split = len(labels) - 297
    parts = images[:split], labels[:split], images[split:], labels[split:]
    return tuple(xp.asarray(part) for part in parts)  # type: ignore[return-value]


def new_parameters(xp: ModuleType) -> Arrays:
    """Return weights and biases, the same on every rank."""
    rng = np.random.default_rng(1)
    params = {}
    for layer, (fan_in, fan_out) in enumerate(pairwise(WIDTHS)):
        weight = rng.standard_normal((fan_in, fan_out)) * np.sqrt(2 / fan_in)
        params[f"linear_{layer}.w_0"] = xp.asarray(weight.astype(np.float32))
        params[f"linear_{layer}.b_0"] = xp.zeros(fan_out, xp.float32)
    return params


def forward(xp: ModuleType, params: Arrays, images: Any) -> list[Any]:
    """Return the activations of every layer, the scores last."""
    activations = [images]
    layers = len(WIDTHS) - 1
    for layer in range(layers):
        scores = activations[-1] @ params[f"linear_{layer}.w_0"]
        scores = scores + params[f"linear_{layer}.b_0"]
        is_last = layer == layers - 1
        activations.append(scores if is_last else xp.maximum(scores, 0))
    return activations


def gradients(xp: ModuleType, params: Arrays, images: Any, labels: Any) -> Arrays:
    """Return the gradient of the summed cross entropy of a part of a batch."""
    activations = forward(xp, params, images)
    scores = activations[-1] - activations[-1].max(axis=1, keepdims=True)
    error = xp.exp(scores)
    error = error / error.sum(axis=1, keepdims=True)
    error[xp.arange(len(labels)), labels] -= 1
    grads = {}
    for layer in reversed(range(len(WIDTHS) - 1)):
        grads[f"linear_{layer}.w_0"] = activations[layer].T @ error
        grads[f"linear_{layer}.b_0"] = error.sum(axis=0)
        if layer:
            error = (error @ params[f"linear_{layer}.w_0"].T) * (activations[layer] > 0)
    return grads


def sum_over_ranks(xp: ModuleType, array: Any) -> Any:
    """Return the sum of an array of all ranks, through host memory."""
    host = np.ascontiguousarray(array if xp is np else array.get())
    total = np.empty_like(host)
    COMM.Allreduce(host, total)
    return xp.asarray(total)


def broadcast(xp: ModuleType, array: Any, root: int) -> Any:
    """Return the array of one rank on all, through host memory."""
    host = np.ascontiguousarray(array if xp is np else array.get())
    COMM.Bcast(host, root=root)
    return xp.asarray(host)


class ShardedAdam:
    """Adam (Kingma and Ba, 2015), each rank with the moments of its own parameters."""

    def __init__(self, xp: ModuleType, params: Arrays) -> None:
        self.xp = xp
        self.owners = {name: i % COMM.size for i, name in enumerate(params)}
        self.step_count = 0
        self.moments: Arrays = {}
        for name in self.mine():
            for moment in ("moment1_0", "moment2_0"):
                self.moments[f"{name}_{moment}"] = xp.zeros_like(params[name])

    def mine(self) -> list[str]:
        """Return the parameters that this rank updates."""
        return [name for name, owner in self.owners.items() if owner == COMM.rank]

    def step(self, params: Arrays, grads: Arrays) -> None:
        """Update the parameters in place, on every rank."""
        self.step_count += 1
        for name in self.mine():
            first = self.moments[f"{name}_moment1_0"]
            second = self.moments[f"{name}_moment2_0"]
            first += (1 - BETAS[0]) * (grads[name] - first)
            second += (1 - BETAS[1]) * (grads[name] ** 2 - second)
            mean = first / (1 - BETAS[0] ** self.step_count)
            root = self.xp.sqrt(second / (1 - BETAS[1] ** self.step_count)) + EPSILON
            params[name] -= LEARNING_RATE * mean / root
        for name, owner in self.owners.items():
            params[name] = broadcast(self.xp, params[name], owner)

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's moments, and what is the same on all ranks."""
        return {**self.moments, "LR_Scheduler": {"step": self.step_count}}

    def set_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self.step_count = state["LR_Scheduler"]["step"]
        self.moments = {name: state[name] for name in self.moments}


def save(out: Path, epoch: int, params: Arrays, adam: ShardedAdam) -> None:
    """Save both states to rank 0's file system."""
    stem = str(out / f"epoch-{epoch:03d}")
    saved = mpisave.save(params, f"{stem}.pdparams", gather_to=0, state_type="params")
    say(f"  saved {_short(saved)}")
    saved = mpisave.save(
        adam.state_dict(),
        f"{stem}.pdopt",
        gather_to=0,
        state_type="opt",
        use_binary_format=True,
    )
    say(f"  saved {_short(saved)}")


def _short(report: mpisave.SaveReport) -> str:
    return (
        f"{Path(report.path).name}: {report.nbytes} bytes, {report.rounds} round(s), "
        f"{report.transport}, {1e3 * report.seconds['total']:.1f} ms"
    )


def newest_epoch(out: Path) -> int:
    """Return the last epoch of which both files are there, or 0."""
    epoch = 0
    if COMM.rank == 0:  # one asks, all hear
        for path in out.glob("epoch-*.pdopt"):
            found = re.fullmatch(r"epoch-(\d+)", path.stem)
            if found and path.with_suffix(".pdparams").exists():
                epoch = max(epoch, int(found[1]))
    return int(COMM.bcast(epoch))


def resume(out: Path, epoch: int, params: Arrays, adam: ShardedAdam) -> Arrays:
    """Return the parameters of an epoch, and give the optimizer its state.

    Each rank reads what it holds, whatever the number of ranks that saved, to where its
    arrays are: host or device.
    """
    stem = str(out / f"epoch-{epoch:03d}")
    adam.set_state_dict(
        mpisave.load(f"{stem}.pdopt", comm=COMM, like=adam.state_dict())
    )
    loaded: Arrays = mpisave.load(f"{stem}.pdparams", comm=COMM, like=params)
    return loaded


def train_epoch(
    xp: ModuleType, epoch: int, params: Arrays, adam: ShardedAdam, data: Any
) -> None:
    """Go through all images once, in an order that the epoch's number fixes."""
    images, labels, _, _ = data
    order = np.random.default_rng(1000 + epoch).permutation(len(labels))
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        mine = batch[COMM.rank :: COMM.size]
        grads = gradients(xp, params, images[mine], labels[mine])
        summed = {
            name: sum_over_ranks(xp, grad) / len(batch) for name, grad in grads.items()
        }
        adam.step(params, summed)


def accuracy(xp: ModuleType, params: Arrays, data: Any) -> float:
    """Return the share of the unseen digits that are recognised."""
    _, _, images, labels = data
    predicted = forward(xp, params, images)[-1].argmax(axis=1)
    return float((predicted == labels).mean())


def digest(xp: ModuleType, params: Arrays, adam: ShardedAdam) -> str:
    """Return a digest of every bit of parameters and moments of all ranks."""
    own = hashlib.sha256()
    for state in (params, adam.moments):
        for name, array in sorted(state.items()):
            own.update(name.encode())
            own.update((array if xp is np else array.get()).tobytes())
    every = COMM.allgather(own.hexdigest())
    return hashlib.sha256("".join(every).encode()).hexdigest()[:16]


def parse_arguments() -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the files")
    parser.add_argument("--epochs", type=int, default=10, help="epochs in all")
    parser.add_argument("--stop-after", type=int, help="stop after this epoch")
    parser.add_argument("--resume", action="store_true", help="go on from the files")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser.parse_args()


def main() -> int:
    """Train, and return the exit status."""
    args = parse_arguments()
    if args.device == "cuda":
        import cupy as xp

        devices = xp.cuda.runtime.getDeviceCount()
        local = COMM.Split_type(MPI.COMM_TYPE_SHARED)
        xp.cuda.Device(local.rank % devices).use()
        local.Free()
    else:
        xp = np
    if COMM.rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
    data = load_data(xp)
    params = new_parameters(xp)
    adam = ShardedAdam(xp, params)
    done = newest_epoch(args.out) if args.resume else 0
    if done:
        params = resume(args.out, done, params, adam)
        say(f"resumed from epoch {done} on {COMM.size} rank(s)")
    for epoch in range(done + 1, args.epochs + 1):
        train_epoch(xp, epoch, params, adam, data)
        score = accuracy(xp, params, data)
        say(f"epoch {epoch}: accuracy {score:.4f} on {len(data[3])} unseen digits")
        save(args.out, epoch, params, adam)
        if epoch == args.stop_after:
            say(f"stopped after epoch {epoch}, as told")
            break
    bits = digest(xp, params, adam)
    say(f"finished: accuracy {accuracy(xp, params, data):.4f}, bits {bits}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
