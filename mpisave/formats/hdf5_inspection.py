"""What an HDF5 file of another program holds, found out before any data is read.

`main` runs in a process of its own, which `foreign_hdf5` starts: the HDF5 library was
not made for files that mean harm. It opens no file: what it reads, it asks of the other
process. The same checks in one process are `found_in`.
"""

from __future__ import annotations

import json
import math
import os
import resource
import struct
import sys
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mpisave.dtypes import dtype_name, savable
from mpisave.errors import FileFormatError
from mpisave.tree import MAX_DEPTH

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpisave.errors import Key

# To the other process: what follows, and two numbers. Offset and length of what to
# read; or length of the answer.
MESSAGE = struct.Struct("<cQQ")
READ, ANSWER = b"R", b"A"
LENGTH = struct.Struct("<Q")

_PAGE_NBYTES = 16 * 2**10
_MOST_PAGES = 256
_CACHE_NBYTES = 2**20

# What inspection may take on top of what the process has and the length of the file.
_MEMORY_NBYTES = 48 * 2**20

# Of processor time. An object takes about 0.1 ms, and at least 100 bytes of the file.
_SECONDS = 10
_SECONDS_PER_MIB = 4
_MOST_SECONDS = 1200

# A link takes at least 11 bytes of a file.
_LINK_NBYTES = 8

_OURS = b"mpisave."


def found_in(file: Any, nbytes: int) -> str:
    """Return the nodes of an HDF5 file, as the JSON of an index without checksums.

    Parameters
    ----------
    file : seekable binary file object
        The file. Only metadata is read.
    nbytes : int
        Its length.

    Raises
    ------
    FileFormatError
        By path, if there is anything but groups, hard links, and contiguous datasets of
        plain numbers that lie within the file.
    """
    import h5py

    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, file)
    # What was read of metadata is read once: HDF5 need not keep 32 MiB of it.
    cache = access.get_mdc_config()
    cache.max_size = cache.initial_size = cache.min_size = _CACHE_NBYTES
    access.set_mdc_config(cache)
    walk = _Walk(h5py, nbytes)
    opened = None
    try:
        opened = h5py.h5f.open(b"mpisave", h5py.h5f.ACC_RDONLY, access)
        walk.file(opened)
    except FileFormatError:
        raise
    except MemoryError as exc:
        raise FileFormatError(
            f"{walk.place()}: HDF5 wants more memory than a file of this length needs"
        ) from exc
    except Exception as exc:  # of whatever class h5py takes
        raise FileFormatError(f"{walk.place()}: HDF5 cannot read it: {exc}") from exc
    finally:
        if opened is not None:
            opened.close()
    return f"[{','.join(walk.nodes)}]"


