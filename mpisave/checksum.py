"""Bytes to CRC-32C (Castagnoli; RFC 3720, appendix B.4)."""

from __future__ import annotations

import array
import functools
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]
Sums = npt.NDArray[np.uint32]

if TYPE_CHECKING:
    from collections.abc import Buffer, Callable  # type: ignore[attr-defined,unused-ignore]

# A slice of an array is checked by the blocks that it touches.
BLOCK_NBYTES = 2**20


def crc32c(data: Buffer, value: int = 0) -> int:
    """Return the CRC-32C of the bytes behind `value` with `data` appended.

    The GIL is released on buffers of 32 KiB and more.
    """
    return _library()(data, value)


@functools.cache
def _library() -> Callable[[Buffer, int], int]:
    # Here, since importing it takes a sixth of the time of importing mpisave.
    from crc32c import crc32c as extend

    return extend  # type: ignore[no-any-return,unused-ignore]


class BlockSums:
    """Checksums of the blocks of arrays, whose bytes come in order.

    A block begins on a multiple of `BLOCK_NBYTES` from the start of its array. A piece
    that does not begin or end on one has a part of a block there.
    """

    def __init__(self) -> None:
        self.values = array.array("I")
        self._value = 0
        self._next: tuple[object, int] = (None, 0)

    def add(self, item: object, within: int, data: memoryview) -> None:
        """Add the bytes of `item` from byte `within` of its array on."""
        crc = _library()
        nbytes = data.nbytes
        goes_on = self._next == (item, within) and within % BLOCK_NBYTES != 0
        self._next = (item, within + nbytes)
        done = 0
        while done < nbytes:
            stop = min(nbytes, done + BLOCK_NBYTES - (within + done) % BLOCK_NBYTES)
            if goes_on:
                self.values[-1] = crc(data[done:stop], self.values[-1])
            else:
                self.values.append(crc(data[done:stop], 0))
            goes_on = False
            done = stop


def block_count(nbytes: int) -> int:
    """Return how many blocks an array of `nbytes` has."""
    return -(-nbytes // BLOCK_NBYTES)


def combine(first: int, second: int, second_nbytes: int) -> int:
    """Return the CRC-32C of two runs of bytes, one after the other, from that of each.

    The CRC of the first is multiplied by x to the power of the second's bits, modulo
    the generator, over GF(2) (M. Adler, zlib, crc32_combine).
    """
    return _times(_power(second_nbytes), first) ^ second


# The generator, and bits in general, with the power 0 in the highest bit.
_GENERATOR = 0x82F63B78


def _times(a: int, b: int) -> int:
    """Return the product of two polynomials modulo the generator."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_GENERATOR if b & 1 else 0)
    return product


@functools.lru_cache(maxsize=4096)
def _power(nbytes: int) -> int:
    """Return x to the power of 8 * `nbytes`, modulo the generator."""
    result, square, left = 1 << 31, 1 << 23, nbytes
    while left:
        if left & 1:
            result = _times(square, result)
        square = _times(square, square)
        left >>= 1
    return result


def _stops_of_blocks(blocks: Numbers, entry_nbytes: Numbers) -> Numbers:
    """Return where each block of each array ends, in bytes from the array's start."""
    entry = np.repeat(np.arange(len(blocks)), blocks)
    number = np.arange(len(entry)) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    return np.minimum((number + 1) * BLOCK_NBYTES, entry_nbytes[entry])


def blocks_of_parts(
    entry: Numbers,
    within: Numbers,
    nbytes: Numbers,
    values: Sums,
    entry_nbytes: Numbers,
) -> list[Sums]:
    """Return the checksums of each array's blocks, from those of its parts.

    Parameters
    ----------
    entry, within, nbytes : ndarray of int64, shape (n,)
        Which array each part belongs to, the byte at which it begins there, its bytes.
    values : ndarray of uint32
        What `BlockSums` gave for these parts, one after another.
    entry_nbytes : ndarray of int64, shape (entries,)
        Bytes of each array.

    Returns
    -------
    list of ndarray of uint32
        The CRC-32C of each block of each array.

    Raises
    ------
    RuntimeError
        If the parts do not make the arrays: bytes were not written, or twice.
    """
    first = within // BLOCK_NBYTES
    many = -(-(within + nbytes) // BLOCK_NBYTES) - first
    part = np.repeat(np.arange(len(entry)), many)
    number = np.arange(len(part)) - np.repeat(np.cumsum(many) - many, many)
    block = first[part] + number
    starts = np.maximum(within[part], block * BLOCK_NBYTES)
    stops = np.minimum((within + nbytes)[part], (block + 1) * BLOCK_NBYTES)
    blocks = -(-entry_nbytes // BLOCK_NBYTES)
    ends = np.cumsum(blocks)
    slot = (ends - blocks)[entry[part]] + block
    total = int(ends[-1]) if len(ends) else 0
    order = np.lexsort((starts, slot))
    slot, starts, stops = slot[order], starts[order], stops[order]
    is_first = np.diff(slot, prepend=-1) > 0
    is_last = np.diff(slot, append=total) > 0
    # The parts of a block follow one another, from its first byte to its last.
    begins = starts // BLOCK_NBYTES * BLOCK_NBYTES
    begins[1:][~is_first[1:]] = stops[:-1][~is_first[1:]]
    if (
        len(values) != len(slot)
        or np.count_nonzero(is_first) != total
        or (begins != starts).any()
        or (stops[is_last] != _stops_of_blocks(blocks, entry_nbytes)).any()
    ):
        raise RuntimeError(
            f"{len(values)} checksums came for {len(slot)} parts of {total} blocks, or "
            f"some bytes were written not once: a defect of mpisave, please report it"
        )
    values, lengths = values[order], stops - starts
    sums = np.zeros(total, np.uint32)
    sums[slot[is_first]] = values[is_first]
    for place in np.flatnonzero(~is_first).tolist():
        at = slot[place]
        sums[at] = combine(int(sums[at]), int(values[place]), int(lengths[place]))
    return np.split(sums, ends[:-1]) if len(ends) else []
