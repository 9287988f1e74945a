"""Ranks that give one path write one file, each its own bytes, for any reader."""

import errno
import io
import os
import pickle
import socket
import threading

import numpy as np
import pytest
from boxes import noise, where
from fakes import FakeDeviceArray, put_in_place
from helpers import (
    assert_equal_states,
    assert_on_all_ranks,
    failing_on,
    files_in,
    small_blocks,
)
from ranks import (
    Counted,
    Numpy,
    Watched,
    assert_nothing_lost,
    assert_refused,
    assert_stock,
    grid,
    held_boxes,
    numbers,
    on_each,
    put_old,
)

import mpisave
from mpisave import (
    PerRank,
    Shard,
    Shards,
    arrays,
    comms,
    devices,
    moving,
    parts,
    replicas,
    saving,
    storage,
)
from mpisave.transport import exchange

pytestmark = pytest.mark.mpi

FORMATS = [pytest.param(False, id="pickle"), pytest.param(True, id="hdf5")]
FULL = OSError(errno.ENOSPC, "No space left on device")


# How arrays are split: their shape, into how many parts along each axis, and which
# ranks hold box number i.
def _in_turn(box, size):
    return [box % size]


def _twice(box, size):
    return sorted({box % size, (box + 1) % size})


def _all_but_last(box, size):
    return [box % max(1, size - 1)]


def _not_first(box, size):
    return [size - 1 - box % max(1, size - 1)]


SPLITS = {
    "rows": ((23, 40), lambda size: (size, 1), _in_turn),
    "columns": ((23, 40), lambda size: (1, size), _in_turn),
    "grid": ((23, 40), lambda size: (2, size), _in_turn),
    "cubes": ((6, 7, 10), lambda size: (2, 3, 2), _in_turn),
    "planes": ((6, 7, 10), lambda size: (1, size + 1, 1), _in_turn),
    "replicas": ((9, 16), lambda size: (2, 3), _twice),
    "idle last": ((9, 16), lambda size: (3, 2), _all_but_last),
    "idle first": ((9, 16), lambda size: (3, 2), _not_first),
}


def split(array, name, rank, size):
    """Return what a rank holds of an array that is split in one of these ways."""
    _, many, holders = SPLITS[name]
    boxes = grid(array.shape, many(size))
    mine = [box for i, box in enumerate(boxes) if rank in holders(i, size)]
    return held_boxes(array, mine)


def state_of(name, rank, size):
    """Return a rank's state: boxes, arrays of its own and of all, and small objects."""
    shape = SPLITS[name][0]
    x = split(numbers(shape, "f4"), name, rank, size)
    if x is None:
        return {}
    return {
        "everywhere": np.arange(50, dtype=">f8"),
        f"own{rank}": numbers((7, rank), "c16", rank),
        "step": 7,
        "opt": {"x": x, "lr": 0.25},
        "y": split(numbers(shape, ">i2", 1), name, rank, size),
        "rng": PerRank({"seed": rank, "words": np.full(rank + 1, rank, np.uint32)}),
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 3), np.int8),
    }


def whole_state(name, size):
    """Return what all ranks hold together, keys in the order of the lowest holders."""
    shape = SPLITS[name][0]
    whole = {}
    for rank in range(size):
        for key, value in state_of(name, rank, size).items():
            if key == "rng":
                whole.setdefault(key, {})[rank] = value.value
            elif key == "opt":
                whole[key] = {"x": numbers(shape, "f4"), "lr": 0.25}
            elif key == "y":
                whole[key] = numbers(shape, ">i2", 1)
            else:
                whole.setdefault(key, value)
    return whole


def save(comm, path, state, **how):
    return mpisave.save(state, path, comm=comm, **how)


