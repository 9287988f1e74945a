"""What the kernel computes, step by step in NumPy, with its tables: CRC-32C."""

import numpy as np
import pytest
from crc32c import crc32c

from mpisave.device_checksum import tables

ALL = 0xFFFFFFFF
GENERATOR = 0x82F63B78


def times_x(value):
    return value >> 1 ^ (GENERATOR * (value & 1))


def product(factor, value):
    """Return a product as the kernel computes it, of arrays."""
    total = np.zeros_like(value)
    for bit in range(31, -1, -1):
        total ^= value * (factor >> np.uint32(bit) & 1)
        value = times_x(value)
    return total


def as_kernel(data, threads):
    """Return what the kernel gives for a block."""
    shifts, lasts = tables(threads)
    words = np.frombuffer(data, "<u4", len(data) // 4).copy()
    words[:1] = ~words[:1]
    # A row is a turn of all threads. The last word is the last thread's.
    rows = np.concatenate([np.zeros(-len(words) % threads, np.uint32), words])
    sums = np.zeros(threads, np.uint32)
    for row in rows.reshape(-1, threads):
        parts = [shifts[n, sums >> np.uint32(8 * n) & 0xFF] for n in range(4)]
        sums = np.bitwise_xor.reduce(parts) ^ row
    value = int(np.bitwise_xor.reduce(product(lasts, sums)))
    value ^= 0 if len(words) else ALL
    for byte in data[4 * len(words) :]:
        value ^= byte
        for _ in range(8):
            value = times_x(value)
    return value ^ ALL


@pytest.mark.parametrize("threads", [4, 32, 1024])
@pytest.mark.parametrize(
    "nbytes", [0, 1, 3, 4, 5, 127, 128, 129, 4095, 4096, 4099, 50_000]
)
def test_sum_is_that_of_the_library(threads, nbytes):
    data = np.random.default_rng(nbytes).bytes(nbytes)

    assert as_kernel(data, threads) == crc32c(data)


def test_sum_is_that_of_the_standard():
    assert as_kernel(b"123456789", 1024) == 0xE3069283
