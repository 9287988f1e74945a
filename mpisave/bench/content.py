"""Arrays whose bytes are known wherever they lie: what was saved or loaded is compared.

No array is kept to compare with: the bytes of each are a run of one pattern, which fits
into a cache, from a place that its key gives.
"""

from __future__ import annotations

import functools
import pickle
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mpisave.bench.states import MIB
from mpisave.checksum import crc32c

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from mpisave.bench.states import Shapes

Bytes = npt.NDArray[np.uint8]

# What is copied, written, read or compared at a time.
STEP_NBYTES = 4 * MIB
_PATTERN_NBYTES = 16 * MIB


class Content:
    """The bytes of float32 arrays.

    Parameters
    ----------
    shapes : dict of str to shape
        Of all arrays of all ranks.
    """

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        pattern = np.random.default_rng(1).random(_PATTERN_NBYTES // 4, np.float32)
        # It goes on after its end, so that a step is one run wherever it begins.
        self._pattern: Bytes = np.concatenate(
            [pattern, pattern[: STEP_NBYTES // 4]]
        ).view(np.uint8)

    def nbytes(self, key: str) -> int:
        """Return the bytes of an array."""
        return 4 * int(np.prod(self.shapes[key]))

    def steps(self, key: str) -> Iterator[tuple[int, Bytes]]:
        """Yield from which byte of the array on, and the bytes."""
        first = zlib.crc32(key.encode()) % (_PATTERN_NBYTES // 4) * 4
        nbytes = self.nbytes(key)
        for start in range(0, nbytes, STEP_NBYTES):
            at = (first + start) % _PATTERN_NBYTES
            yield start, self._pattern[at : at + min(STEP_NBYTES, nbytes - start)]

    def array(self, key: str) -> npt.NDArray[np.float32]:
        """Return the array, in new host memory."""
        found = np.empty(self.nbytes(key), np.uint8)
        for start, part in self.steps(key):
            found[start : start + part.size] = part
        return found.view(np.float32).reshape(self.shapes[key])

    def check(self, found: Mapping[str, Any], keys: list[str]) -> None:
        """Refuse host arrays, or what `seen_in_pickle` says, that are not `keys`.

        Raises
        ------
        RuntimeError
            If one lacks, differs, or is one too many.
        """
        if sorted(found) != sorted(keys):
            raise RuntimeError(f"{len(found)} arrays are there, not the {len(keys)}")
        wrong = [key for key in keys if not self._is_equal(key, found[key])]
        if wrong:
            raise RuntimeError(f"{len(wrong)} arrays differ, {wrong[0]!r} first")

    def _is_equal(self, key: str, array: Any) -> bool:
        if array.dtype != np.float32 or array.shape != self.shapes[key]:
            return False
        if isinstance(array, Seen):
            crc = functools.reduce(
                lambda value, step: crc32c(step[1].data, value), self.steps(key), 0
            )
            return array.crc == crc
        data = array.reshape(-1).view(np.uint8)
        return all(
            np.array_equal(data[start : start + part.size], part)
            for start, part in self.steps(key)
        )


class Seen:
    """What a pickle says of an array, whose bytes were let go."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.dtype, _, data = state
        self.crc = crc32c(data)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct":
            return lambda *_: Seen()
        return super().find_class(module, name)


def seen_in_pickle(path: Path) -> dict[str, Seen]:
    """Return what Python finds in a dict of arrays, in the memory of one of them.

    A whole state in fresh memory would take longer than what is measured.
    """
    with path.open("rb") as file:
        found: dict[str, Seen] = _Unpickler(file).load()
    return found
