"""Device memory to CRC-32C (Castagnoli): a kernel of CUDA, and its tables.

A thread takes every n-th word of a block, so that all of them read together. A word
that the sum has passed by is multiplied by x to the power of the bits in n words, for
which there is a table; at the end each thread's sum by what was left of the block.
Multiplication is that of polynomials over GF(2), modulo the generator; see
`checksum.combine`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_THREADS = 1024  # of a block, the most there may be

_GENERATOR = 0x82F63B78  # x to the power 31 is the lowest bit

_NAME = "crc32c_of_blocks"
_SOURCE = r"""
extern "C" __global__ void __launch_bounds__(1024) crc32c_of_blocks(
    const unsigned long long* at,  // address of each block
    const unsigned int* nbytes,    // of each block
    const unsigned int* shifts,    // 4 x 256: a byte of a sum, a turn of all threads on
    const unsigned int* lasts,     // each thread's factor: what follows its last word
    unsigned int* sums)            // of each block
{
    __shared__ unsigned int shift[1024];
    __shared__ unsigned int all;
    const unsigned int thread = threadIdx.x, turn = blockDim.x;
    const unsigned int generator = 0x82F63B78u;
    const unsigned char* bytes = (const unsigned char*)at[blockIdx.x];
    const bool is_aligned = at[blockIdx.x] % 4 == 0;
    const unsigned int rest = nbytes[blockIdx.x] % 4, words = nbytes[blockIdx.x] / 4;

    for (unsigned int i = thread; i < 1024; i += turn) shift[i] = shifts[i];
    // The inversion of a sum's start is that of the first word.
    if (thread == 0) all = words == 0 ? 0xffffffffu : 0;
    __syncthreads();

    // The last word is the last thread's.
    unsigned int first = thread + words % turn, sum = 0;
    first = first >= turn ? first - turn : first;
    #pragma unroll 4
    for (unsigned int i = first; i < words; i += turn) {
        unsigned int word;
        if (is_aligned) {
            word = ((const unsigned int*)bytes)[i];
        } else {
            const unsigned char* four = bytes + 4ull * i;
            word = four[0] | four[1] << 8 | four[2] << 16 | (unsigned int)four[3] << 24;
        }
        if (i == 0) word = ~word;
        sum = shift[sum & 255] ^ shift[256 + (sum >> 8 & 255)]
            ^ shift[512 + (sum >> 16 & 255)] ^ shift[768 + (sum >> 24)] ^ word;
    }

    unsigned int product = 0;
    const unsigned int factor = lasts[thread];
    for (int bit = 31; bit >= 0; bit--) {
        if (factor >> bit & 1) product ^= sum;
        sum = sum >> 1 ^ (sum & 1 ? generator : 0);
    }
    atomicXor(&all, product);
    __syncthreads();

    if (thread == 0) {
        unsigned int value = all;
        for (unsigned int i = 0; i < rest; i++) {
            value ^= bytes[4ull * words + i];
            for (int bit = 0; bit < 8; bit++)
                value = value >> 1 ^ (value & 1 ? generator : 0);
        }
        sums[blockIdx.x] = ~value;
    }
}
"""

Words = npt.NDArray[np.uint32]


class Summing:
    """Computes the CRC-32C of blocks where they lie. All memory is taken before.

    Parameters
    ----------
    cupy : module
        CuPy.
    devices : iterable of int
        Numbers of the devices on which the blocks are.
    count : int
        How many blocks there are at most.

    Raises
    ------
    Exception
        Of CuPy, if a device has no memory, or CUDA's compiler is absent.
    """

    def __init__(self, cupy: Any, devices: Iterable[int], count: int) -> None:
        self._cupy = cupy
        self._kernel = cupy.RawKernel(_SOURCE, _NAME)
        self._memory: dict[int, tuple[Any, ...]] = {}
        for number in devices:
            with cupy.cuda.Device(number):
                self._kernel.compile()  # for this device, if it was not before
                at = cupy.empty(count, np.uint64)
                lengths, sums = (cupy.empty(count, np.uint32) for _ in range(2))
                factors = [cupy.empty(table.shape, np.uint32) for table in tables()]
                # The pool may give memory that work of other streams is not done with.
                cupy.cuda.runtime.deviceSynchronize()
                for factor, table in zip(factors, tables(), strict=True):
                    factor.set(table)
                cupy.cuda.runtime.deviceSynchronize()
            self._memory[number] = at, lengths, *factors, sums

    def __call__(
        self, runs: Sequence[tuple[Any, int, int]], block_nbytes: int
    ) -> list[int]:
        """Return the sum of each block of each run: a contiguous array, start, length.

        What is queued to change them is to be done.
        """
        devices = np.array([array.data.device_id for array, *_ in runs], np.int64)
        starts = np.array(
            [array.data.ptr + start for array, start, _ in runs], np.uint64
        )
        nbytes = np.array([length for *_, length in runs], np.int64)
        counts = -(-nbytes // block_nbytes)
        run = np.repeat(np.arange(len(runs)), counts)
        number = np.arange(len(run)) - np.repeat(np.cumsum(counts) - counts, counts)
        within = number * block_nbytes
        at = starts[run] + within.astype(np.uint64)
        lengths = np.minimum(nbytes[run] - within, block_nbytes).astype(np.uint32)
        found = np.empty(len(run), np.uint32)
        for device in self._memory:
            mine = devices[run] == device
            if mine.any():
                found[mine] = self._sums(device, at[mine], lengths[mine])
        sums: list[int] = found.tolist()
        return sums

    def _sums(self, device: int, at: npt.NDArray[np.uint64], lengths: Words) -> Words:
        n = len(at)
        its_at, its_lengths, shifts, lasts, sums = self._memory[device]
        cuda = self._cupy.cuda
        with cuda.Device(device), cuda.Stream(non_blocking=True) as stream:
            try:
                its_at[:n].set(at)
                its_lengths[:n].set(lengths)
                arguments = its_at, its_lengths, shifts, lasts, sums
                self._kernel((n,), (_THREADS,), arguments)
                on_host: Words = sums[:n].get()
            finally:  # the kernel writes to memory that an interrupt gives back
                stream.synchronize()
        return on_host


@functools.cache
def tables(threads: int = _THREADS) -> tuple[Words, Words]:
    """Return what the kernel multiplies by.

    Parameters
    ----------
    threads : int
        Threads of a block.

    Returns
    -------
    shifts : ndarray of uint32, shape (4, 256)
        Each value of each byte of a sum, times x to the power of 32 `threads`.
    lasts : ndarray of uint32, shape (threads,)
        For each thread, x to the power of 32 times the words from its last to the end.
    """
    # One bit, times x to the power 0, 1, 2 and so on.
    powers = np.empty(32 * threads + 32, np.uint32)
    value = 1 << 31
    for n in range(len(powers)):
        powers[n] = value
        value = value >> 1 ^ (_GENERATOR if value & 1 else 0)
    # Of the bits of a sum, the lowest first; the products of several are added.
    of_bits = powers[32 * threads :][::-1].reshape(4, 1, 8)
    has_bit = np.arange(256)[:, np.newaxis] >> np.arange(8) & 1
    shifts = np.bitwise_xor.reduce(np.where(has_bit, of_bits, 0), axis=-1)
    lasts = powers[32 * np.arange(threads, 0, -1)]
    return shifts.astype(np.uint32), lasts
