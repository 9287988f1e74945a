"""Any number of ranks verifies a file, and hears the same of it."""

import errno

import numpy as np
import pytest
from boxes import noise
from helpers import assert_on_all_ranks, failing_on, small_blocks
from ranks import assert_refused, numbers, on_each

import mpisave
from mpisave import Shard, skeleton, verifying
from mpisave.checksum import crc32c
from mpisave.source import Source

pytestmark = pytest.mark.mpi

FORMATS = [pytest.param(False, id="pickle"), pytest.param(True, id="hdf5")]

STATE = {
    **{f"x{i}": noise((i, 50), "<f4", i) for i in range(30)},
    "deep": {"y": numbers((40, 60), ">i2"), "lr": 0.25},
}


@pytest.fixture(params=FORMATS)
def use_binary_format(request):
    return request.param


@pytest.fixture
def path(comm, shared_dir, use_binary_format, monkeypatch):
    """Return the path of a file of many blocks, of which each rank checks some."""
    monkeypatch.setattr(skeleton, "_LEAST_NBYTES", 1)
    monkeypatch.setattr(skeleton, "_JOIN_NBYTES", 0)
    monkeypatch.setattr(verifying, "_BLOCK_COSTS_NBYTES", 1)
    with small_blocks(256):
        if comm.rank == 0:
            from mpi4py import MPI

            mpisave.save(
                STATE,
                shared_dir / "state",
                use_binary_format=use_binary_format,
                comm=MPI.COMM_SELF,
            )
        comm.Barrier()
        yield shared_dir / "state"


def change(comm, path, changes):
    """Flip a bit of bytes of a file."""
    if comm.rank == 0:
        content = bytearray(path.read_bytes())
        for at in changes:
            content[at] ^= 4
        path.write_bytes(content)
    comm.Barrier()


def test_every_rank_has_the_same_report_and_its_part_of_the_work(
    comm, path, monkeypatch
):
    read, mine = Source.read_into, []

    def watch(source, offset, out):
        mine.append(out.nbytes)
        return read(source, offset, out)

    with monkeypatch.context() as patch:
        patch.setattr(Source, "read_into", watch)
        report = mpisave.verify(path, comm=comm)

    alone = mpisave.verify(path)
    assert_on_all_ranks(comm, report == alone, "report")
    assert_on_all_ranks(
        comm, report.digests["x7",] == crc32c(STATE["x7"].data), "digest"
    )
    index = 10_000 if comm.rank == 0 else 0
    most = 1.5 * path.stat().st_size / comm.size + 5000 + index
    assert_on_all_ranks(comm, sum(mine) < most, f"{sum(mine)} bytes of {most}")


def test_damage_in_the_parts_of_all_ranks_is_named_to_every_rank(comm, path):
    data = path.read_bytes()
    comm.Barrier()
    ats = [data.index(STATE[f"x{i}"].tobytes()) for i in (1, 9, 17, 23, 29)]
    ats.append(data.index(STATE["deep"]["y"].tobytes()))
    change(comm, path, [*ats, ats[2] + 256, ats[0] - 1])

    caught = assert_refused(
        comm, mpisave.FileFormatError, lambda: mpisave.verify(path, comm=comm), "8 part"
    )

    def check():
        lines = str(caught).splitlines()[1:]
        assert "the skeleton" in lines[0]
        for at in (*ats, ats[2] + 256):
            assert sum(f"at offset {at}:" in line for line in lines) == 1

    on_each(comm, check)


def test_file_that_is_replaced_meanwhile_is_verified_as_it_was_or_is(
    comm, path, shared_dir, monkeypatch
):
    other = shared_dir / "other"
    if comm.rank == 0:
        from mpi4py import MPI

        mpisave.save({"y": np.arange(99)}, other, comm=MPI.COMM_SELF)
    comm.Barrier()
    find = verifying.find_index

    def find_and_replace(source):
        found = find(source)
        if other.exists():
            other.replace(path)
        return found

    monkeypatch.setattr(verifying, "find_index", find_and_replace)

    report = mpisave.verify(path, comm=comm)

    # One rank has the old file open still.
    is_new = comm.size > 1
    assert_on_all_ranks(comm, (report.payload_nbytes == 99 * 8) == is_new, report)


