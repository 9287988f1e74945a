"""allow_pickle: every rank gives the file to pickle.load, or none does."""

import pickle
from datetime import date

import numpy as np
import pytest
from helpers import assert_on_all_ranks

import mpisave
from mpisave import PerRank
from mpisave.errors import ArgumentError, FileFormatError

pytestmark = pytest.mark.mpi


def test_every_rank_has_what_pickle_load_gives(comm, mpi_tmp_path):
    path = mpi_tmp_path / "other.pkl"
    if comm.rank == 0:
        path.write_bytes(pickle.dumps({"d": date(2026, 1, 1)}))
    comm.barrier()

    with pytest.raises(FileFormatError, match="executes whatever it says"):
        mpisave.load(path, comm=comm)
    found = mpisave.load(path, comm=comm, allow_pickle=True)

    assert_on_all_ranks(comm, found == {"d": date(2026, 1, 1)}, "state")


@pytest.mark.filterwarnings("ignore:.*allow_pickle=True")
def test_objects_and_values_of_each_rank_come_back(comm, mpi_tmp_path):
    path = mpi_tmp_path / "ours.opt"
    state = {
        "w": np.arange(4),
        "when": date(2026, 1, 1),
        "mine": PerRank(date(2000 + comm.rank, 1, 1)),
    }
    mpisave.save(state, path, comm=comm, state_type="opt")

    found = mpisave.load(path, comm=comm, allow_pickle=True)

    assert_on_all_ranks(comm, found["when"] == date(2026, 1, 1), "object")
    assert_on_all_ranks(comm, found["w"].tolist() == [0, 1, 2, 3], "array")
    mine = found["mine"].value if isinstance(found["mine"], PerRank) else found["mine"]
    assert_on_all_ranks(comm, mine == date(2000 + comm.rank, 1, 1), "value of a rank")


@pytest.mark.mpi(min_size=2)
def test_ranks_that_disagree_are_refused_before_anything_is_executed(
    comm, mpi_tmp_path
):
    path = mpi_tmp_path / "other.pkl"
    if comm.rank == 0:
        path.write_bytes(pickle.dumps(1))
    comm.barrier()

    with pytest.raises(ArgumentError, match="allow_pickle differs between ranks"):
        mpisave.load(path, comm=comm, allow_pickle=comm.rank == 0)
    comm.barrier()
