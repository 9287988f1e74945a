"""HDF5 files that mean harm, or that h5py reads and mpisave does not: a name, bytes.

``python hostile_hdf5.py load`` (or ``compare``) takes a path a line, and prints a line
of JSON for each.
"""

import io
import json
import os
import pickle
import random
import resource
import struct
import sys
import time
from pathlib import Path

import h5py
import numpy as np

SECRET = b"the secret that lies in another file"
SHAPE = (17, 19)  # found in the bytes of a header
OTHER_SHAPE = (23, 29)

CASES = {}
# Cases that may be loaded, if the result is what h5py reads.
MAY_LOAD = set()
# Odd, but plain: these have to be.
LEGAL = set()


def case(made):
    CASES[made.__name__] = made
    return made


def built(folder, build, **given):
    """Return the bytes of a file that h5py makes."""
    path = folder / "made.h5"
    with h5py.File(path, "w", **given) as file:
        build(file)
    data = path.read_bytes()
    path.unlink()
    return data


def add(name, build, *, is_legal=False, **given):
    """Add a case that h5py makes without edits."""
    CASES[name] = lambda folder: built(folder, lambda f: build(f, folder), **given)
    if is_legal:
        MAY_LOAD.add(name)
        LEGAL.add(name)


def plain(file, folder=None):
    file["w"] = np.arange(17 * 19, dtype=np.int64).reshape(SHAPE)
    file["v"] = np.arange(23 * 29, dtype=np.float64).reshape(OTHER_SHAPE)
    file["g/in"] = np.arange(5, dtype=np.float32)


def edit(name, change, build=plain, *, may_load=True, **given):
    """Add a case of bytes that are changed afterwards."""

    def make(folder):
        data = bytearray(built(folder, lambda f: build(f, folder), **given))
        before = bytes(data)
        changed = change(data)
        data = data if changed is None else changed
        assert bytes(data) != before, f"{name} changes nothing"
        return bytes(data)

    CASES[name] = make
    if may_load:
        MAY_LOAD.add(name)


# Links.


def soft(target, name="s"):
    return lambda f, _: (plain(f), f.__setitem__(name, h5py.SoftLink(target)))


add("soft link", soft("/w"))
add("soft link that dangles", soft("/none"))
add("soft link to itself", soft("/s"))
add("soft link to the root", soft("/"))
add("soft link to its parent", soft("..", "g/up"))
add("soft link with a relative path", soft("../w", "g/up"))
add("soft link of 60,000 bytes", soft("/" + "x" * 60_000))


def external(file, path="/"):
    return lambda f, d: (
        plain(f),
        f.__setitem__("e", h5py.ExternalLink(str(d / file), path)),
    )


add("external link to a secret", external("secret.h5", "/secret"))
add("external link to a secret group", external("secret.h5"))
add("external link that dangles", external("none.h5"))
add("external link to itself", external("made.h5", "/e"))
add(
    "external link to a file of the system",
    lambda f, _: f.__setitem__("e", h5py.ExternalLink("/etc/hostname", "/")),
)
add(
    "external link upwards",
    lambda f, _: f.__setitem__("e", h5py.ExternalLink("../secret.h5", "/secret")),
)
add(
    "external link deep down",
    lambda f, d: f.__setitem__(
        "a/b/c/d", h5py.ExternalLink(str(d / "secret.h5"), "/secret")
    ),
)


def in_itself(f, _):
    group = f.create_group("a/b/c")
    group["again"] = f["a"]


add("group in itself", in_itself)
add("root in a group", lambda f, _: f.create_group("a").__setitem__("r", f["/"]))
add("root in the root", lambda f, _: f.__setitem__("r", f["/"]))


def dag(f, _):
    below = f.create_group("g0")
    below["w"] = np.arange(3)
    for level in range(1, 31):
        group = f.create_group(f"g{level}")
        group["l"] = group["r"] = below
        below = group