class _Walk:
    """From the root down, each object once."""

    def __init__(self, h5py: Any, nbytes: int) -> None:
        self._h5py = h5py
        self._nbytes = nbytes
        self._links_left = nbytes // _LINK_NBYTES
        self._names_left = nbytes  # bytes of all paths: a long name is in many
        self._seen: set[int] = set()
        self._fileno: int | None = None
        self._layouts = {
            h5py.h5d.COMPACT: "stored in its header (compact)",
            h5py.h5d.CHUNKED: "stored in chunks, as with compression",
            h5py.h5d.VIRTUAL: "virtual: its data lie in other datasets",
        }
        self.where = "/"
        self.nodes: list[str] = []  # as JSON: a tenth of the memory

    def file(self, opened: Any) -> None:
        """Take a file that is open."""
        if opened.get_create_plist().get_userblock():
            self._refuse("the file has a user block, which is refused")
        self._object(opened, b"/", ())

    def place(self) -> str:
        """Return the path of what is looked at, for errors."""
        where = self.where
        return repr(where if len(where) <= 200 else f"{where[:100]}...{where[-90:]}")

    def _refuse(self, what: str) -> NoReturn:
        raise FileFormatError(f"{self.place()}: {what}. h5py may read it.")

    def _object(self, parent: Any, name: bytes, key: Key) -> None:
        h5o = self._h5py.h5o
        self.where = "/" + "/".join(map(str, key))
        info = h5o.get_info(parent, name)
        if self._fileno is None:
            self._fileno = info.fileno
        if info.fileno != self._fileno:
            self._refuse("it lies in another file, which is refused")
        if info.addr in self._seen:
            self._refuse(
                "it is also there under another name: a hard link to what has a name "
                "already, or a loop, is refused"
            )
        self._seen.add(info.addr)
        if info.type not in (h5o.TYPE_GROUP, h5o.TYPE_DATASET):
            self._refuse("it is a named datatype, which is refused")
        found = h5o.open(parent, name)
        if info.num_attrs:
            self._attributes(found)
        if info.type == h5o.TYPE_DATASET:
            self._add(key, "array", *self._dataset(found))
        else:
            self._add(key, "dict", None)
            self._group(found, key)

    def _add(self, *node: Any) -> None:
        self.nodes.append(json.dumps(node, separators=(",", ":")))

    def _attributes(self, found: Any) -> None:
        ours: list[str] = []

        def look(name: bytes) -> bool | None:
            if name.startswith(_OURS):
                ours.append(name.decode(errors="replace"))
            return True if ours else None  # HDF5 goes on after None

        self._h5py.h5a.iterate(found, look)
        if ours:
            self._refuse(
                f"it has the attribute {ours[0]!r} of mpisave, but the index at the "
                f"end of the file is gone: the file was not written to its end, or was "
                f"changed after it was saved"
            )

    def _group(self, group: Any, key: Key) -> None:
        if len(key) >= MAX_DEPTH:
            self._refuse(f"it is nested deeper than {MAX_DEPTH} levels")
        h5 = self._h5py.h5
        order = group.get_create_plist().get_link_creation_order()
        tracked = order & self._h5py.h5p.CRT_ORDER_TRACKED
        links: list[tuple[bytes, int]] = []

        def take(name: bytes, info: Any) -> bool | None:
            links.append((name, info.type))
            return True if len(links) > self._links_left else None

        group.links.iterate(
            take, info=True, idx_type=h5.INDEX_CRT_ORDER if tracked else h5.INDEX_NAME
        )
        self._links_left -= len(links)
        if self._links_left < 0:
            self._refuse("there are more links than the file has room for")
        # All of them before one is followed.
        parts = [self._part(name, kind, key) for name, kind in links]
        if len({name for name, _ in links}) < len(links):
            self._refuse("it has two links of one name")
        for (name, _), part in zip(links, parts, strict=True):
            self._object(group, name, (*key, part))

    def _part(self, name: bytes, kind: int, key: Key) -> str:
        h5l = self._h5py.h5l
        part = name.decode(errors="backslashreplace")
        self.where = "/" + "/".join([*map(str, key), part])
        if kind != h5l.TYPE_HARD:
            what = {h5l.TYPE_SOFT: "a soft link", h5l.TYPE_EXTERNAL: "an external link"}
            self._refuse(f"it is {what.get(kind, 'a link of its own kind')}: refused")
        self._names_left -= len(self.where)
        if self._names_left < 0:
            self._refuse("the names are longer than the file has room for")
        if not name or b"/" in name or name == b".":
            self._refuse("it is no name that a link may have")
        try:
            return name.decode()
        except UnicodeDecodeError:
            self._refuse("its name is not in UTF-8")

    def _dataset(self, dataset: Any) -> tuple[str, list[int], int, int]:
        h5s = self._h5py.h5s
        creation = dataset.get_create_plist()
        if creation.get_external_count():
            self._refuse("it has external storage: its data lie in another file")
        layout = creation.get_layout()
        if layout != self._h5py.h5d.CONTIGUOUS:
            what = self._layouts.get(layout, f"of the unknown layout {layout}")
            self._refuse(f"it is {what}, which is refused")
        if creation.get_nfilters():
            self._refuse("it has filters, which is refused")
        name, itemsize = self._dtype(dataset.get_type())
        space = dataset.get_space()
        if space.get_simple_extent_type() not in (h5s.SIMPLE, h5s.SCALAR):
            self._refuse("it is empty: it has no shape")
        shape = [int(n) for n in space.get_simple_extent_dims()]
        nbytes = math.prod(shape) * itemsize
        return name, shape, self._offset(dataset, shape, nbytes), nbytes

    def _offset(self, dataset: Any, shape: list[int], nbytes: int) -> int:
        if not nbytes:
            return 0
        if nbytes > self._nbytes:
            self._refuse(
                f"it is of shape {shape} and would have {nbytes} bytes, the file has "
                f"{self._nbytes}"
            )
        offset = dataset.get_offset()
        if offset is None:
            self._refuse("its data were never written: it would be all fill value")
        stored = dataset.get_storage_size()
        if stored != nbytes:
            self._refuse(f"{stored} bytes are stored, its shape needs {nbytes}")
        if offset + nbytes > self._nbytes:
            self._refuse(
                f"its data end at byte {offset + nbytes}, the file at {self._nbytes}"
            )
        return int(offset)

    def _dtype(self, kind: Any) -> tuple[str, int]:
        """Return name and item size of a dtype that has the bytes of an HDF5 type."""
        h5t = self._h5py.h5t
        if kind.committed():
            self._refuse("its datatype is a named one, which is refused")
        what = kind.get_class()
        number = what in (h5t.INTEGER, h5t.FLOAT)
        if not number and self._members(kind, what) not in (
            [(b"FALSE", 0), (b"TRUE", 1)],
            [(b"r", h5t.FLOAT), (b"i", h5t.FLOAT)],
        ):
            self._refuse(
                "its datatype is refused: arrays hold booleans and numbers, no "
                "strings, references, records or objects"
            )
        dtype = kind.dtype
        # Then NumPy's bytes are those of HDF5: no padding, no precision of its own.
        if not h5t.py_create(dtype, logical=True).equal(kind):
            self._refuse(f"its datatype is not NumPy's {dtype}, which is refused")
        return dtype_name(savable(dtype)), dtype.itemsize

    def _members(self, kind: Any, what: int) -> list[tuple[bytes, int]]:
        """Return the names of two members, and their values or classes."""
        h5t = self._h5py.h5t
        if what not in (h5t.ENUM, h5t.COMPOUND) or kind.get_nmembers() != 2:
            return []
        value: Callable[[int], int] = (
            kind.get_member_value if what == h5t.ENUM else kind.get_member_class
        )
        return [(kind.get_member_name(n), value(n)) for n in range(2)]