class TestFile:
    @pytest.mark.parametrize("use_binary_format", FORMATS)
    @pytest.mark.parametrize("name", SPLITS)
    def test_what_all_ranks_hold_is_one_file_for_any_reader(
        self, comm, shared_dir, name, use_binary_format, monkeypatch
    ):
        size = comm.size
        state, expected = state_of(name, comm.rank, size), whole_state(name, size)
        how = {"use_binary_format": use_binary_format, "state_type": "opt"}
        targets = {"all.opt": None, "one.opt": 0, "two.opt": sorted({0, size - 1})}

        for label, gather_to in targets.items():
            save(comm, shared_dir / label, state, gather_to=gather_to, **how)
        # In runs that are long enough for a write each.
        monkeypatch.setattr("mpisave.plan.SHORTEST_RUN_NBYTES", 8)
        save(comm, shared_dir / "runs.opt", state, max_grouped_size=1000, **how)

        def check():
            path = shared_dir / "all.opt"
            assert_stock(path, expected, use_binary_format=use_binary_format)
            assert_equal_states(mpisave.load(path), expected)
            for other in [*targets, "runs.opt"]:
                same = (shared_dir / other).read_bytes() == path.read_bytes()
                assert same, f"{other} is another file"

        on_each(comm, check)
        assert_on_all_ranks(comm, len(files_in(shared_dir)) == 4, "no staging file")

    @pytest.mark.parametrize("protocol", [2, 3, 5])
    def test_every_protocol_is_read_by_pickle(self, comm, shared_dir, protocol):
        path = shared_dir / "x"

        save(comm, path, state_of("grid", comm.rank, comm.size), protocol=protocol)

        expected = whole_state("grid", comm.size)
        on_each(comm, lambda: assert_stock(path, expected, use_binary_format=False))
        assert_on_all_ranks(comm, path.read_bytes()[:2] == bytes([0x80, protocol]))

    @pytest.mark.parametrize("threads", [1, 4])
    def test_ranks_share_blocks_of_large_arrays(
        self, comm, shared_dir, monkeypatch, threads
    ):
        # Rows that end within a block of 1 MiB, in writes of 4 MiB at most; replicas
        # in shares; and small arrays that are written together.
        monkeypatch.setattr(saving, "threads_of", lambda *_: threads)
        size, path = comm.size, shared_dir / "x"
        rows = noise((9000, 1001), "u1", 1)
        every = noise(3 * 2**20 + 17, "u1", 2)
        small = {
            f"{rank}.{i}": noise(i, "u1", i) for rank in range(size) for i in range(300)
        }
        mine = grid(rows.shape, (size, 1))[comm.rank]
        state = {
            "rows": held_boxes(rows, [mine]),
            "every": every,
            **{k: v for k, v in small.items() if k.startswith(f"{comm.rank}.")},
        }

        report = save(comm, path, state, replicas="share")

        def check():
            expected = {"rows": rows, "every": every, **small}
            found = pickle.loads(path.read_bytes())
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                assert found[key].tobytes() == value.tobytes(), key
            assert mpisave.load(path).keys() == expected.keys()  # and its checksums

        on_each(comm, check)
        transport = "direct (host)" if size > 1 else "none"
        assert_on_all_ranks(comm, report.transport == transport, "transport")

    @pytest.mark.parametrize("use_binary_format", FORMATS)
    @pytest.mark.parametrize("cap", [100, "3G"])
    def test_device_arrays_are_staged_through_the_border_alone(
        self, comm, shared_dir, monkeypatch, use_binary_format, cap
    ):
        library = put_in_place(monkeypatch)
        size, path = comm.size, shared_dir / "x"
        rows, columns = numbers((4 * size, 6), "f8"), numbers((5, 3 * size), ">i2")
        own = numbers((20, 15), "f4", comm.rank)
        state = {f"own{comm.rank}": FakeDeviceArray(own[::2, 1:7])}
        for key, array, many in [
            ("rows", rows, (size, 1)),
            ("columns", columns, (1, size)),
        ]:
            box = grid(array.shape, many)[comm.rank]
            part = np.asfortranarray(array[where(*box)])
            state[key] = Shard(FakeDeviceArray(part), array.shape, box[0])

        save(
            comm,
            path,
            state,
            use_binary_format=use_binary_format,
            max_grouped_size=cap,
        )

        expected = {
            f"own{r}": numbers((20, 15), "f4", r)[::2, 1:7] for r in range(size)
        }
        expected = {"rows": rows, "columns": columns, **expected}
        found = {key: mpisave.load(path)[key] for key in expected}
        on_each(comm, lambda: assert_equal_states(found, expected))
        assert_on_all_ranks(comm, library.calls, "staged by the border")

    def test_report_is_that_of_the_one_file(self, comm, shared_dir):
        path = shared_dir / "x"

        report = save(comm, path, {f"w{comm.rank}": np.zeros(10)})

        assert_on_all_ranks(comm, report.paths == (str(path),), "paths")
        assert_on_all_ranks(comm, report.nbytes == path.stat().st_size, "nbytes")
        assert_on_all_ranks(comm, report.payload_nbytes == 80 * comm.size, "payload")
        assert_on_all_ranks(comm, report.rounds == 0, "rounds")

    def test_empty_states_are_an_empty_state(self, comm, shared_dir):
        save(comm, shared_dir / "x", {})

        assert_on_all_ranks(comm, mpisave.load(shared_dir / "x") == {}, "empty")