add("2**30 ways to one dataset", dag)
add("dataset of two names", lambda f, _: (plain(f), f.__setitem__("again", f["w"])))
add(
    "dataset of 1000 names",
    lambda f, _: (plain(f), [f.__setitem__(f"a{i}", f["w"]) for i in range(1000)]),
)


def deep(levels):
    def build(f, _):
        group = f
        for _level in range(levels):
            group = group.create_group("d")

    return build


add("65 levels", deep(65))
add("2000 levels", deep(2000))
add("63 levels", deep(63), is_legal=True)
add(
    "a long name above many",
    lambda f, _: [f.create_group(f"{'n' * 40_000}/{i}") for i in range(300)],
)
add("no groups and no datasets", lambda f, _: None, is_legal=True)
add(
    "10,000 empty groups",
    lambda f, _: [f.create_group(str(i)) for i in range(10_000)],
    is_legal=True,
)

# Storage.


def outside(name_of):
    def build(f, folder):
        plain(f)
        f.create_dataset("x", (len(SECRET),), "u1", external=name_of(folder))

    return build


add("external storage", outside(lambda d: [(str(d / "secret"), 0, 36)]))
add("external storage from an offset", outside(lambda d: [(str(d / "secret"), 4, 36)]))
add("external storage that is missing", outside(lambda d: [(str(d / "none"), 0, 36)]))
add("external storage upwards", outside(lambda d: [("../secret", 0, 36)]))
add("external storage of the system", outside(lambda d: [("/etc/hostname", 0, 36)]))
add(
    "external storage without a limit",
    outside(lambda d: [(str(d / "secret"), 0, h5py.h5f.UNLIMITED)]),
)
add(
    "external storage of many files",
    outside(lambda d: [(str(d / "secret"), i, 1) for i in range(36)]),
)
add("external storage of a device", outside(lambda d: [("/dev/zero", 0, 36)]))


def virtual(source_of, dataset="secret", size=36):
    def build(f, folder):
        layout = h5py.VirtualLayout((size,), "u1")
        layout[:] = h5py.VirtualSource(source_of(folder), dataset, (size,))
        f.create_virtual_dataset("x", layout)

    return build


add("virtual dataset of a secret", virtual(lambda d: str(d / "secret.h5")))
add("virtual dataset of a missing file", virtual(lambda d: str(d / "none.h5")))
add("virtual dataset of itself", virtual(lambda d: ".", "x"))
add("virtual dataset of its own file", virtual(lambda d: ".", "w"))
add(
    "virtual dataset that was never mapped",
    lambda f, _: f.create_virtual_dataset("x", h5py.VirtualLayout((9,), "u1")),
)


def stored(**given):
    return lambda f, _: (
        plain(f),
        f.create_dataset("x", data=np.arange(1000), **given),
    )


add("chunks", stored(chunks=(100,)))
add("gzip", stored(compression="gzip"))
add("lzf", stored(compression="lzf"))
add("shuffle", stored(shuffle=True))
add("fletcher32", stored(fletcher32=True))
add("scaleoffset", stored(scaleoffset=0))
add("chunks that grow", stored(maxshape=(None,)))
add(
    "chunks that were never written",
    lambda f, _: f.create_dataset("x", (10**15,), "f8", chunks=(100,)),
)


def chunk_of(data):
    def build(f, _):
        made = f.create_dataset("x", (1000,), "u1", chunks=(1000,), compression="gzip")
        made.id.write_direct_chunk((0,), data)

    return build


add("gzip that inflates short", chunk_of(bytes.fromhex("789c4b040000620062")))
add("gzip of no stream", chunk_of(b"no stream"))


