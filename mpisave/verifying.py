"""The steps of verify: every byte of a file against the checksums in its index."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import queue
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mpisave.arguments import check_same, deadline, parse_timeout
from mpisave.checksum import BLOCK_NBYTES, crc32c
from mpisave.collective import Steps
from mpisave.comms import SoloComm, private_comm
from mpisave.errors import FileFormatError, show_key
from mpisave.finding import find_index
from mpisave.formats import index
from mpisave.formats.digest import array_crc32c, state_digest
from mpisave.opening import open_same
from mpisave.placement import MOST_READERS, communicator, threads_of, where_this_runs
from mpisave.reading import naming_file
from mpisave.skeleton import is_altered, read_part
from mpisave.threads import in_threads

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import BinaryIO

    from mpi4py import MPI

    from mpisave.comms import Comm
    from mpisave.errors import Key
    from mpisave.source import Source

T = TypeVar("T")

# Blocks that are closer together than this are read in one.
_GAP_NBYTES = 4096

# What a block costs beside its bytes, when the work is split: the time of so many.
_BLOCK_COSTS_NBYTES = 16 * 2**10

# Damages that an error names; of the others it says how many.
_NAMED = 20


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a file holds, every byte of which is as it was saved. Alike on every rank.

    Attributes
    ----------
    path : str
        The file.
    container : str
        ``"pickle"`` or ``"hdf5"``.
    nbytes : int
        Bytes of the file: all were checked.
    payload_nbytes : int
        Bytes of the arrays in it.
    arrays : int
        How many arrays there are.
    digest : str
        Of the whole state, 64 hexadecimal digits. Files with equal states have equal
        digests, whatever wrote them: pickle or HDF5, any protocol, number of ranks or
        version. Equal are keys, in any order of a dict; types, dtypes with their byte
        order, and shapes; every bit of arrays and small objects. Of an object that only
        a pickle can hold, its type's name alone counts.
    digests : dict of tuple to int
        By key, the CRC-32C of all bytes of each array, in C order.
    """

    path: str
    container: str
    nbytes: int
    payload_nbytes: int
    arrays: int
    digest: str
    digests: dict[Key, int]


def verify(
    path: str | os.PathLike[str] | BinaryIO,
    *,
    comm: MPI.Intracomm | None = None,
    timeout: float | None = 600.0,
) -> VerifyReport:
    """Check every byte of a file. Collective over `comm`.

    The index is checked by its own CRC-32C, each block of each array by its own, and
    all that lies around the arrays by that of the skeleton. Nothing is loaded: each
    rank takes a few MiB of memory, however large the file.

    Parameters
    ----------
    path : str, os.PathLike or seekable binary file object
        A file that mpisave saved. An object is read from its start.
    comm : mpi4py.MPI.Intracomm, optional
        The ranks that share the work. The default is this process alone.
    timeout : float or None
        How many seconds a rank waits for the others in one step. None: for ever.

    Returns
    -------
    VerifyReport
        What the file holds, and digests of it.

    Raises
    ------
    FileFormatError
        If the file is torn or altered. All damage is found: the message has a line for
        each damaged block, up to 20, with its key and offset, and says how many more
        there are. Also if the file is not of mpisave: there is nothing to check
        against.
    ArgumentError
        If ranks disagree on the path, or `timeout` is no number of seconds.
    ImportError
        If the file holds arrays of ml_dtypes, and that is not installed. On several
        ranks, a CollectiveError.
    OSError
        If the file system refuses.
    """
    meant = SoloComm() if comm is None else communicator(comm)
    with private_comm(meant, "verify", deadline(timeout)) as own:
        call = Steps(own)
        every = call.exchange("check arguments", lambda: _parse(path, timeout))
        call.alike("check arguments", lambda: check_same([given for given, _ in every]))
        threads = threads_of([where for _, where in every], own.rank, MOST_READERS)
        with contextlib.ExitStack() as opened:
            source, head = open_same(call, own, path, opened, _index_of_ours)
            found = call.exchange("verify", lambda: _check(own, source, head, threads))
        return call.alike("verify", lambda: _report(head, found))


def _parse(path: Any, timeout: Any) -> tuple[tuple[tuple[str, str | None]], Any]:
    parse_timeout(timeout)
    is_name = isinstance(path, (str, os.PathLike))
    name = os.fsdecode(os.fspath(path)) if is_name else None
    return (("path", name),), where_this_runs()


def _index_of_ours(source: Source) -> tuple[bytes, str]:
    """Return the index of a file, and its kind."""
    head = find_index(source)
    if head is None or head[1] == index.FOREIGN:
        raise FileFormatError(
            "it is not of mpisave: it has no index, so there is nothing to verify "
            "against"
        )
    return head


@dataclass(frozen=True, slots=True)
class _Found:
    """What one rank found in its part of a file."""

    name: str
    nbytes: int
    damages: list[str]  # the first ones, in the order of offsets
    more: int
    skeleton: tuple[int, int] | None  # see skeleton.read_part; None: torn