class TestGroups:
    @pytest.mark.mpi(min_size=3)
    @pytest.mark.parametrize("use_binary_format", FORMATS)
    def test_ranks_of_one_path_write_together_and_others_alone(
        self, comm, shared_dir, use_binary_format
    ):
        # The last two share; what they share needs an exchange, what others have not.
        size, together = comm.size, [comm.size - 2, comm.size - 1]
        is_in = comm.rank in together
        x = numbers((6, 8), "f4")
        state = {f"own{comm.rank}": numbers((3,), "i8", comm.rank)}
        if is_in:
            box = grid(x.shape, (1, 2))[comm.rank - together[0]]
            state |= {"x": held_boxes(x, [box]), "rng": PerRank(comm.rank)}
        path = shared_dir / ("both" if is_in else f"alone{comm.rank}")

        report = save(comm, path, state, use_binary_format=use_binary_format)

        def check():
            for rank in range(size - 2):
                assert_stock(
                    shared_dir / f"alone{rank}",
                    {f"own{rank}": numbers((3,), "i8", rank)},
                    use_binary_format=use_binary_format,
                )
            first, second = together
            expected = {
                f"own{first}": numbers((3,), "i8", first),
                "x": x,
                "rng": {0: first, 1: second},
                f"own{second}": numbers((3,), "i8", second),
            }
            assert_stock(
                shared_dir / "both", expected, use_binary_format=use_binary_format
            )
            assert_equal_states(mpisave.load(shared_dir / "both"), expected)

        on_each(comm, check)
        assert_on_all_ranks(comm, report.path == str(path), "report.path")
        assert_on_all_ranks(comm, len(files_in(shared_dir)) == size - 1, "no staging")

    @pytest.mark.mpi(min_size=2)
    def test_groups_may_be_any_ranks_and_change(self, comm, shared_dir):
        expected = {}
        for number in range(3):
            path = shared_dir / f"{number}.{(comm.rank + number) % 2}"
            save(comm, path, {f"own{comm.rank}": np.full(4, number)})
            for rank in range(comm.size):
                name = f"{number}.{(rank + number) % 2}"
                expected.setdefault(name, {})[f"own{rank}"] = np.full(4, number)

        found = {name: mpisave.load(shared_dir / name) for name in files_in(shared_dir)}
        on_each(
            comm, lambda: assert_equal_states(found, dict(sorted(expected.items())))
        )

    @pytest.mark.mpi(min_size=2)
    def test_state_that_is_refused_in_one_group_is_refused_in_all(
        self, comm, shared_dir
    ):
        last = comm.size - 1
        old = put_old(comm, shared_dir / "group0")
        path = shared_dir / f"group{int(comm.rank == last)}"
        state = {"x": Shard(np.zeros(3), (4,), (0,))} if comm.rank == last else {}

        assert_refused(
            comm, mpisave.StateDictError, lambda: save(comm, path, state), "has a gap"
        )

        assert_nothing_lost(comm, old)

    @pytest.mark.mpi(min_size=3)
    def test_group_of_which_a_rank_cannot_take_its_plan_goes_on_afterwards(
        self, comm, shared_dir, monkeypatch
    ):
        last = comm.size - 1
        path = shared_dir / f"group{int(comm.rank < 2)}"
        state = {f"own{comm.rank}": np.ones(3)}
        loads, calls = pickle.loads, []

        def fail(data):
            calls.append(1)
            found = loads(data)
            if isinstance(found, parts.Part):
                raise MemoryError("injected")
            return found

        with monkeypatch.context() as patch:
            if comm.rank == 1:
                patch.setattr("mpisave.collective.pickle.loads", fail)
            assert_refused(
                comm,
                mpisave.CollectiveError,
                lambda: save(comm, path, state),
                "injected",
            )

        save(comm, path, state)
        if comm.rank in (0, last):
            found = sorted(loads(path.read_bytes()))
            mine = range(2) if comm.rank == 0 else range(2, comm.size)
            assert found == [f"own{rank}" for rank in mine]

    @pytest.mark.mpi(min_size=2)
    def test_rank_in_the_path_makes_each_rank_a_group(self, comm, shared_dir):
        state = {"x": held_boxes(np.full(2, comm.rank), grid((2,), (2,)))}

        report = save(comm, shared_dir / "{rank}.pkl", state)

        for rank in range(comm.size):
            found = pickle.loads((shared_dir / f"{rank}.pkl").read_bytes())
            assert_equal_states(found, {"x": np.full(2, rank)})
        name = str(shared_dir / f"{comm.rank}.pkl")
        assert_on_all_ranks(comm, report.paths == (name,), "paths")

    @pytest.mark.mpi(min_size=2)
    @pytest.mark.parametrize("way", ["link", "working directory"])
    def test_path_that_leads_elsewhere_on_other_ranks_is_refused(
        self, comm, shared_dir, monkeypatch, way
    ):
        # As a link to a disk of each node would. Here there is one node.
        place = shared_dir / str(comm.rank)
        place.mkdir()
        monkeypatch.chdir(place)
        path = "x.params" if way == "working directory" else "/proc/self/cwd/x.params"

        caught = assert_refused(
            comm,
            mpisave.StorageError,
            lambda: save(comm, path, {f"own{comm.rank}": np.zeros(3)}),
            f"{shared_dir}/1/x.params on rank 1 ({socket.gethostname()})",
        )

        assert "gather_to=0" in str(caught)
        assert_on_all_ranks(comm, os.listdir(place) == [], "nothing is left")
        # Roots have all of the state each, wherever they put it.
        how = {"gather_to": [0, 1], "state_type": "params"}
        save(comm, "y.params", {f"own{comm.rank}": np.ones(1)}, **how)
        has_file = os.listdir(place) == ["y.params"]
        assert_on_all_ranks(comm, has_file == (comm.rank < 2), "a file of each root")

    @pytest.mark.mpi(min_size=3)
    def test_report_counts_small_messages_within_a_group(
        self, comm, shared_dir, monkeypatch
    ):
        sent = [0]
        dump = comms.PrivateComm._dump

        def counted(own, obj):
            data = dump(own, obj)
            sent[0] += len(data)
            return data

        monkeypatch.setattr(comms.PrivateComm, "_dump", counted)
        state = {f"{comm.rank}.{i}": np.zeros(i) for i in range(100)}

        report = save(comm, shared_dir / f"{comm.rank // 2}", state)

        # The report itself is sent after it was made.
        is_counted = abs(report.metadata_nbytes - sent[0]) < 1000
        assert_on_all_ranks(comm, is_counted, f"{report.metadata_nbytes} of {sent[0]}")


