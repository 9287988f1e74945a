"""Drawn states come back bit for bit, whoever wrote them and whoever reads them.

Rank 0 draws, with hypothesis, and tells the others: all ranks run one example, agree on
what came of it, and shrink it together.
"""

import contextlib
import traceback

import numpy as np
import pytest
from boxes import boxes_in, noise, shapes, tilings, where
from fakes import FakeDeviceArray, put_in_place
from helpers import assert_equal_states, assert_on_all_ranks, small_blocks
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from on_device import trust_mpi
from ranks import assert_stock, first_ranks

import mpisave
from mpisave import PerRank, Shard, Shards

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.filterwarnings("ignore:.* in the file, but in no rank's like"),
]

DTYPES = ["?", "u1", "<i8", ">i4", "<f2", "<f4", ">f8", "<c8", "<c16"]
ORDERS = ["c", "fortran", "strided", "reversed", "device"]
KINDS = ["tiled", "whole", "tiled", "tiled", "object", "per_rank"]
OBJECTS = [True, 3, -1.5, "text", ""]


def in_memory(array, order):
    """Return equal elements in memory of their own."""
    if order == "fortran":
        return array.copy(order="F")
    if order == "strided":
        return np.repeat(array[..., None], 2, axis=-1)[..., 0]
    if order == "reversed":
        back = (..., *(slice(None, None, -1) for _ in array.shape))
        return array[back].copy()[back]
    return FakeDeviceArray(array.copy()) if order == "device" else array.copy()


@st.composite
def leaves(draw, writers):
    """Draw what stands at one key: what it is, and who holds which part of it.

    Boxes are listed with their holders, each with a seed for its bytes: only where
    seeds differ do replicas. Whatever is held whole is one box.
    """
    kind = draw(st.sampled_from(KINDS))
    holders = st.lists(
        st.integers(0, writers - 1), min_size=1, max_size=writers, unique=True
    ).map(sorted)
    if kind == "object":
        return {
            "kind": kind,
            "value": draw(st.sampled_from(OBJECTS)),
            "by": draw(holders),
        }
    if kind == "per_rank":
        return {"kind": kind, "by": draw(holders)}
    if kind == "tiled":
        shape, boxes = draw(tilings(1, 3, 12, 10))
    else:
        shape = draw(shapes(0, 3, 12, shortest=0))
        boxes = [((0,) * len(shape), shape)]
    return {
        "kind": kind,
        "dtype": draw(st.sampled_from(DTYPES)),
        "shape": shape,
        "seed": draw(st.integers(0, 9)),
        "boxes": [(box, draw(holders)) for box in boxes],
        "orders": draw(st.lists(st.sampled_from(ORDERS), min_size=1, max_size=3)),
    }


@st.composite
def wanted(draw, leaf):
    """Draw what one rank wants of an array: nothing, all of it, or some boxes."""
    what = draw(st.sampled_from(["all", "boxes", "boxes", "nothing"]))
    if what == "boxes":
        nothing = tuple((0,) * len(leaf["shape"]) for _ in range(2))
        boxes = st.just(nothing)
        if all(leaf["shape"]):
            boxes = st.one_of(boxes_in(leaf["shape"]), boxes_in(leaf["shape"]), boxes)
        return draw(st.lists(boxes, min_size=1, max_size=3))
    return what


@st.composite
def examples(draw, size):
    """Draw an example, as plain data that travels."""
    writers, readers = (draw(st.sampled_from(range(1, size + 1))) for _ in range(2))
    roots = st.lists(st.integers(0, writers - 1), min_size=1, unique=True)
    gather_to = draw(st.none() | roots)
    found = draw(st.lists(leaves(writers), min_size=2, max_size=6))
    return {
        "writers": writers,
        "readers": readers,
        "leaves": found,
        "nested": draw(st.lists(st.booleans(), min_size=6, max_size=6)),
        "how": {
            "use_binary_format": draw(st.booleans()),
            "protocol": draw(st.sampled_from([2, 3, 4, 5])),
            "gather_to": gather_to,
            "replicas": draw(st.sampled_from(["first", "share", "check"])),
            "max_grouped_size": draw(st.sampled_from(["3G", "10K", 500, 33, 1])),
            "transport": draw(st.sampled_from(["host", *["device"] * bool(gather_to)])),
        },
        "block_nbytes": draw(st.sampled_from([2**20, 64])),
        "shortest_run_nbytes": draw(st.sampled_from([2**18, 16])),
        "threads": draw(st.sampled_from([1, 3])),
        "differ": draw(st.booleans()),  # replicas, where the first is saved
        "wants": [
            [draw(wanted(leaf)) if "shape" in leaf else "all" for leaf in found]
            for _ in range(readers)
        ],
        "into": draw(st.sampled_from(["new", "inplace"])),
        "verify": draw(st.booleans()),
    }


