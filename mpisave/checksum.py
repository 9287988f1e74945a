"""Bytes to CRC-32C (Castagnoli; RFC 3720, appendix B.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined,unused-ignore]


def crc32c(data: Buffer, value: int = 0) -> int:
    """Return the CRC-32C of the bytes behind `value` with `data` appended.

    The GIL is released on buffers of 32 KiB and more.
    """
    # Here, since importing it takes a sixth of the time of importing mpisave.
    from crc32c import crc32c as extend

    return int(extend(data, value))