def _check(
    own: Comm, source: Source, head: tuple[bytes, str] | None, threads: int
) -> _Found:
    with naming_file(source.name):
        content = _decode(head)
        blocks = _Blocks(content, own.rank, own.size)
        damages = sorted(blocks.check(source, threads))
        skeleton = None
        try:
            skeleton = read_part(source, content, own.rank, own.size)
        except FileFormatError as exc:  # not the only damage, maybe
            damages.append((content.nbytes, f"the skeleton: {exc}"))
        lines = [text for _, text in damages[:_NAMED]]
        more = len(damages) - len(lines)
        return _Found(source.name, source.nbytes, lines, more, skeleton)


def _decode(head: tuple[bytes, str] | None) -> index.Index:
    if head is None:  # rank 0 raised then, and so did all
        raise FileFormatError("there is no index")
    return index.decode(*head)


class _Blocks:
    """A rank's part of the blocks of all arrays."""

    def __init__(self, content: index.Index, rank: int, size: int) -> None:
        self._arrays = sorted(
            (array for array in content.arrays().values() if array.extent.nbytes),
            key=lambda array: array.extent.offset,
        )
        offsets = np.array([a.extent.offset for a in self._arrays], np.int64)
        nbytes = np.array([a.extent.nbytes for a in self._arrays], np.int64)
        many = -(-nbytes // BLOCK_NBYTES)
        array = np.repeat(np.arange(len(many)), many)
        number = np.arange(len(array)) - np.repeat(np.cumsum(many) - many, many)
        first = offsets[array] + number * BLOCK_NBYTES
        stop = np.minimum(first + BLOCK_NBYTES, (offsets + nbytes)[array])
        costs = np.cumsum(stop - first + _BLOCK_COSTS_NBYTES)
        total = int(costs[-1]) if len(costs) else 0
        shares = [total * edge // size for edge in (rank, rank + 1)]
        mine = slice(*np.searchsorted(costs, shares, side="right").tolist())
        columns = (array[mine], number[mine], first[mine], stop[mine])
        self._blocks = list(zip(*(c.tolist() for c in columns), strict=True))

    def check(self, source: Source, threads: int) -> list[tuple[int, str]]:
        """Return offset and text of each damage, in no order."""
        buffers: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        for _ in range(threads):
            buffers.put(np.empty(BLOCK_NBYTES, np.uint8).data)

        def check(run: Sequence[tuple[int, int, int, int]]) -> list[tuple[int, str]]:
            buffer = buffers.get()
            try:
                return self._check_run(source, run, buffer)
            finally:
                buffers.put(buffer)

        runs = _runs(self._blocks)
        jobs = (functools.partial(check, run) for run in runs)
        return [*itertools.chain.from_iterable(in_threads(jobs, threads))]

    def _check_run(
        self,
        source: Source,
        run: Sequence[tuple[int, int, int, int]],
        buffer: memoryview,
    ) -> list[tuple[int, str]]:
        begin = run[0][2]
        done = source.read_into(begin, buffer[: run[-1][3] - begin])
        damages = []
        for array, number, first, stop in run:
            stored = self._arrays[array]
            there = min(max(0, begin + done - first), stop - first)
            if there < stop - first:
                wrong = f"only {there} of its {stop - first} bytes are there"
            else:
                found = crc32c(buffer[first - begin : stop - begin])
                if found == stored.sums[number]:
                    continue
                wrong = f"its CRC-32C is {found:#010x}, not {stored.sums[number]:#010x}"
            name = f"{show_key(stored.key)}, block {number} at offset {first}"
            damages.append((first, f"{name}: {wrong}"))
        return damages


def _runs(
    blocks: Sequence[tuple[int, int, int, int]],
) -> Iterator[list[tuple[int, int, int, int]]]:
    """Yield blocks that are read in one call."""
    run: list[tuple[int, int, int, int]] = []
    for block in blocks:
        first, stop = block[2:]
        if run and (
            first - run[-1][3] > _GAP_NBYTES or stop - run[0][2] > BLOCK_NBYTES
        ):
            yield run
            run = []
        run.append(block)
    if run:
        yield run


def _report(head: tuple[bytes, str] | None, every: Sequence[_Found]) -> VerifyReport:
    """Return what the file holds, or refuse it with all that is wrong."""
    content = _decode(head)
    name = every[0].name
    lines = [line for found in every for line in found.damages]
    more = sum(found.more for found in every)
    parts = [found.skeleton for found in every if found.skeleton is not None]
    if len(parts) == len(every) and (wrong := is_altered(content, parts)):
        lines.insert(0, wrong)
    if lines:
        count = len(lines) + more
        named = "".join(f"\n  {line}" for line in lines[:_NAMED])
        rest = f"\n  and {count - _NAMED} more" if count > _NAMED else ""
        raise FileFormatError(f"{name}: {count} part(s) are damaged:{named}{rest}")
    arrays = content.arrays()
    digests = {key: array_crc32c(stored) for key, stored in arrays.items()}
    return VerifyReport(
        name,
        content.container,
        every[0].nbytes,
        sum(stored.extent.nbytes for stored in arrays.values()),
        len(arrays),
        state_digest(content.nodes, digests),
        digests,
    )
