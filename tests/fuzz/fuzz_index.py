"""Coverage-guided fuzzing of what finds and decodes an index. See README.md.

What libFuzzer makes is the JSON of an index, a trailer, or a whole file; the first byte
says which. Around JSON goes a right trailer: no mutation guesses a CRC-32C.
"""

import io
import json
import random
import struct
import sys

import atheris

with atheris.instrument_imports(include=["mpisave"]):
    from mpisave.checksum import crc32c
    from mpisave.errors import FileFormatError
    from mpisave.finding import find_index
    from mpisave.formats import index
    from mpisave.source import Source

_FIELDS = struct.Struct("<QQI")


def with_trailer(text, container_nbytes):
    fields = _FIELDS.pack(container_nbytes, len(text), index.VERSION)
    own = crc32c(fields, crc32c(text))
    return text + fields + struct.pack("<I", own) + index.MAGIC


def read(data):
    """Do what load does with a file before it reads payload."""
    with Source(io.BytesIO(data)) as source:
        head = find_index(source)
    if head is not None and head[1] != index.FOREIGN:
        decoded = index.decode(*head)
        # What was accepted can be used: unique keys, extents within the file.
        arrays = decoded.arrays()
        for stored in arrays.values():
            if not 0 <= stored.extent.offset <= stored.extent.stop <= decoded.nbytes:
                raise AssertionError(stored)


def test_one_input(data):
    kind, rest = data[:1], data[1:]
    head = b"\x80\x04.\0" if kind != b"h" else b"\x89HDF\r\n\x1a\n"
    if kind in (b"j", b"h"):
        container = head.ljust(4096, b"\0")
        rest = container + with_trailer(rest, len(container))
    elif kind == b"t":
        rest = head + rest[:-8] + index.MAGIC
    try:
        read(rest)
    except FileFormatError:
        pass
    except ImportError as exc:
        if "ml_dtypes" not in str(exc):
            raise


ODD = (
    *(None, True, 0, 1, -1, 2**31, 2**63, 2**64, 10**25, 1.5, "", "x", [], {}, [[]]),
    *("<f4", ">c8", "<f16", "|b1", "bfloat16", "generic", "<i2,i2", "(2,)<f4", "|O"),
    *({"str": "ff"}, {"int": "0x1"}, {"float": "inf"}, {"complex": [1, 2]}),
    *({"bytes": "AA=="}, {"scalar": ["<f4", "00000000"]}, [["a"], "dict", None]),
    *([[0], "object", 1], [["r"], "per_rank", 2], [[], "opaque", "set"], "array"),
)


def slots(value, found):
    """Collect each place in decoded JSON, as (container, key)."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        found.append((value, key))
        if isinstance(item, (dict, list)):
            slots(item, found)
    return found


def mutate_json(content, dice):
    """Change a value, or copy, drop or move one."""
    for _ in range(dice.choice((1, 1, 2, 4))):
        found = slots(content, [])
        if not found:
            return
        (place, key), (other, where) = dice.choice(found), dice.choice(found)
        action = dice.randrange(5)
        if action == 0:
            place[key] = dice.choice(ODD)
        elif action == 1 and isinstance(place, list):
            place.insert(key, json.loads(json.dumps(other[where])))
        elif action == 2:
            del place[key]
        elif action == 3:
            place[key] = json.loads(json.dumps(other[where]))
        elif type(place[key]) is int:
            place[key] += dice.choice((-1, 1, 8, -8, 4096))


def mutate(data, longest, seed):
    """Mutate JSON as JSON, three times in four; else as bytes."""
    dice = random.Random(seed)
    if data[:1] in (b"j", b"h") and dice.randrange(4):
        try:
            content = json.loads(data[1:])
            mutate_json(content, dice)
            changed = data[:1] + json.dumps(content, separators=(",", ":")).encode()
        except (ValueError, TypeError, RecursionError):
            return atheris.Mutate(data, longest)
        if len(changed) <= longest:
            return changed
    return atheris.Mutate(data, longest)


if __name__ == "__main__":
    atheris.Setup(sys.argv, test_one_input, custom_mutator=mutate)
    atheris.Fuzz()