class TestMemory:
    """Column shards, exchanged within the cap."""

    @pytest.mark.mpi(min_size=2)
    @pytest.mark.parametrize("gather_to", [None, 0])
    @pytest.mark.parametrize(
        ("cap", "nbytes", "shape"),
        [("10K", 10 * 2**10, (40, 400)), ("1M", 2**20, (1200, 1000))],
    )
    def test_buffers_of_an_exchange_stay_within_the_cap(
        self, comm, shared_dir, monkeypatch, cap, nbytes, shape, gather_to
    ):
        counted, sent = Counted(), []
        monkeypatch.setattr(exchange, "np", Numpy(counted))
        monkeypatch.setattr(devices, "np", Numpy(counted))

        def on_alltoallv(send, received):
            sent.append((sum(send[1]), sum(received[1])))

        make = moving.Exchange
        monkeypatch.setattr(
            moving,
            "Exchange",
            lambda own, *rest: make(Watched(own, Ialltoallv=on_alltoallv), *rest),
        )
        x = numbers(shape, "f4")
        mine = grid(shape, (1, comm.size))[comm.rank]
        path = shared_dir / "x.params"

        report = save(
            comm,
            path,
            {"x": held_boxes(x, [mine]), "whole": np.arange(10)},
            gather_to=gather_to,
            state_type="params",
            max_grouped_size=cap,
        )

        assert_on_all_ranks(comm, 0 < counted.most <= nbytes, f"{counted.most} bytes")
        assert_on_all_ranks(comm, len(sent) > 2, "several rounds")
        assert_on_all_ranks(comm, max(map(sum, sent)) <= nbytes, "what travels")
        assert_on_all_ranks(comm, report.rounds >= len(sent), "rounds")
        expected = {"x": x, "whole": np.arange(10)}
        on_each(comm, lambda: assert_stock(path, expected, use_binary_format=False))

    @pytest.mark.mpi(min_size=2)
    def test_nothing_that_is_held_whole_travels(self, comm, shared_dir, monkeypatch):
        calls = []
        make = moving.Exchange
        monkeypatch.setattr(
            moving, "Exchange", lambda *rest: calls.append(rest) or make(*rest)
        )
        rows = grid((8, 6), (comm.size, 1))[comm.rank]
        state = {"x": held_boxes(numbers((8, 6), "f4"), [rows]), "y": np.arange(3)}

        report = save(comm, shared_dir / "x", state)

        assert_on_all_ranks(comm, not calls, "exchanges")
        assert_on_all_ranks(comm, report.step_nbytes["gather"] == 0, "bytes that came")

    @pytest.mark.mpi(min_size=2)
    def test_ranks_of_one_directory_each_write_an_even_part_of_an_exchange(
        self, comm, shared_dir, monkeypatch
    ):
        written = watch_writes(monkeypatch)
        x = numbers((200, 100 * comm.size), "f4")
        mine = grid(x.shape, (1, comm.size))[comm.rank]

        save(
            comm,
            shared_dir / "x",
            {"x": held_boxes(x, [mine])},
            max_grouped_size=4 * 2000,
        )

        # Rank 0 writes skeleton and index as well.
        nbytes, share = sum(written), x.nbytes / comm.size
        assert_on_all_ranks(comm, abs(nbytes - share) < 8000, f"{nbytes} of {share}")


def watch_writes(monkeypatch):
    """Return the lengths of this rank's writes to files, as they come."""
    written = []
    write = storage.StagedFile.write

    def watched(self, offset, data):
        written.append(data.nbytes)
        return write(self, offset, data)

    monkeypatch.setattr(storage.StagedFile, "write", watched)
    return written


def bad_boxes(rank, size):
    """Yield what a rank holds, and what the refusal says."""
    x, last = np.zeros((8, 6), "f4"), size - 1
    rows = grid(x.shape, (size, 1))
    start, count = rows[rank]
    mine = held_boxes(x, [rows[rank]])
    first = f"[0:{rows[0][1][0]}, 0:6]"
    final = f"[{rows[-1][0][0]}:8, 0:6]"
    yield (
        {} if rank == last else {"x": mine},
        ["'x' of global shape (8, 6) has a gap", f"nobody has {final}", "(rank 0)"],
    )
    wide = held_boxes(x, [((start[0] - 1, 0), (count[0] + 1, 6))]) if rank else mine
    yield (
        {"x": wide},
        [
            "'x' of global shape (8, 6)",
            f"{first} of rank 0",
            f"[{rows[1][0][0] - 1}:{rows[1][0][0] + rows[1][1][0]}, 0:6] of rank 1",
            "overlap",
        ],
    )
    shifted = Shard(mine.array, x.shape, (start[0] + 1, 0)) if rank == last else mine
    yield (
        {"x": shifted},
        [
            f"rank {last} (",
            f"'x': an array of shape {count if rank == last else rows[-1][1]}",
            f"starts at ({rows[-1][0][0] + 1}, 0) does not lie within",
        ],
    )
    other = Shard(mine.array.astype("f8"), x.shape, start) if rank == last else mine
    yield (
        {"x": other},
        ["'x' differs", "float32", "on rank 0", "float64", f"on rank {last}"],
    )
    larger = Shard(mine.array, (9, 6), start) if rank == last else mine
    yield {"x": larger}, ["'x' differs", "(8, 6)", "on rank 0", "(9, 6)"]
    mixed = {"x": {"y": mine}} if rank == last else {"x": mine}
    yield mixed, ["'x' differs", "on rank 0", f"on rank {last}"]