class Example:
    """What an example says each rank holds and wants, and what is in the file."""

    def __init__(self, drawn):
        self.drawn = drawn
        how = drawn["how"]
        self.differ = drawn["differ"] and how["replicas"] == "first"
        # Of several roots that see one file, the lowest writes it.
        self.root = min(how["gather_to"]) if how["gather_to"] else None

    def _bytes(self, leaf, rank):
        """Return an array as one holder has it."""
        seed = leaf["seed"] + (100 * rank if self.differ else 0)
        if leaf["dtype"] == "?":
            return noise(leaf["shape"], "u1", seed) % 2 == 0
        return noise(leaf["shape"], leaf["dtype"], seed)

    def _put(self, state, number, value):
        """Put a leaf where it belongs: at the top, or in a dict."""
        if self.drawn["nested"][number]:
            state.setdefault("deep", {}).setdefault(number, value)
        else:
            state.setdefault(f"x{number}", value)

    def held(self, rank):
        """Return the state of a rank that writes."""
        state = {}
        for number, leaf in enumerate(self.drawn["leaves"]):
            if leaf["kind"] in ("object", "per_rank"):
                if rank in leaf["by"]:
                    own = {"rank": rank, "words": np.full(rank, rank)}
                    is_object = leaf["kind"] == "object"
                    value = leaf["value"] if is_object else PerRank(own)
                    self._put(state, number, value)
                continue
            array, shards = self._bytes(leaf, rank), []
            for box, holders in leaf["boxes"]:
                if rank in holders:
                    order = leaf["orders"][(rank + len(shards)) % len(leaf["orders"])]
                    part = in_memory(array[where(*box)], order)
                    shards.append(Shard(part, array.shape, box[0]))
            if leaf["kind"] == "whole" and shards:
                # A holder of all of it may say so in either way.
                is_plain = (leaf["seed"] + rank) % 3
                self._put(state, number, shards[0].array if is_plain else shards[0])
            elif shards:
                self._put(
                    state, number, shards[0] if shards[1:] == [] else Shards(*shards)
                )
        return state

    def whole(self):
        """Return what is in the file: keys as the lowest rank has them."""
        state = {}
        for rank in range(self.drawn["writers"]):
            for number, leaf in enumerate(self.drawn["leaves"]):
                if leaf["kind"] in ("object", "per_rank"):
                    is_held = rank in leaf["by"]
                else:
                    is_held = any(rank in holders for _, holders in leaf["boxes"])
                if is_held:
                    self._put(state, number, self._assembled(leaf))
        return state

    def _assembled(self, leaf):
        if leaf["kind"] == "object":
            return leaf["value"]
        if leaf["kind"] == "per_rank":
            return {r: {"rank": r, "words": np.full(r, r)} for r in leaf["by"]}
        array = np.zeros(leaf["shape"], leaf["dtype"])
        for box, holders in leaf["boxes"]:
            first = self.root if self.root in holders else holders[0]
            array[where(*box)] = self._bytes(leaf, first)[where(*box)]
        return array

    def like(self, rank):
        """Return what a rank that reads wants, and what it is to get."""
        like, expected = {}, {}
        for number, leaf in enumerate(self.drawn["leaves"]):
            wants = self.drawn["wants"][rank][number]
            if wants == "nothing":
                continue
            if leaf["kind"] == "object":
                self._put(like, number, "anything")
                self._put(expected, number, leaf["value"])
            elif leaf["kind"] == "per_rank":
                taken = self.taken(rank, self.drawn["writers"])
                if taken in leaf["by"]:
                    self._put(like, number, PerRank(None))
                    value = {"rank": taken, "words": np.full(taken, taken)}
                    self._put(expected, number, value)
            else:
                array = self._assembled(leaf)
                # Devices have no swapped byte order.
                orders = ORDERS if array.dtype.isnative else ORDERS[:-1]
                empty = np.zeros_like(array)
                order = orders[(rank + number) % len(orders)]
                if wants == "all":
                    self._put(like, number, in_memory(empty, order))
                    self._put(expected, number, array)
                    continue
                shards = [
                    Shard(in_memory(empty[where(*box)], order), array.shape, box[0])
                    for box in wants
                ]
                parts = [array[where(*box)].copy() for box in wants]
                self._put(like, number, Shards(*shards))
                self._put(expected, number, parts)
        return like, expected

    @staticmethod
    def taken(rank, saved):
        """Return whose values a rank takes."""
        return (rank + 1) % saved