def test_damage_that_only_one_rank_reads_is_raised_on_all(comm, path):
    data = path.read_bytes()
    comm.Barrier()
    first = data.index(STATE["x1"].tobytes())
    last = data.index(STATE["deep"]["y"].tobytes())

    for rank in range(comm.size):
        at = first + (last - first) * rank // comm.size
        change(comm, path, [at])
        for call in (
            lambda: mpisave.verify(path, comm=comm),
            lambda: mpisave.load(path, comm=comm),
        ):
            assert_refused(comm, mpisave.FileFormatError, call, str(path))
        change(comm, path, [at])

    assert_on_all_ranks(comm, mpisave.verify(path, comm=comm), "mended")


def test_damage_within_what_one_rank_wants_is_raised_on_all(comm, shared_dir):
    x = noise((64, 32), np.uint8)
    path = shared_dir / "x"
    with small_blocks(32):
        if comm.rank == 0:
            from mpi4py import MPI

            mpisave.save({"x": x}, path, comm=MPI.COMM_SELF)
        comm.Barrier()
        for victim in range(comm.size):
            at = path.read_bytes().index(x.tobytes()) + 32 * victim
            comm.Barrier()
            change(comm, path, [at])
            like = {"x": Shard(np.zeros((1, 32), np.uint8), x.shape, (comm.rank, 0))}
            assert_refused(
                comm,
                mpisave.FileFormatError,
                lambda like=like: mpisave.load(path, comm=comm, like=like),
                f"'x' is altered: the CRC-32C of block {victim}",
                [victim],
            )
            change(comm, path, [at])


def test_altered_skeleton_is_raised_on_all_by_a_load(comm, path):
    data = path.read_bytes()
    comm.Barrier()
    at = data.index(b"deep")
    change(comm, path, [at])

    for like in (None, {"x3": np.zeros((3, 50), "<f4")}):
        how = {"comm": comm, "like": like}
        if like:
            how["keys"] = "x3"
        assert_refused(
            comm,
            mpisave.FileFormatError,
            lambda how=how: mpisave.load(path, **how),
            f"{path}: the skeleton",
        )
        found = mpisave.load(path, **how, verify=False)
        assert_on_all_ranks(comm, "x3" in found, "not verified")


def test_digest_does_not_depend_on_ranks_format_or_transport(comm, shared_dir):
    whole = noise((40, 30), "<f4")
    found = set()
    for number, (use_binary_format, gather_to) in enumerate(
        [(False, None), (True, None), (False, 0), (True, 0)]
    ):
        path = shared_dir / f"{number}.opt"
        edges = 40 * np.arange(comm.size + 1) // comm.size
        mine = slice(edges[comm.rank], edges[comm.rank + 1])
        state = {
            "w": Shard(whole[mine], whole.shape, (int(mine.start), 0)),
            "same": np.arange(5),
            "lr": 0.5,
        }
        with small_blocks(100 + number):
            mpisave.save(
                state,
                path,
                use_binary_format=use_binary_format,
                gather_to=gather_to,
                state_type="opt",
                comm=comm,
            )
            comm.Barrier()
            found.add(mpisave.verify(path, comm=comm).digest)

    with small_blocks(100):
        alone = shared_dir / f"alone{comm.rank}"
        from mpi4py import MPI

        state = {"lr": 0.5, "same": np.arange(5), "w": whole}
        mpisave.save(state, alone, comm=MPI.COMM_SELF)
        found.add(mpisave.verify(alone).digest)
    assert_on_all_ranks(comm, len(found) == 1, f"{found}")


@pytest.mark.mpi(min_size=2)
def test_rank_that_cannot_read_is_raised_on_all(comm, path, monkeypatch):
    error = OSError(errno.EIO, "Input/output error")
    with failing_on(comm, 1, monkeypatch, verifying._Blocks, "check", error):
        caught = assert_refused(
            comm,
            mpisave.StorageError,
            lambda: mpisave.verify(path, comm=comm),
            "Input/output error",
            [1],
        )

    assert_on_all_ranks(comm, caught.errno == errno.EIO, "errno")


@pytest.mark.mpi(min_size=2)
def test_ranks_that_give_other_paths_are_refused(comm, path):
    mine = path if comm.rank == 0 else path.with_name("other")

    assert_refused(
        comm,
        mpisave.ArgumentError,
        lambda: mpisave.verify(mine, comm=comm),
        "path differs between ranks",
    )


def test_missing_file_is_raised_on_all(comm, shared_dir):
    missing = shared_dir / "missing"

    assert_refused(
        comm,
        mpisave.StorageError,
        lambda: mpisave.verify(missing, comm=comm),
        str(missing),
        [0],
    )