class _Pages:
    """The file, as HDF5 reads it: pages that the other process sends."""

    def __init__(self, socket: Any, nbytes: int) -> None:
        self._socket = socket
        self._nbytes = nbytes
        self._position = 0
        self._pages: OrderedDict[int, bytes] = OrderedDict()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = (0, self._position, self._nbytes)[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, out: Any) -> int:
        view = memoryview(out).cast("B")
        done = 0
        while done < view.nbytes:
            number, skip = divmod(self._position, _PAGE_NBYTES)
            part = self._page(number)[skip : skip + view.nbytes - done]
            if not part:
                raise OSError(f"byte {self._position} is beyond the end of the file")
            view[done : done + len(part)] = part
            done += len(part)
            self._position += len(part)
        return done

    def _page(self, number: int) -> bytes:
        page = self._pages.get(number)
        if page is None:
            offset = number * _PAGE_NBYTES
            if offset >= self._nbytes:
                return b""
            self._socket.sendall(MESSAGE.pack(READ, offset, _PAGE_NBYTES))
            (nbytes,) = LENGTH.unpack(receive(self._socket, LENGTH.size))
            page = receive(self._socket, nbytes)
            self._pages[number] = page
            if len(self._pages) > _MOST_PAGES:
                self._pages.popitem(last=False)
        return page

    def write(self, data: Any) -> NoReturn:
        raise OSError(f"{len(data)} bytes are to be written to a file that is read")

    def truncate(self, nbytes: int | None = None) -> NoReturn:
        raise OSError(f"a file that is read is to be cut to {nbytes} bytes")

    def flush(self) -> None:
        """Do nothing: nothing is written."""


def receive(socket: Any, nbytes: int) -> bytes:
    """Return exactly so many bytes.

    Raises
    ------
    EOFError
        If the other end has gone.
    """
    data = bytearray()
    while len(data) < nbytes:
        part = socket.recv(min(nbytes - len(data), 2**20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def limit_this_process(nbytes: int) -> None:
    """Have the system end this process before a file of `nbytes` gets it to do harm."""
    seconds = min(_SECONDS + nbytes * _SECONDS_PER_MIB // 2**20, _MOST_SECONDS)
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: seconds,  # then SIGXCPU
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 0,  # what is open stays; nothing more opens
    }
    statm = Path("/proc/self/statm")
    if statm.exists():  # on Linux
        held = int(statm.read_text().split()[0]) * resource.getpagesize()
        limits[resource.RLIMIT_AS] = held + _MEMORY_NBYTES + nbytes
    for what, most in limits.items():
        _, ceiling = resource.getrlimit(what)
        # At the hard limit of processor time, SIGKILL would not say what it was.
        hard = most + 2 if what == resource.RLIMIT_CPU else most
        if ceiling != resource.RLIM_INFINITY:
            hard = min(hard, ceiling)
        resource.setrlimit(what, (min(most, hard), hard))


def main() -> None:
    """Answer with the nodes of the file that the other process reads, or why not."""
    import socket

    number, nbytes = map(int, sys.argv[1:3])
    other = socket.socket(fileno=number)
    try:
        import h5py  # noqa: F401 - all that it opens, before nothing can be

        limit_this_process(nbytes)
        text = f'{{"nodes":{found_in(_Pages(other, nbytes), nbytes)}}}'
    except FileFormatError as exc:
        text = json.dumps({"refused": str(exc)})
    except ImportError as exc:
        text = json.dumps({"missing": str(exc)})
    data = text.encode()
    other.sendall(MESSAGE.pack(ANSWER, len(data), 0) + data)
    # Nothing is freed: HDF5 need not look at the file once more.
    os._exit(0)
