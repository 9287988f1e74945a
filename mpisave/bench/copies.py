"""Bare copies between a device and pinned memory, and bare jobs of several threads."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from mpisave.bench.content import STEP_NBYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from mpisave.bench.content import Content

_IN_FLIGHT = 2


class Copies:
    """Copies through pinned memory that is there already, two of them in flight.

    Parameters
    ----------
    gpu : Gpu
        The device.
    """

    def __init__(self, gpu: Any) -> None:
        self._gpu = gpu
        self._buffers = [gpu.pinned(STEP_NBYTES) for _ in range(_IN_FLIGHT)]
        for buffer in self._buffers:
            buffer[:] = 1

    def to_host(self, parts: Iterable[Any]) -> None:
        """Copy bytes of the device, each part `STEP_NBYTES` at most, to the host."""
        self._queue_all(parts, lambda part, buffer: (buffer, part))

    def to_device(self, parts: Iterable[Any]) -> None:
        """Copy as many bytes of the host to such parts."""
        self._queue_all(parts, lambda part, buffer: (part, buffer))

    def _queue_all(
        self, parts: Iterable[Any], turn: Callable[[Any, Any], tuple[Any, Any]]
    ) -> None:
        waiting: deque[Callable[[], None]] = deque()
        for number, part in enumerate(parts):
            if len(waiting) == _IN_FLIGHT:
                waiting.popleft()()
            buffer = self._buffers[number % _IN_FLIGHT][: part.size]
            waiting.append(self._gpu.queue(*turn(part, buffer)))
        for wait in waiting:
            wait()

    def check(
        self, content: Content, found: Mapping[str, Any], keys: Sequence[str]
    ) -> None:
        """Refuse arrays of the device whose bytes are not those of `keys`.

        Raises
        ------
        RuntimeError
            If one lacks, differs, or is one too many.
        """
        if sorted(found) != sorted(keys):
            raise RuntimeError(f"{len(found)} arrays are there, not the {len(keys)}")
        wrong = [key for key in keys if not self._is_equal(content, key, found[key])]
        if wrong:
            raise RuntimeError(f"{len(wrong)} arrays differ, {wrong[0]!r} first")

    def _is_equal(self, content: Content, key: str, array: Any) -> bool:
        data = self._gpu.bytes_of(array)
        if tuple(array.shape) != content.shapes[key] or data.size != content.nbytes(
            key
        ):
            return False
        for start, part in content.steps(key):
            buffer = self._buffers[0][: part.size]
            self._gpu.queue(buffer, data[start : start + part.size])()
            if not np.array_equal(buffer, part):
                return False
        return True


def steps_of(gpu: Any, arrays: Iterable[Any]) -> list[Any]:
    """Return the bytes of arrays of the device, in parts that `Copies` takes."""
    return [
        data[start : start + STEP_NBYTES]
        for data in map(gpu.bytes_of, arrays)
        for start in range(0, data.size, STEP_NBYTES)
    ]


def run_all(threads: int, jobs: Iterator[Callable[[], object]]) -> None:
    """Run jobs in as many threads."""
    if threads == 1:
        for job in jobs:
            job()
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda job: job(), jobs):
            pass