def low_level(name, dtype, shape, *, layout=None, attempt=None, fill=None):
    def build(f, _):
        create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        if layout is not None:
            create.set_layout(layout)
        if fill is not None:
            create.set_fill_value(fill)
        kind = (
            dtype if isinstance(dtype, h5py.h5t.TypeID) else h5py.h5t.py_create(dtype)
        )
        space = h5py.h5s.create_simple(shape)
        made = h5py.h5d.create(f.id, name.encode(), kind, space, create)
        if attempt is not None:
            made.write(h5py.h5s.ALL, h5py.h5s.ALL, attempt)

    return build


I8 = np.dtype("i8")
add("compact", low_level("x", I8, (5,), layout=0, attempt=np.arange(5)))
add("never written", low_level("x", I8, (5,)))
add("fill value alone", low_level("x", I8, (5,), fill=np.array(7)))
add("never written and huge", low_level("x", I8, (2**40, 2**20)))
add("null dataspace", lambda f, _: f.__setitem__("x", h5py.Empty("f8")))

# Types.


def of_type(dtype, data=None):
    def build(f, _):
        plain(f)
        f.create_dataset("x", data=data, dtype=dtype)

    return build


add("strings", of_type(h5py.string_dtype(), ["a", "b"]))
add("one string", lambda f, _: f.__setitem__("x", "text"))
add("strings of one length", of_type("S5", np.array([b"a"], "S5")))
add(
    "arrays of any length",
    lambda f, _: f.create_dataset("x", (3,), h5py.vlen_dtype("i4")),
)
add("records", of_type(None, np.zeros(3, [("a", "i4"), ("b", "f8")])))
add("records named as complex", of_type(None, np.zeros(3, [("r", "i4"), ("i", "i4")])))
add(
    "records of references",
    lambda f, _: f.create_dataset("x", (2,), np.dtype([("r", h5py.ref_dtype)])),
)
add("enumeration", of_type(h5py.enum_dtype({"A": 0, "B": 1}), [0, 1]))
add(
    "booleans the wrong way round",
    of_type(h5py.enum_dtype({"FALSE": 1, "TRUE": 0}, basetype="i1"), [0, 1]),
)
add(
    "booleans of four bytes",
    of_type(h5py.enum_dtype({"FALSE": 0, "TRUE": 1}, basetype="i4"), [0, 1]),
)
add("opaque", of_type(None, np.array([b"abc"], "V3")))
add("arrays as elements", lambda f, _: f.create_dataset("x", (3,), np.dtype("(2,2)i4")))
add(
    "object references", lambda f, _: (plain(f), f.create_dataset("x", data=f["w"].ref))
)
add(
    "region references",
    lambda f, _: (plain(f), f.create_dataset("x", data=f["w"].regionref[:2])),
)


def named(f, _):
    f["kind"] = np.dtype("f8")
    f.create_dataset("x", (3,), dtype=f["kind"], data=np.zeros(3))


add("named datatype", named)


def odd_type(change, of=h5py.h5t.STD_I32LE):
    kind = of.copy()
    change(kind)
    return low_level("x", kind, (3,), attempt=np.zeros(3, "i4"))


add("integers of 24 bits", odd_type(lambda k: k.set_precision(24)))
add(
    "floats with another bias",
    odd_type(lambda k: k.set_ebias(100), h5py.h5t.IEEE_F32LE),
)
add(
    "floats with other fields",
    odd_type(lambda k: k.set_fields(31, 20, 11, 0, 20), h5py.h5t.IEEE_F32LE),
)
add("bit fields", low_level("x", h5py.h5t.STD_B32LE, (3,)))
add("times", low_level("x", h5py.h5t.UNIX_D32LE, (3,)))

# Attributes.

