"""A whole file to every rank: read once, and passed on by MPI.

The payload is read in windows. Of each window every rank reads an even part, and gets
the others' parts by Allgatherv.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING, Any

import numpy as np

from mpisave.blocks import check_blocks
from mpisave.collective import on_all_ranks, together
from mpisave.errors import FileFormatError
from mpisave.reading import naming_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mpisave.source import Source
    from mpisave.wanted import Want

# Bytes that are in memory beside the arrays.
WINDOW_NBYTES = 16 * 2**20

# Arrays that are further apart than this are not read in one.
_GAP_NBYTES = 64 * 2**10


def read_shared(
    comm: Any, source: Source, wants: Sequence[Want], *, verify: bool
) -> None:
    """Read whole arrays, the same on all ranks, each byte once. Collective.

    Parameters
    ----------
    comm : Comm
        The ranks that share the reading.
    source : Source
        The file, as each rank has it open.
    wants : sequence of Want
        Whole contiguous arrays of the host, the same on every rank.
    verify : bool
        Whether to check the CRC-32C of every block, on every rank.

    Raises
    ------
    FileFormatError, StorageError
        On every rank, if bytes are missing or altered, or cannot be read.
    """
    ordered = sorted(
        (want for want in wants if want.held.nbytes),
        key=lambda want: want.stored.extent.offset,
    )
    window = on_all_ranks(
        comm, "allocate buffers", lambda: np.empty(WINDOW_NBYTES, np.uint8)
    )

    def move() -> BaseException | None:
        failed: BaseException | None = None
        for first, stop in _windows(ordered):
            edges = first + (stop - first) * np.arange(comm.size + 1) // comm.size
            mine, end = edges[comm.rank] - first, edges[comm.rank + 1] - first
            try:
                if failed is None:
                    with naming_file(source.name):
                        _fill(source, int(edges[comm.rank]), window[mine:end])
            except BaseException as exc:  # noqa: BLE001 - told once all have caught up
                failed = exc
            _pass_on(comm, window, edges - first)
            _copy(ordered, first, window[: stop - first])
        return failed

    def check() -> None:
        with naming_file(source.name):
            for want in ordered:
                check_blocks(want.stored, _bytes_of(want).data)

    # First who could not read: what came instead is altered for all.
    together(comm, "read", move)
    if verify:
        on_all_ranks(comm, "read", check)


def _windows(ordered: Sequence[Want]) -> Iterator[tuple[int, int]]:
    """Yield the file bytes of each window: first and stop."""
    runs: list[list[int]] = []
    for want in ordered:
        extent = want.stored.extent
        if runs and extent.offset - runs[-1][1] <= _GAP_NBYTES:
            runs[-1][1] = extent.stop
        else:
            runs.append([extent.offset, extent.stop])
    for first, stop in runs:
        for start in range(first, stop, WINDOW_NBYTES):
            yield start, min(start + WINDOW_NBYTES, stop)


def _fill(source: Source, offset: int, out: Any) -> None:
    done = source.read_into(offset, out.data)
    if done < out.size:
        raise FileFormatError(
            f"it is torn: it ends at byte {offset + done}, in the arrays"
        )


def _pass_on(comm: Any, window: Any, edges: Any) -> None:
    if comm.size == 1:
        return
    from mpi4py import MPI

    counts, displs = np.diff(edges).tolist(), edges[:-1].tolist()
    received = [window, counts, displs, MPI.BYTE]
    comm.wait(comm.raw.Iallgatherv(MPI.IN_PLACE, received))


def _copy(ordered: Sequence[Want], first: int, data: Any) -> None:
    """Copy what of the arrays is in a window to its place."""
    stop = first + data.size
    # The first array that ends behind the window's begin.
    low = bisect.bisect_right(ordered, first, key=lambda want: want.stored.extent.stop)
    for want in ordered[low:]:
        extent = want.stored.extent
        if extent.offset >= stop:
            return
        begin, end = max(first, extent.offset), min(stop, extent.stop)
        flat = _bytes_of(want)
        flat[begin - extent.offset : end - extent.offset] = data[
            begin - first : end - first
        ]


def _bytes_of(want: Want) -> Any:
    return want.held.source.reshape(-1).view(np.uint8)