class TestRefusals:
    @pytest.mark.mpi(min_size=2)
    @pytest.mark.parametrize("gather_to", [None, 0])
    @pytest.mark.parametrize("number", range(6))
    def test_boxes_that_do_not_fit_are_refused_on_every_rank(
        self, comm, shared_dir, number, gather_to
    ):
        old = put_old(comm, shared_dir / "x.opt")
        state, matches = list(bad_boxes(comm.rank, comm.size))[number]

        caught = assert_refused(
            comm,
            mpisave.StateDictError,
            lambda: save(comm, old, state, gather_to=gather_to, state_type="opt"),
            matches[0],
        )

        for match in matches:
            assert match in str(caught), caught
        assert_nothing_lost(comm, old)

    @pytest.mark.mpi(min_size=2)
    def test_rank_that_does_not_see_the_file_is_told_what_to_do(
        self, comm, shared_dir, monkeypatch
    ):
        old, last = put_old(comm, shared_dir / "x"), comm.size - 1
        error = FileNotFoundError(errno.ENOENT, "No such file or directory")
        with failing_on(comm, last, monkeypatch, storage.StagedFile, "join", error):
            caught = assert_refused(
                comm,
                mpisave.StorageError,
                lambda: save(comm, old, state_of("rows", comm.rank, comm.size)),
                f"rank {last} (",
                [last],
            )

        assert caught.step == "open the staging file"
        assert caught.errno == errno.ENOENT
        host = comm.bcast(socket.gethostname())
        for match in [f"rank 0 on {host}", str(old), "gather_to=0", "{rank}"]:
            assert match in str(caught), caught
        assert_nothing_lost(comm, old)

    @pytest.mark.mpi(min_size=2)
    def test_file_object_on_one_rank_only_is_a_file_of_that_rank(
        self, comm, shared_dir
    ):
        state = {f"own{comm.rank}": np.full(3, comm.rank)}
        is_last = comm.rank == comm.size - 1
        path = shared_dir / "x"
        buffer = io.BytesIO()

        save(comm, buffer if is_last else path, state)

        expected = {f"own{r}": np.full(3, r) for r in range(comm.size)}
        apart = {f"own{comm.size - 1}": expected.pop(f"own{comm.size - 1}")}
        on_each(comm, lambda: assert_equal_states(mpisave.load(path), expected))
        found = mpisave.load(buffer) if is_last else apart
        on_each(comm, lambda: assert_equal_states(found, apart))


class TestReplicas:
    @pytest.mark.mpi(min_size=2)
    @pytest.mark.parametrize("gather_to", [None, 0])
    @pytest.mark.parametrize("held", ["whole", "box", "device"])
    def test_one_flipped_bit_is_found_and_nothing_is_saved(
        self, comm, shared_dir, monkeypatch, held, gather_to
    ):
        put_in_place(monkeypatch)
        old, last = put_old(comm, shared_dir / "x.opt"), comm.size - 1
        x, equal = noise((2**18, 10), "u1", 1), noise(100, "u1", 2)
        sound = {"opt": {"x": x}, "equal": equal, "step": 3}
        how = {"gather_to": gather_to, "state_type": "opt", "replicas": "check"}
        if comm.rank == last:
            x = x.copy()
            x[2**17, 3] ^= 16
        value = {
            "whole": x,
            "box": Shards(
                Shard(x[:2000], x.shape, (0, 0)), Shard(x[2000:], x.shape, (2000, 0))
            ),
            "device": FakeDeviceArray(x),
        }[held]

        caught = assert_refused(
            comm,
            mpisave.StateDictError,
            lambda: save(comm, old, sound | {"opt": {"x": value}}, **how),
            "1 replica(s) differ between ranks",
            [0],
        )

        assert caught.step == "seal"
        key = "['opt']['x']" + ("[2000:262144, 0:10]" if held == "box" else "")
        host = socket.gethostname()
        ranks = ", ".join(f"rank {rank} ({host})" for rank in range(last))
        for match in [key, f"on {ranks};", f"on rank {last} ({host})"]:
            assert match in str(caught), caught
        assert "equal" not in str(caught).replace("to be equal", "")
        assert_nothing_lost(comm, old)
        save(comm, old, sound, **how)
        found = mpisave.load(old)
        on_each(comm, lambda: assert_equal_states(found, sound))

    @pytest.mark.parametrize("replicas", ["share", "check"])
    def test_replicas_are_written_by_all_that_hold_them_in_even_parts(
        self, comm, shared_dir, monkeypatch, replicas
    ):
        x = {f"x{i}": noise(20_000 + i, "u1", i) for i in range(5)}
        path, total = shared_dir / "x", sum(a.nbytes for a in x.values())
        written = watch_writes(monkeypatch)
        with small_blocks(1024):
            save(comm, path, x, replicas=replicas)
            found = mpisave.load(path)

        on_each(comm, lambda: assert_equal_states(found, x))
        on_each(comm, lambda: assert_stock(path, x, use_binary_format=False))
        # Rank 0 writes skeleton and index as well.
        nbytes, more = sum(written), 6000 if comm.rank == 0 else 1000
        share = total / comm.size
        assert_on_all_ranks(comm, -1100 < nbytes - share < 1100 + more, f"{nbytes}")

    @pytest.mark.mpi(min_size=2)
    def test_replicated_boxes_are_written_by_their_holders_in_turn(
        self, comm, shared_dir, monkeypatch
    ):
        x = noise((16 * comm.size, 5000), "u1")
        state = {"x": held_boxes(x, grid(x.shape, (8 * comm.size, 1)))}
        written = watch_writes(monkeypatch)

        save(comm, shared_dir / "x", state, replicas="share")

        found = pickle.loads((shared_dir / "x").read_bytes())
        on_each(comm, lambda: assert_equal_states(found, {"x": x}))
        nbytes, share = sum(written), x.nbytes / comm.size
        assert_on_all_ranks(comm, 0 <= nbytes - share < 3000, f"{nbytes} of {share}")

    @pytest.mark.mpi(min_size=2)
    def test_without_more_the_lowest_rank_has_its_value_saved(
        self, comm, shared_dir, monkeypatch
    ):
        path = shared_dir / "x"
        state = {"all": np.full(5000, comm.rank), "box": np.full((4, 3), comm.rank)}
        state["box"] = held_boxes(state["box"], grid((4, 3), (1, 2)))
        if comm.rank:
            state["rest"] = np.full(7000, comm.rank)
        written = watch_writes(monkeypatch)

        save(comm, path, state)

        expected = {
            "all": np.zeros(5000, int),
            "box": np.zeros((4, 3), int),
            "rest": np.ones(7000, int),
        }
        on_each(comm, lambda: assert_stock(path, expected, use_binary_format=False))
        nbytes = {0: 40_000, 1: 56_000}.get(comm.rank, 0)
        assert_on_all_ranks(comm, 0 <= sum(written) - nbytes < 3000, "who writes")