add(
    "attribute of ours on a group",
    lambda f, _: (plain(f), f["g"].attrs.__setitem__("mpisave.kind", "list")),
)
add(
    "attribute of ours on a dataset",
    lambda f, _: (plain(f), f["w"].attrs.__setitem__("mpisave.dtype", "bfloat16")),
)
add(
    "attribute of ours on the root",
    lambda f, _: f.attrs.__setitem__("mpisave.format", "1"),
)
add(
    "attribute of one megabyte",
    lambda f, _: (plain(f), f["w"].attrs.__setitem__("x", np.zeros(2**17))),
    libver="latest",
    is_legal=True,
)
add(
    "attribute of strings",
    lambda f, _: (plain(f), f.attrs.__setitem__("x", ["a", "bc"])),
    is_legal=True,
)
add(
    "attribute of references",
    lambda f, _: (plain(f), f.attrs.__setitem__("x", f["w"].ref)),
    is_legal=True,
)
add(
    "5000 attributes",
    lambda f, _: (plain(f), [f.attrs.__setitem__(f"a{i}", i) for i in range(5000)]),
    libver="latest",
    is_legal=True,
)
add("newest layout of metadata", plain, libver="latest", is_legal=True)
add("creation order", plain, track_order=True, is_legal=True)

# Bytes that are changed afterwards. h5py writes metadata without checksums.


def replaced(old, new, which=0):
    def change(data):
        at = -1
        for _ in range(which + 1):
            at = data.index(old, at + 1)
        data[at : at + len(new)] = new

    return change


def dims(*new, old=SHAPE):
    return replaced(
        # Current and maximal.
        struct.pack(f"<{2 * len(old)}Q", *old, *old),
        struct.pack(f"<{2 * len(new)}Q", *new, *new),
    )


NBYTES = 17 * 19 * 8
edit("huge shape", dims(2**40, 19), may_load=False)
edit("product that wraps to nothing", dims(2**32, 2**32), may_load=False)
edit("product that wraps to few", dims(2**61 + 17, 19), may_load=False)
edit("bytes that wrap", dims(2**61, 1), may_load=False)
edit("largest shape", dims(2**64 - 1, 2**64 - 1), may_load=False)
edit("larger shape", dims(18, 19), may_load=False)
edit("smaller shape", dims(16, 19), may_load=False)
edit("shape without elements", dims(0, 19))
edit("other shape of as many", dims(19, 17))
edit("current shape of another dataset", dims(*OTHER_SHAPE))


def where(data, nbytes=NBYTES):
    """Return where the message is that holds address and size of a dataset."""
    at = 0
    while True:
        at = data.index(struct.pack("<Q", nbytes), at + 1)
        (address,) = struct.unpack_from("<Q", data, at - 8)
        if 0 < address < len(data):
            return at - 8


def layout(address=None, nbytes=None, *, like=None, by=0):
    def change(data):
        at = where(data)
        if like is not None:
            other = where(data, like)
            data[at : at + 8] = data[other : other + 8]
        if address is not None:
            data[at : at + 8] = struct.pack("<Q", address % 2**64)
        if by:
            old = struct.unpack_from("<Q", data, at)[0]
            data[at : at + 8] = struct.pack("<Q", old + by)
        if nbytes is not None:
            data[at + 8 : at + 16] = struct.pack("<Q", nbytes)

    return change


OTHER = 23 * 29 * 8
edit("data beyond the end", layout(10**9), may_load=False)
edit("data that end beyond the end", layout(by=10**4), may_load=False)
edit("data at the last address", layout(-2), may_load=False)
edit("data nowhere", layout(-1), may_load=False)
edit("data where the superblock is", layout(0))
edit("data a few bytes further on", layout(by=8))
edit("data of another dataset", layout(like=OTHER), may_load=False)
edit("data that overlap", layout(like=OTHER, by=8), may_load=False)
edit("fewer bytes stored", layout(nbytes=8), may_load=False)
edit("no bytes stored", layout(nbytes=0), may_load=False)
edit("more bytes stored", layout(nbytes=2**40), may_load=False)
edit("all bytes stored", layout(nbytes=2**64 - 1), may_load=False)
for number in (0, 2, 3, 4, 255):
    edit(f"layout class {number}", lambda d, n=number: d.__setitem__(where(d) - 1, n))
