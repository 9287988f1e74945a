"""A rank is killed within save, and the launcher lets the others live: see run.sh.

In this order, with the file that is saved to as PATH::

    srun ... python -m mpi4py lost_rank.py lose PATH VICTIM STEP GATHER_TO
    python lost_rank.py look PATH VICTIM
    srun ... python -m mpi4py lost_rank.py again PATH GATHER_TO
    python lost_rank.py look_again PATH
"""

import json
import pickle
import socket
import sys
import time
from pathlib import Path

import numpy as np

import mpisave
from mpisave import testing

RANKS = 4
TIMEOUT_S = 3
# Of a rank that waits, beyond the deadline: the roll, and a machine that is busy.
GRACE_S = 10


def options(path, gather_to):
    return {
        "gather_to": None if gather_to == "None" else int(gather_to),
        "state_type": "params",
        "use_binary_format": path.suffix == ".h5params",
        "timeout": TIMEOUT_S,
    }


def state_of(rank, value):
    return {"shared": np.full(9, value), f"w{rank}": np.full(2**18, value + rank)}


def told_by(path, rank):
    return path.with_name(f"{path.name}.told.{rank}")


def lose(path, victim, step, gather_to):
    """Save zeros, then ones, and lose a rank; all others tell what they meet."""
    from mpi4py import MPI

    comm, victim = MPI.COMM_WORLD, int(victim)
    if comm.size != RANKS:
        raise SystemExit(f"{comm.size} ranks, not {RANKS}")
    how = options(path, gather_to)
    mpisave.save(state_of(comm.rank, 0.0), path, **how)
    comm.Barrier()
    began = time.monotonic()
    try:
        with testing.fault(step, rank=victim, action=testing.kill()):
            mpisave.save(state_of(comm.rank, 1.0), path, **how)
    except mpisave.CollectiveTimeout as exc:
        told = {
            "text": str(exc),
            "lost": sorted(exc.failures),
            "seconds": time.monotonic() - began,
        }
        told_by(path, comm.rank).write_text(json.dumps(told))
        # The first that ends ends the job: wait until all have told.
        while time.monotonic() - began < TIMEOUT_S + 2 * GRACE_S:
            if len(list(path.parent.glob(f"{path.name}.told.*"))) == RANKS - 1:
                break
            time.sleep(0.1)
        raise


def look(path, victim):
    """Check what the others told, and that the old file is as it was."""
    victim = int(victim)
    for rank in set(range(RANKS)) - {victim}:
        told = json.loads(told_by(path, rank).read_text())
        print(f"rank {rank} after {told['seconds']:.1f} s: {told['text']}")
        assert told["lost"] == [victim]
        host = socket.gethostname()
        assert f"rank {victim} ({host}) did not arrive" in told["text"]
        assert TIMEOUT_S <= told["seconds"] < TIMEOUT_S + GRACE_S
    assert not told_by(path, victim).exists()
    assert_holds(path, 0.0)


def again(path, gather_to):
    """Save ones."""
    from mpi4py import MPI

    mpisave.save(state_of(MPI.COMM_WORLD.rank, 1.0), path, **options(path, gather_to))


def look_again(path):
    """Check that the new file is there, and nothing of the one that was given up."""
    assert_holds(path, 1.0)
    assert not list(path.parent.glob(".*"))


def assert_holds(path, value):
    """Fail unless a stock reader finds the state of all ranks, and verify too."""
    if path.suffix == ".h5params":
        import h5py

        with h5py.File(path) as file:
            found = {key: dataset[()] for key, dataset in file.items()}
    else:
        found = pickle.loads(path.read_bytes())
    expected = {}
    for rank in range(RANKS):
        expected |= state_of(rank, value)
    assert set(found) == set(expected)
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array)
    mpisave.verify(path)
    np.testing.assert_array_equal(mpisave.load(path)["shared"], expected["shared"])


if __name__ == "__main__":
    actions = {"lose": lose, "look": look, "again": again, "look_again": look_again}
    actions[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
