"""Coverage-guided fuzzing of the interpreter of pickles. See README.md.

What it accepts and stock pickle makes without any global has to be the same.
"""

import io
import pickle
import sys

import atheris

with atheris.instrument_imports(include=["mpisave"]):
    from mpisave.errors import FileFormatError
    from mpisave.formats.unpickle import unpickle
    from mpisave.source import Source

import numpy as np

PLAIN = (
    *(dict, list, tuple, set, frozenset, np.ndarray, np.generic),
    *(type(None), bool, int, float, complex, str, bytes, bytearray),
)
MOST_SHOWN = 10_000


class OracleStoppedError(Exception):
    """Stock pickle would call something: it is not asked."""


# The one in Python: the other takes gigabytes for the memo of a large number.
class Oracle(pickle._Unpickler):
    def find_class(self, module, name):
        raise OracleStoppedError


def parts(value):
    """Return a flat list of what a state is made of; each container once."""
    found, seen, pending = [], set(), [value]
    while pending and len(found) < MOST_SHOWN:
        item = pending.pop()
        assert isinstance(item, PLAIN), type(item)
        if isinstance(item, np.ndarray):
            assert not item.dtype.hasobject
        if not isinstance(item, (dict, list, tuple, set, frozenset)):
            found.append(f"{type(item).__name__} {item!r:.100}")
            continue
        found.append(f"{type(item).__name__} of {len(item)}")
        if id(item) not in seen:
            seen.add(id(item))
            pending.extend(item)
            pending.extend(item.values() if isinstance(item, dict) else ())
    return found


def test_one_input(data):
    try:
        with Source(io.BytesIO(data)) as source:
            found = unpickle(source)
    except FileFormatError as exc:
        if "byte" not in str(exc) or len(str(exc)) > 1000:
            raise AssertionError("it does not say where, or too much") from exc
        return
    except ImportError as exc:
        if "ml_dtypes" not in str(exc):
            raise
        return
    mine = parts(found)
    try:
        expected = Oracle(io.BytesIO(data)).load()
    except OracleStoppedError:
        return
    except pickle.UnpicklingError as exc:
        # C's loader knows no end of a frame either.
        if "frame" not in str(exc):
            raise
        return
    # Sets have no order of their own, and nan is not itself.
    if sorted(mine) != sorted(parts(expected)):
        raise AssertionError((mine[:20], parts(expected)[:20]))


if __name__ == "__main__":
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