for number in (0, 1, 2, 4, 5, 9):
    edit(f"layout version {number}", lambda d, n=number: d.__setitem__(where(d) - 2, n))
for number in (0, 1, 33, 255):
    edit(
        f"{number} axes",
        lambda d, n=number: d.__setitem__(d.index(struct.pack("<QQ", *SHAPE)) - 7, n),
    )


def type_of(data):
    """Return where the datatype of int64 is."""
    return data.index(bytes.fromhex("1008000008000000000040 00"))


for number in range(1, 12):
    edit(
        f"type class {number}", lambda d, n=number: d.__setitem__(type_of(d), 0x10 | n)
    )
for number in (0, 4, 16, 2**31, 2**32 - 1):
    edit(
        f"elements of {number} bytes",
        lambda d, n=number: d.__setitem__(
            slice(type_of(d) + 4, type_of(d) + 8), struct.pack("<I", n)
        ),
        may_load=False,
    )
for number in (0, 2, 3, 5, 15):
    edit(
        f"type version {number}",
        lambda d, n=number: d.__setitem__(type_of(d), n << 4),
    )
edit("elements of negative precision", lambda d: d.__setitem__(type_of(d) + 10, 0))


def at(offset, new):
    return lambda data: data.__setitem__(slice(offset, offset + len(new)), new)


U64 = struct.Struct("<Q").pack
edit("base address of 8", at(24, U64(8)))
edit("base address of 512", at(24, U64(512)))
edit("base address of the last byte", at(24, U64(2**64 - 9)))
edit("end before the data", at(40, U64(900)))
edit("end at nothing", at(40, U64(0)))
edit("end beyond the end", at(40, U64(10**9)), may_load=False)
edit("root at nothing", at(64, U64(0)))
edit("root at the end", at(64, U64(2**40)))
edit("root nowhere", at(64, U64(2**64 - 1)))
for number in (1, 2, 4, 16, 255):
    edit(f"offsets of {number} bytes", at(13, bytes([number])))
    edit(f"lengths of {number} bytes", at(14, bytes([number])))
for number in (1, 2, 3, 4, 255):
    edit(f"superblock version {number}", at(8, bytes([number])))
edit("group leaf of nothing", at(16, b"\0\0"))
edit("group leaf of 65535", at(16, b"\xff\xff"))


def cut(share):
    def change(data):
        nbytes = int(len(data) * share)
        data[40:48] = U64(nbytes)
        return data[:nbytes]

    return change


for share in (0.02, 0.1, 0.3, 0.5, 0.9, 0.999):
    edit(f"cut at {share}, and says so", cut(share))
    edit(f"cut at {share}", lambda d, s=share: d[: int(len(d) * s)], may_load=False)


def found(signature, offset, new, which=0):
    def change(data):
        start = -1
        for _ in range(which + 1):
            start = data.index(signature, start + 1)
        put = new(start) if callable(new) else new
        data[start + offset : start + offset + len(put)] = put

    return change


edit("tree that is its own child", found(b"TREE", 32, U64))


def own_child(data):
    found(b"TREE", 32, U64)(data)
    found(b"TREE", 5, b"\x01")(data)