def plain(value):
    """Return what was loaded without the classes of mpisave."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Shards):
        return [plain(box.array) for box in value.boxes]
    if isinstance(value, FakeDeviceArray):
        return value._host
    return plain(value.value) if isinstance(value, PerRank) else value


@contextlib.contextmanager
def settled(drawn):
    """Have the library cut and pack as the example says."""
    with pytest.MonkeyPatch.context() as patch, small_blocks(drawn["block_nbytes"]):
        patch.setattr("mpisave.regrouping.BLOCK_NBYTES", drawn["block_nbytes"])
        for module in ("plan", "regrouping"):
            name = f"mpisave.{module}.SHORTEST_RUN_NBYTES"
            patch.setattr(name, drawn["shortest_run_nbytes"])
        if drawn["block_nbytes"] < 1000:
            patch.setattr("mpisave.regrouping.CHUNK_NBYTES", 100)
            patch.setattr("mpisave.reading._SHORTEST_RUN_NBYTES", 32)
        for module in ("saving", "loading"):
            patch.setattr(f"mpisave.{module}.threads_of", lambda *_: drawn["threads"])
        put_in_place(patch)
        trust_mpi(patch)
        yield


class Run:
    """An example on one rank, step by step: all ranks agree after each."""

    def __init__(self, comm, path, drawn):
        self.comm, self.path, self.drawn = comm, path, drawn
        self.example = Example(drawn)

    def save(self):
        with settled(self.drawn), first_ranks(self.comm, self.drawn["writers"]) as part:
            if part is not None:
                mpisave.save(
                    self.example.held(part.rank),
                    self.path,
                    comm=part,
                    state_type="opt",
                    durable=False,
                    **self.drawn["how"],
                )

    def load(self):
        drawn = self.drawn
        self.like, self.expected, self.found = {}, {}, {}
        with settled(drawn), first_ranks(self.comm, drawn["readers"]) as part:
            if part is not None:
                self.like, self.expected = self.example.like(part.rank)
                self.found = mpisave.load(
                    self.path,
                    comm=part,
                    like=self.like,
                    into=drawn["into"],
                    verify=drawn["verify"],
                    unexpected="skip",
                    per_rank=self.example.taken,
                )

    def check(self):
        whole = self.example.whole()
        with settled(self.drawn):
            assert_equal_states(mpisave.load(self.path), whole)
        if self.comm.rank == 0:
            binary = self.drawn["how"]["use_binary_format"]
            assert_stock(self.path, whole, use_binary_format=binary)
        assert_equal_states(plain(self.found), self.expected)
        if self.drawn["into"] == "inplace":
            for key, value in self.like.items():
                if isinstance(value, (np.ndarray, FakeDeviceArray)):
                    assert self.found[key] is value, key


def outcome_of(comm, path, drawn):
    """Run an example on every rank; return what failed, the same on all."""
    run = Run(comm, path, drawn)
    for step in (run.save, run.load, run.check):
        error = None
        try:
            step()
        except Exception:
            error = f"[rank {comm.rank}]\n{traceback.format_exc()}"
        errors = [text for text in comm.allgather(error) if text]
        if errors:
            return errors
    return []


def run_together(comm, folder, many):
    """Run drawn examples on all ranks, until one fails; shrink it, and say which."""
    path, error = folder / "x.opt", None
    if comm.rank == 0:

        @settings(
            max_examples=many,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(examples(comm.size))
        def check(drawn):
            comm.bcast(drawn)
            errors = outcome_of(comm, path, drawn)
            if errors:
                raise AssertionError("\n".join(errors))

        try:
            check()
        except BaseException:
            error = traceback.format_exc()
        comm.bcast(None)
    else:
        while (drawn := comm.bcast(None)) is not None:
            outcome_of(comm, path, drawn)
    error = comm.bcast(error)
    assert error is None, error


def test_drawn_states_come_back_bit_for_bit(comm, shared_dir):
    run_together(comm, shared_dir, 50)


@pytest.mark.slow
def test_many_drawn_states_come_back_bit_for_bit(comm, shared_dir):
    run_together(comm, shared_dir, 1000)


def test_example_that_fails_on_one_rank_fails_on_all(comm, shared_dir, monkeypatch):
    load = mpisave.load

    def wrong(*args, **how):
        found = load(*args, **how)
        if comm.rank == comm.size - 1 and "x0" in found:
            raise RuntimeError("as this test has it")
        return found

    monkeypatch.setattr(mpisave, "load", wrong)

    with pytest.raises(AssertionError, match="as this test has it"):
        run_together(comm, shared_dir, 30)

    assert_on_all_ranks(comm, comm.allgather(1) == [1] * comm.size, "in step")
