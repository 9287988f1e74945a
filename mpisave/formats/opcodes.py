"""The opcodes of a pickle, one after another, each with its argument and its offset.

Nothing is read before its size was checked against the file. Large payload is not read
at all: what uses it does, straight into an array.
"""

from __future__ import annotations

import pickletools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpisave.errors import FileFormatError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import numpy.typing as npt

    from mpisave.source import Source

_BY_CODE = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
# Bytes objects, by how many bytes their length has.
_PAYLOAD = {"SHORT_BINBYTES": 1, "BINBYTES": 4, "BINBYTES8": 8, "BYTEARRAY8": 8}
# What makes objects of classes, or calls for what is not in the file. Strings of Python
# 2 are text or bytes, nobody knows which.
_REFUSED = frozenset(
    {
        *("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"),
        *("PERSID", "BINPERSID", "NEXT_BUFFER", "READONLY_BUFFER", "DUP"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING"),
    }
)
_SMALL_NBYTES = 4096
_WINDOW_NBYTES = 65536
# Names, and decimal numbers, which take Python quadratic time.
_LONGEST_LINE = 512
_NEWEST_PROTOCOL = 5
_DECIMAL = re.compile(rb"-?(0|[1-9][0-9]*)")


@dataclass(eq=False, slots=True)
class Payload:
    """Bytes in the file that nobody has read yet."""

    source: Source
    offset: int
    nbytes: int
    kind: type[bytes | bytearray]
    _value: bytes | bytearray | None = None

    def __len__(self) -> int:
        return self.nbytes

    def __sizeof__(self) -> int:
        """Return what it takes as a value, for `sys.getsizeof`."""
        return self.nbytes + 128

    def value(self) -> bytes | bytearray:
        """Return the bytes as the object that they are: one, however often asked."""
        if self._value is None:
            out = bytearray(self.nbytes)
            self._fill(memoryview(out))
            self._value = out if self.kind is bytearray else bytes(out)
        return self._value

    def read_into(self, out: npt.NDArray[np.uint8]) -> None:
        """Fill `out`, of as many bytes."""
        self._fill(memoryview(out))  # type: ignore[arg-type]  # NumPy 2 types know

    def _fill(self, out: memoryview) -> None:
        if self.source.read_into(self.offset, out) != self.nbytes:
            raise FileFormatError("the file became shorter while it was read")


class _Reader:
    """The file as pickletools reads it: never more than there is."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._window, self._start = b"", 0  # a part of the file, and where it begins
        self.at = 0
        self.longest_line = _LONGEST_LINE

    @property
    def left(self) -> int:
        return int(self._source.nbytes) - self.at

    def read(self, nbytes: int) -> bytes:
        skip = self.at - self._start
        if not 0 <= skip <= len(self._window) - nbytes:
            if nbytes > _WINDOW_NBYTES:
                data = self._source.read(self.at, nbytes)
                self.at += len(data)
                return data
            self._window = self._source.read(self.at, _WINDOW_NBYTES)
            self._start, skip = self.at, 0
        data = self._window[skip : skip + nbytes]
        self.at += len(data)
        return data

    def readline(self) -> bytes:
        """Return up to and with the end of the line, or raise ValueError."""
        begin, stop = self.at, min(self.longest_line, self.left)
        parts: list[bytes] = []
        while (done := self.at - begin) < stop:
            here = self.at
            part = self.read(min(_LONGEST_LINE, stop - done))
            if not part:
                break
            end = part.find(b"\n") + 1
            if end:
                self.at = here + end
                return b"".join([*parts, part[:end]])
            parts.append(part)
        raise ValueError(f"the line has no end within {stop} bytes")


def opcodes(source: Source) -> Iterator[tuple[str, Any, int]]:
    """Yield name, argument and offset of each opcode, up to STOP.

    Raises
    ------
    FileFormatError
        If one is unknown, or the file ends within or before it.
    """
    reader = _Reader(source)
    name = ""
    while name != "STOP":
        offset = reader.at
        code = reader.read(1)
        opcode = _BY_CODE.get(code)
        if opcode is None:
            raise FileFormatError(
                f"byte {offset} is {code!r}, which is no opcode of a pickle"
                if code
                else f"the pickle has no end: it is torn at byte {offset}"
            )
        name = opcode.name
        if name in _REFUSED:
            raise FileFormatError(f"the opcode {name} at byte {offset} is refused")
        try:
            argument = _argument(reader, opcode, source)
        except (ValueError, OverflowError, MemoryError) as exc:
            raise FileFormatError(
                f"the pickle ends or is altered at byte {reader.at}: {exc!s:.200} "
                f"(opcode {name} at byte {offset})"
            ) from exc
        yield name, argument, offset


def _argument(
    reader: _Reader, opcode: pickletools.OpcodeInfo, source: Source
) -> object:
    if opcode.name in _PAYLOAD:
        return _payload(reader, opcode.name, source)
    if opcode.arg is None:
        return None
    is_text = opcode.name == "UNICODE"
    reader.longest_line = source.nbytes if is_text else _LONGEST_LINE
    if opcode.name == "GLOBAL":
        # pickletools would undo escapes, which no loader does.
        return tuple(reader.readline()[:-1].decode() for _ in ("module", "name"))
    if opcode.name in ("INT", "LONG", "GET", "PUT"):
        return _decimal(reader.readline()[:-1], opcode.name)
    argument = opcode.arg.reader(reader)  # type: ignore[arg-type]  # what it uses of IO
    if opcode.name == "PROTO" and argument > _NEWEST_PROTOCOL:
        raise ValueError(f"{argument} is no protocol, or a newer one")
    if opcode.name == "FRAME" and argument > reader.left:
        raise ValueError(f"a frame of {argument} bytes, and {reader.left} are left")
    return argument


def _decimal(line: bytes, name: str) -> int:
    """Return the number that picklers write, in one way only.

    For 010, the loader in C has 8, that in Python an error, and pickletools 10.
    """
    if name == "INT" and line in (b"00", b"01"):
        return line == b"01"
    if name == "LONG":
        line = line.removesuffix(b"L")
    if not _DECIMAL.fullmatch(line):
        raise ValueError(f"{line!r:.40} is no decimal number")
    return int(line)


def _payload(reader: _Reader, name: str, source: Source) -> bytes | bytearray | Payload:
    width = _PAYLOAD[name]
    length = reader.read(width)
    nbytes = int.from_bytes(length, "little")
    if len(length) < width or nbytes > reader.left:
        raise ValueError(f"{nbytes} bytes are announced, and {reader.left} are left")
    kind = bytearray if name == "BYTEARRAY8" else bytes
    if nbytes <= _SMALL_NBYTES:
        return kind(reader.read(nbytes))
    reader.at += nbytes
    return Payload(source, reader.at - nbytes, nbytes, kind)