edit("tree of level 1 that is its own child", own_child)
edit("tree of level 255", found(b"TREE", 5, b"\xff"))
edit("tree of 65535 children", found(b"TREE", 6, b"\xff\xff"))
edit("tree beside itself", found(b"TREE", 8, lambda start: U64(start) * 2))
edit("tree of chunks", found(b"TREE", 4, b"\x01"))
edit("tree child at the end", found(b"TREE", 32, U64(2**40)))
edit("node of 65535 links", found(b"SNOD", 6, b"\xff\xff"))
edit("node of no links", found(b"SNOD", 6, b"\0\0"))
edit("link at a name far away", found(b"SNOD", 8, U64(2**40)))
edit("link at a name at the end", found(b"SNOD", 8, U64(87)))
edit("link to an object at the end", found(b"SNOD", 16, U64(2**40)))
edit("link to the root", found(b"SNOD", 16, U64(96)))
edit("link that says it is soft", found(b"SNOD", 24, b"\x02\0\0\0"))
edit("link of an unknown kind", found(b"SNOD", 24, b"\x09\0\0\0"))
edit("heap of 2**60 bytes", found(b"HEAP", 8, U64(2**60)))
edit("heap of no bytes", found(b"HEAP", 8, U64(0)))
edit("heap whose free list is a loop", found(b"HEAP", 16, U64(8)))
edit("heap elsewhere", found(b"HEAP", 24, U64(0)))
edit("heap at the end", found(b"HEAP", 24, U64(2**40)))


def long_names(f, _):
    plain(f)
    for name in ("name_x", "name_y"):
        f[name] = np.arange(3)


def rename(new):
    return replaced(b"name_x\0", new + bytes(7 - len(new)))


edit("name with a slash", rename(b"g/in"), long_names, may_load=False)
edit("name that begins with a slash", rename(b"/w"), long_names, may_load=False)
edit("name of one dot", rename(b"."), long_names, may_load=False)
edit("name of two dots", rename(b".."), long_names)
edit("no name", rename(b""), long_names, may_load=False)
edit("name not in UTF-8", rename(b"\xff\xfe"), long_names, may_load=False)
edit("two links of one name", rename(b"name_y"), long_names, may_load=False)
edit("name without an end", replaced(b"name_y\0", b"name_yyyyyyyyy"), long_names)


def many_attributes(f, _):
    plain(f)
    for number in range(40):
        f["w"].attrs[f"a{number}"] = number


CONTINUATION = b"\x10\x00\x10\x00"


def continued(address=None, nbytes=None):
    def change(data):
        start = data.index(CONTINUATION)
        own = struct.unpack_from("<QQ", data, start + 8)
        data[start + 8 : start + 24] = struct.pack(
            "<QQ",
            start if address == "itself" else own[0] if address is None else address,
            own[1] if nbytes is None else nbytes,
        )

    return change


edit("continuation that continues itself", continued("itself"), many_attributes)
edit("continuation at the end", continued(2**40), many_attributes)
edit("continuation of 2**40 bytes", continued(nbytes=2**40), many_attributes)
edit("continuation of no bytes", continued(nbytes=0), many_attributes)
edit("continuation at the superblock", continued(0), many_attributes)


@case
def continuation_within_itself(folder):
    """Have a continuation end in a message that points to it again."""
    data = bytearray(built(folder, lambda f: many_attributes(f, folder)))
    start = data.index(CONTINUATION)
    address, nbytes = struct.unpack_from("<QQ", data, start + 8)
    message = CONTINUATION + bytes(4) + struct.pack("<QQ", address, nbytes)
    data[address : address + 24] = message
    return bytes(data)


MAY_LOAD.add("continuation_within_itself")
edit(
    "attribute of 65535 bytes",
    replaced(b"\x0c\x00", b"\x0c\x00\xff\xff"),
    many_attributes,
)
edit("65535 messages", found(bytes.fromhex("0100"), 2, b"\xff\xff", 3))


@case
def signature_and_noise(folder):
    return b"\x89HDF\r\n\x1a\n" + random.Random(1).randbytes(5000)


@case
def signature_twice(folder):
    data = built(folder, plain)
    return data[:8] + bytes(504) + data


@case
def user_block(folder):
    """Have a user block that looks like the beginning of a file."""
    data = built(folder, plain, userblock_size=512)
    return b"\x89HDF\r\n\x1a\n" + data[8:]


@case
def superblock_alone(folder):
    return built(folder, plain)[:96]