# Victim, what fails there, in which step; whether arrays lie in short runs.
STEPS = {
    "describe": (-1, saving, "flatten", "describe the state dict", False),
    "check": (-1, saving.PickleFormat, "check", "describe the state dict", False),
    "merge": (0, parts, "merge", "plan", False),
    "layout": (0, saving.PickleFormat, "layout", "plan", False),
    "plan": (-1, saving, "through_coordinator", None, False),
    "create": (0, storage.os, "open", "create the staging file", False),
    "open": (-1, storage.os, "open", "open the staging file", False),
    "reserve": (0, storage.StagedFile, "allocate", "lay out the file", False),
    "skeleton": (0, storage.os, "pwrite", "lay out the file", False),
    "read own": (-1, arrays.HeldArray, "view", "write", False),
    "write own": (-1, storage.os, "pwrite", "write", False),
    "flush own": (-1, storage.os, "fsync", "write", False),
    "buffers": (-1, moving, "Exchange", "allocate buffers", True),
    "read box": (-1, arrays.HeldArray, "stage_box", "exchange and write", True),
    "read box of first": (0, arrays.HeldArray, "stage_box", "exchange and write", True),
    "write chunk": (-1, storage.os, "pwrite", "exchange and write", True),
    "flush chunks": (-1, storage.os, "fsync", "exchange and write", True),
    "digests": (-1, replicas, "crc32c", "compare replicas", False),
    "checksums": (0, parts.Whole, "checksums", "seal", False),
    "index": (0, saving.index, "encode", "seal", False),
    "close": (-1, storage.StagedFile, "close", "seal", False),
    "rename": (0, storage.Path, "replace", "publish", False),
}
del STEPS["plan"]  # it communicates


def failing_state(comm, *, is_woven):
    shape = (60, 8 * comm.size)
    if is_woven:
        box = grid(shape, (1, comm.size))[comm.rank]
        return {"x": held_boxes(numbers(shape, "i8"), [box])}
    return {f"own{comm.rank}": numbers(shape, "i8"), "every": np.arange(1000)}


