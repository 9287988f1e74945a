"""The skeleton of a file against its checksum: read in few calls, by all ranks.

Nothing that a load returns comes from there, but other readers go by it: what they see
and what the index says is only the same as long as neither was changed.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mpisave.checksum import combine, crc32c
from mpisave.errors import FileFormatError
from mpisave.formats.base import gaps
from mpisave.formats.index import Stored

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mpisave.formats.index import Index
    from mpisave.source import Source

# Bytes that are read at a time.
_WINDOW_NBYTES = 2**20

# Gaps are read together over payload of up to so many bytes: a call of pread takes the
# time of copying 8 KiB or so.
_JOIN_NBYTES = 8192

# A rank takes at least so many bytes: a hundred calls, which is less than 0.2 ms.
_LEAST_NBYTES = 16 * 2**10


def read_part(source: Source, index: Index, rank: int, size: int) -> tuple[int, int]:
    """Return the CRC-32C of a rank's part of the skeleton, and how many bytes it has.

    Parameters
    ----------
    source : Source
        The file.
    index : Index
        What it holds: the skeleton is what lies around the arrays.
    rank, size : int
        Which part, of how many. The parts follow one another.

    Raises
    ------
    FileFormatError
        If bytes are missing.
    """
    extents = [node.value.extent for node in index.nodes if type(node.value) is Stored]
    starts, stops = _part(*gaps(extents, index.nbytes), rank, size)
    memory = np.empty(_WINDOW_NBYTES, np.uint8).data
    value, held = 0, 0
    for run in _runs(starts, stops):
        first, stop = run[0][0], run[-1][1]
        if held + stop - first > _WINDOW_NBYTES or len(run) > 1:
            value, held = crc32c(memory[:held], value), 0
        done = source.read_into(first, memory[held : held + stop - first])
        if done < stop - first:
            raise FileFormatError(f"it is torn: it ends at byte {first + done}")
        if len(run) == 1:  # kept, so that many gaps are summed in one call
            held += done
            continue
        for begin, end in run:
            value = crc32c(memory[begin - first : end - first], value)
    return crc32c(memory[:held], value), int((stops - starts).sum())


def is_altered(index: Index, parts: Sequence[tuple[int, int]]) -> str:
    """Return what is wrong with a skeleton, or nothing.

    Parameters
    ----------
    index : Index
        With the checksum that is expected.
    parts : sequence of (int, int)
        What `read_part` returned on each rank.
    """
    found = 0
    for value, nbytes in parts:
        found = combine(found, value, nbytes) if nbytes else found
    if found == index.skeleton_crc32c:
        return ""
    return (
        f"the skeleton (all that lies around the arrays: names, dtypes, shapes, small "
        f"objects) is altered: its CRC-32C is {found:#010x}, not "
        f"{index.skeleton_crc32c:#010x}"
    )


def _part(
    starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64], rank: int, size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return an even part of gaps, in bytes: that of one rank."""
    ends = np.cumsum(stops - starts)
    total = int(ends[-1]) if len(ends) else 0
    # Parts of the same length: combining their checksums is then one product each.
    share = max(_LEAST_NBYTES, -(-total // size))
    low, high = (min(total, number * share) for number in (rank, rank + 1))
    if low == high:
        return starts[:0], stops[:0]
    first = int(np.searchsorted(ends, low, side="right"))
    last = int(np.searchsorted(ends, high, side="left"))
    before = int(ends[first] - (stops[first] - starts[first]))
    starts, stops = starts[first : last + 1].copy(), stops[first : last + 1].copy()
    starts[0] += low - before
    stops[-1] -= ends[last] - high
    return starts, stops


def _runs(
    starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]
) -> Iterator[list[tuple[int, int]]]:
    """Yield gaps that are read in one call; a long one comes in parts."""
    edges = np.flatnonzero(starts[1:] - stops[:-1] > _JOIN_NBYTES) + 1
    gaps = list(zip(starts.tolist(), stops.tolist(), strict=True))
    for low, high in itertools.pairwise([0, *edges.tolist(), len(gaps)]):
        close = gaps[low:high]
        if close and close[-1][1] - close[0][0] <= _WINDOW_NBYTES:
            yield close
        else:
            yield from _windows(close)


def _windows(gaps: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    run: list[tuple[int, int]] = []
    for start, stop in gaps:
        for begin in range(start, stop, _WINDOW_NBYTES):
            end = min(stop, begin + _WINDOW_NBYTES)
            if run and end - run[0][0] > _WINDOW_NBYTES:
                yield run
                run = []
            run.append((begin, end))
    if run:
        yield run