def flipped(folder, count, seed=0):
    """Yield a name and bytes: one to four bytes of metadata are others."""
    draw = random.Random(seed)
    for number in range(count):
        given = [{}, {"libver": "latest"}][number % 4 == 3]
        build = (long_names, many_attributes)[number % 2]
        data = bytearray(built(folder, lambda f, b=build: b(f, folder), **given))
        with h5py.File(io.BytesIO(data), "r") as file:
            payload = [
                (file[name].id.get_offset(), file[name].id.get_storage_size())
                for name in ("w", "v")
            ]
        meta = [
            at
            for at in range(9, len(data))
            if not any(start <= at < start + n for start, n in payload)
            and (data[at] or draw.random() < 0.2)  # much of it is zeros
        ]
        for at in draw.sample(meta, draw.choice((1, 1, 2, 4))):
            data[at] ^= draw.randrange(1, 256)
        yield f"flip {number}", bytes(data)


def write_all(folder, names):
    """Write cases, and the files that they want to read. Return names by file."""
    (folder / "secret").write_bytes(SECRET)
    with h5py.File(folder / "secret.h5", "w") as file:
        file["secret"] = np.frombuffer(SECRET, np.uint8)
    files = {}
    for number, name in enumerate(names):
        data = CASES[name](folder)
        files[f"{number}.hostile"] = name
        (folder / f"{number}.hostile").write_bytes(data)
    return files


def load_each(paths):
    """Load each file; print what came of it, and keep what was loaded."""
    import mpisave
    from mpisave.errors import FileFormatError

    opened = []
    sys.addaudithook(
        lambda event, args: opened.append(str(args[0])) if event == "open" else None
    )
    for path in paths:
        opened.clear()
        began = time.monotonic()
        try:
            state = mpisave.load(path)
        except FileFormatError as exc:
            outcome = str(exc)
        else:
            outcome = None
            # Before protocol 5, NumPy gives swapped byte order back in the machine's.
            path.with_suffix(".loaded").write_bytes(pickle.dumps(state, protocol=5))
        seconds = time.monotonic() - began
        kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        # Not getrusage: that counts what this process was before it became Python.
        status = Path("/proc/self/status").read_text()
        own = int(status.split("VmHWM:")[1].split()[0])
        mine = {
            "/dev/null",
            "/proc/self/status",
            str(path),
            str(path.with_suffix(".loaded")),
        }
        line = {
            "file": path.name,
            "refused": outcome,
            "seconds": seconds,
            "most_kib_of_children": kib,
            "most_kib": own,
            "nbytes": path.stat().st_size,
            "others": [n for n in opened if n not in mine and not n.isdigit()],
        }
        print(json.dumps(line), flush=True)


def read_by_h5py(path):
    """Return the state of a file as stock h5py reads it."""

    def state_of(group):
        return {
            name: state_of(item)
            if isinstance(item, h5py.Group)
            else np.asarray(item[()])
            for name, item in group.items()
        }

    with h5py.File(path, "r") as file:
        return state_of(file)


def compare_each(paths):
    """Print whether h5py reads each file as it was loaded."""
    for path in paths:
        state = pickle.loads(path.with_suffix(".loaded").read_bytes())
        try:
            same = equal(state, read_by_h5py(path))
        except Exception as exc:
            same = f"h5py: {exc!r}"
        print(json.dumps({"file": path.name, "same": same}), flush=True)


def equal(state, other):
    if isinstance(state, dict):
        return (
            isinstance(other, dict)
            and state.keys() == other.keys()
            and all(equal(state[key], other[key]) for key in state)
        )
    return (
        isinstance(other, np.ndarray)
        and (state.dtype, state.shape) == (other.dtype, other.shape)
        and state.tobytes() == other.tobytes()
    )


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    todo = (Path(line.rstrip("\n")) for line in sys.stdin)
    {"load": load_each, "compare": compare_each}[sys.argv[1]](todo)
