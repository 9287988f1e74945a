"""Blocks of arrays that were read: refused if they are not what was saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpisave.checksum import BLOCK_NBYTES, crc32c
from mpisave.errors import FileFormatError, show_key

if TYPE_CHECKING:
    from mpisave.formats.index import Stored


def check_blocks(stored: Stored, data: memoryview, first: int = 0) -> None:
    """Refuse blocks that are not what was saved.

    Parameters
    ----------
    stored : Stored
        The array.
    data : memoryview
        Its bytes from the start of block `first` on, up to the end of a block.
    first : int
        Which block comes first.

    Raises
    ------
    FileFormatError
        With the key, the block, and both checksums.
    """
    for number, start in enumerate(range(0, data.nbytes, BLOCK_NBYTES), start=first):
        check_sum(stored, number, crc32c(data[start : start + BLOCK_NBYTES]))


def check_sum(stored: Stored, number: int, found: int) -> None:
    """Refuse a block whose checksum is not that of what was saved."""
    if found != stored.sums[number]:
        raise FileFormatError(
            f"{show_key(stored.key)} is altered: the CRC-32C of block {number} at "
            f"offset {stored.extent.offset + number * BLOCK_NBYTES} is "
            f"{found:#010x}, not {stored.sums[number]:#010x}"
        )