class TestFailures:
    @pytest.mark.mpi(min_size=2)
    @pytest.mark.parametrize("name", STEPS)
    def test_failure_in_any_step_is_raised_everywhere(
        self, comm, shared_dir, monkeypatch, name
    ):
        victim, target, function, step, is_woven = STEPS[name]
        victim %= comm.size
        old = put_old(comm, shared_dir / "x")
        state = failing_state(comm, is_woven=is_woven)
        how = {"replicas": "check", "max_grouped_size": 4096}
        with failing_on(comm, victim, monkeypatch, target, function, FULL):
            caught = assert_refused(
                comm,
                mpisave.StorageError,
                lambda: save(comm, old, state, **how),
                "No space left on device",
                [victim],
            )

        assert caught.step == step
        assert caught.errno == errno.ENOSPC
        assert (
            caught.failures[victim].host == comm.allgather(socket.gethostname())[victim]
        )
        assert_nothing_lost(comm, old)
        save(comm, old, state, **how)
        whole = {
            f"own{r}": numbers((60, 8 * comm.size), "i8") for r in range(comm.size)
        }
        whole = {"x": whole["own0"]} if is_woven else whole | {"every": np.arange(1000)}
        found = {key: mpisave.load(old)[key] for key in whole}
        on_each(comm, lambda: assert_equal_states(found, whole))

    @pytest.mark.mpi(min_size=2)
    @pytest.mark.parametrize("victim", [0, -1])
    @pytest.mark.parametrize("calls", [1, 3])
    @pytest.mark.parametrize("what", ["read", "write"])
    def test_failure_between_rounds_of_an_exchange_is_raised_everywhere(
        self, comm, shared_dir, monkeypatch, what, calls, victim
    ):
        victim %= comm.size
        old = put_old(comm, shared_dir / "x")
        target, name = {
            "read": (arrays.HeldArray, "stage_box"),
            "write": (exchange.Exchange, "_put_together"),
        }[what]
        function, left = getattr(target, name), [calls]

        def fail(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise FULL
            return function(*args, **kwargs)

        if comm.rank == victim:
            monkeypatch.setattr(target, name, fail)
        state = failing_state(comm, is_woven=True)

        caught = assert_refused(
            comm,
            mpisave.StorageError,
            lambda: save(comm, old, state, max_grouped_size=1024),
            "No space left on device",
            [victim],
        )

        assert caught.step == "exchange and write"
        assert_nothing_lost(comm, old)

    @pytest.mark.mpi(min_size=2)
    def test_error_in_an_exchange_names_the_array(self, comm, shared_dir, monkeypatch):
        old, last = put_old(comm, shared_dir / "x"), comm.size - 1
        error = RuntimeError("device lost")
        with failing_on(comm, last, monkeypatch, arrays.HeldArray, "stage_box", error):
            assert_refused(
                comm,
                mpisave.CollectiveError,
                lambda: save(comm, old, failing_state(comm, is_woven=True)),
                "'x': RuntimeError('device lost')",
                [last],
            )

        assert_nothing_lost(comm, old)

    @pytest.mark.mpi(min_size=2)
    def test_rank_without_memory_for_an_exchange_is_raised_everywhere(
        self, comm, shared_dir, monkeypatch
    ):
        old, last = put_old(comm, shared_dir / "x"), comm.size - 1

        def empty(*args):
            raise MemoryError("no buffer")

        if comm.rank == last:
            monkeypatch.setattr(exchange, "np", Numpy(empty))

        caught = assert_refused(
            comm,
            mpisave.CollectiveError,
            lambda: save(comm, old, failing_state(comm, is_woven=True)),
            "no buffer",
            [last],
        )

        assert caught.step == "allocate buffers"
        assert_nothing_lost(comm, old)

    @pytest.mark.mpi(min_size=2)
    @pytest.mark.parametrize("is_woven", [False, True])
    def test_interrupt_on_one_rank_stays_one_and_ends_the_save_of_all(
        self, comm, shared_dir, monkeypatch, is_woven
    ):
        old, last = put_old(comm, shared_dir / "x"), comm.size - 1
        name = "stage_box" if is_woven else "view"
        caught = None
        with failing_on(
            comm, last, monkeypatch, arrays.HeldArray, name, KeyboardInterrupt()
        ):
            try:
                save(comm, old, failing_state(comm, is_woven=is_woven))
            except BaseException as exc:
                caught = exc

        expected = KeyboardInterrupt if comm.rank == last else mpisave.CollectiveError
        assert_on_all_ranks(comm, type(caught) is expected, f"{caught!r}")
        assert_nothing_lost(comm, old)

    @pytest.mark.mpi(min_size=2)
    def test_failure_of_one_of_several_threads_is_raised_everywhere(
        self, comm, shared_dir, monkeypatch
    ):
        monkeypatch.setattr(saving, "threads_of", lambda *_: 4)
        old, last = put_old(comm, shared_dir / "x"), comm.size - 1
        write = storage.StagedFile.write

        def full(self, offset, data):
            if data.nbytes > 2**18 and threading.current_thread().name != "MainThread":
                raise FULL
            return write(self, offset, data)

        if comm.rank == last:
            monkeypatch.setattr(storage.StagedFile, "write", full)
        state = {f"{comm.rank}.{i}": np.zeros(10**i, np.uint8) for i in range(1, 8)}

        caught = assert_refused(
            comm,
            mpisave.StorageError,
            lambda: save(comm, old, state),
            f"'{last}.",
            [last],
        )

        monkeypatch.undo()
        assert caught.step == "write"
        assert_nothing_lost(comm, old)
        threads = [t.name for t in threading.enumerate() if "mpisave" in t.name]
        assert_on_all_ranks(comm, not threads, f"threads left: {threads}")


class TestDurable:
    @pytest.mark.mpi(min_size=2)
    @pytest.mark.parametrize("durable", [True, False])
    @pytest.mark.parametrize("is_woven", [False, True])
    def test_each_rank_flushes_what_it_wrote_if_asked_to(
        self, comm, shared_dir, monkeypatch, durable, is_woven
    ):
        calls = []
        fsync = os.fsync
        monkeypatch.setattr(storage.os, "fsync", lambda fd: calls.append(fsync(fd)))

        save(
            comm,
            shared_dir / "x",
            failing_state(comm, is_woven=is_woven),
            durable=durable,
        )

        # The first rank once more behind the index, and the directory.
        expected = (3 if comm.rank == 0 else 1) if durable else 0
        assert_on_all_ranks(comm, len(calls) == expected, f"{len(calls)} flushes")


class TestPlans:
    """A plan is made once for each structure."""

    @pytest.mark.mpi(min_size=2)
    def test_second_save_of_a_structure_sends_little_but_checksums(
        self, comm, shared_dir
    ):
        for n in (10, 2000):
            state = {f"{comm.rank}.{i}": np.full(i % 7, i) for i in range(n)}
            sent = []
            for number in range(3):
                state["0.0" if comm.rank == 0 else f"{comm.rank}.1"][:] = number
                sent.append(save(comm, shared_dir / "x", state).metadata_nbytes)
            first, *others = sent

            assert_on_all_ranks(comm, first > 15 * n, f"{first} bytes")
            # Of each block that a rank writes, four bytes of checksum.
            assert_on_all_ranks(comm, max(others) <= 2000 + 4 * n, f"{others} bytes")

    @pytest.mark.mpi(min_size=2)
    def test_boxes_of_columns_are_sent_once_and_travel_in_few_rounds(
        self, comm, shared_dir
    ):
        n, x = 300, numbers((8, 4 * comm.size), "f4")
        (box,) = (
            b for i, b in enumerate(grid(x.shape, (1, comm.size))) if i == comm.rank
        )
        state = {f"x{i}": held_boxes(x + i, [box]) for i in range(n)}

        report = save(comm, shared_dir / "x", state)

        found = pickle.loads((shared_dir / "x").read_bytes())
        assert_equal_states(found, {f"x{i}": x + i for i in range(n)})
        assert_on_all_ranks(comm, report.rounds == 1, f"{report.rounds} rounds")
        # Of each box: rank, ordinal, and start and length along two axes.
        most = n * (72 * comm.size + 300)
        assert_on_all_ranks(comm, report.metadata_nbytes < most, report)

    @pytest.mark.mpi(min_size=2)
    def test_second_save_of_a_structure_asks_no_coordinator(
        self, comm, shared_dir, monkeypatch
    ):
        state = state_of("grid", comm.rank, comm.size)
        save(comm, shared_dir / "x", state)
        calls = []
        plan = saving.through_coordinator
        monkeypatch.setattr(
            saving,
            "through_coordinator",
            lambda *args, **more: calls.append(args) or plan(*args, **more),
        )

        for _ in range(2):
            save(comm, shared_dir / "y", state)

        assert_on_all_ranks(comm, not calls, "planned again")
        same = (shared_dir / "x").read_bytes() == (shared_dir / "y").read_bytes()
        assert_on_all_ranks(comm, same, "the same file")

    @pytest.mark.parametrize("use_binary_format", FORMATS)
    def test_anything_that_changes_is_in_the_file(
        self, comm, shared_dir, use_binary_format
    ):
        size, rank, path = comm.size, comm.rank, shared_dir / "x"

        def box(array, many):
            return held_boxes(array, [grid(array.shape, many)[rank]])

        def own(r, value=0, n=5):
            return {f"own{r}": np.full(n + r, value)}

        def every(**how):
            return {k: v for r in range(size) for k, v in own(r, **how).items()}

        x, z = numbers((4 * size, 4 * size), "f4"), numbers((4 * size, 4 * size), "i4")
        steps = [
            (own(rank), every()),
            (own(rank, value=1), every(value=1)),  # the same structure
            (own(rank, n=9), every(n=9)),
            (own(rank) | {"n": 1}, {**own(0), "n": 1, **every()}),
            (own(rank) | {"n": 2}, {**own(0), "n": 2, **every()}),
            (own(rank) | {"n": 2.0}, {**own(0), "n": 2.0, **every()}),
            ({"x": box(x, (size, 1))}, {"x": x}),
            ({"x": box(x, (1, size))}, {"x": x}),
            ({"x": box(z, (1, size))}, {"x": z}),
            ({"y": box(z, (1, size))}, {"y": z}),
            ({"x": x}, {"x": x}),
            ({"x": x} if rank == size - 1 else {}, {"x": x}),
        ]

        for _ in range(2):
            for state, expected in steps:
                save(comm, path, state, use_binary_format=use_binary_format)
                on_each(
                    comm,
                    lambda whole=expected: assert_stock(
                        path, whole, use_binary_format=use_binary_format
                    ),
                )
                comm.Barrier()

    @pytest.mark.mpi(min_size=2)
    def test_change_on_one_rank_alone_is_in_the_file(self, comm, shared_dir):
        path, last = shared_dir / "x", comm.size - 1
        for n in (3, 3, 4, 3):
            state = {f"own{comm.rank}": np.full(n if comm.rank == last else 3, n)}

            save(comm, path, state)

            found = mpisave.load(path)[f"own{last}"]
            assert_on_all_ranks(comm, found.tolist() == [n] * n, f"{found}")
            comm.Barrier()

    @pytest.mark.mpi(min_size=2)
    def test_save_that_was_refused_leaves_no_plan(self, comm, shared_dir):
        path = shared_dir / "x"
        halves = grid((8,), (2,))
        bad = {"x": held_boxes(np.arange(8), halves[:1])}
        for _ in range(2):
            assert_refused(
                comm,
                mpisave.StateDictError,
                lambda: save(comm, path, bad),
                "nobody has [4:8]",
            )

        save(comm, path, {"x": held_boxes(np.arange(8), [halves[comm.rank % 2]])})

        found = mpisave.load(path)
        on_each(comm, lambda: assert_equal_states(found, {"x": np.arange(8)}))


class TestRoots:
    @pytest.mark.mpi(min_size=2)
    @pytest.mark.parametrize("use_binary_format", FORMATS)
    @pytest.mark.parametrize(
        "many",
        [
            pytest.param((1, 4), id="rows"),
            pytest.param((4, 1), id="columns"),
        ],
    )
    def test_roots_with_directories_of_their_own_get_all_boxes(
        self, comm, shared_dir, monkeypatch, use_binary_format, many
    ):
        roots = [0, comm.size - 1]
        local = shared_dir / f"node{comm.rank}"
        local.mkdir()
        monkeypatch.chdir(local)
        comm.Barrier()
        x = numbers((12, 4 * 8), "f4")
        boxes = grid(x.shape, many[::-1])
        mine = [box for i, box in enumerate(boxes) if i % comm.size == comm.rank]
        state = {} if not mine else {"x": held_boxes(x, mine)}

        save(
            comm,
            "x.params",
            state,
            gather_to=roots,
            state_type="params",
            use_binary_format=use_binary_format,
            max_grouped_size=200,
        )

        comm.Barrier()
        for root in roots:
            path = shared_dir / f"node{root}" / "x.params"
            assert_stock(path, {"x": x}, use_binary_format=use_binary_format)
            assert_equal_states(mpisave.load(path), {"x": x})
