"""What the names that pickles of arrays call mean here. Each checks what it is given.

None of them is looked up: NumPy's own would make objects that crash when they are used,
and take what a file says for a size.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mpisave.dtypes import dtype_from_name, is_ml_dtype, savable
from mpisave.errors import FileFormatError
from mpisave.formats.opcodes import Payload

if TYPE_CHECKING:
    from collections.abc import Callable

_SCALAR_KEYS = (str, int, float, bool, bytes, type(None))
_NUMBER_KEYS = (int, float)
_COMPARED_NBYTES = 32  # in about the time of a step
# Tables have more places than keys: of numbers below so many times their number, no
# more than so many begin to look for a place at the same one.
_CROWD = 16
_MOST_DIMENSIONS = 64  # NumPy 2's limit; NumPy 1 refuses more than 32 itself
_PLAIN_CODE = re.compile(r"[biufc][0-9]{1,2}")
# Dtypes that pickles name by their class, as ml_dtypes pickles them. int4 and the like
# are in a byte each.
_ML_NAME = re.compile(r"(bfloat16|float[468]_e[0-9]m[0-9][a-z0-9]*|u?int[24])")


@dataclass(frozen=True, slots=True)
class Global:
    """A name that a file gave. Never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{_shown(self.module)}.{_shown(self.name)}"


def _shown(text: str) -> str:
    """Return a part of a name so that nothing in it looks like something else."""
    escaped = text.encode("unicode_escape", "backslashreplace").decode("ascii")
    return escaped if len(escaped) <= 100 else f"{escaped[:100]}..."


@dataclass(eq=False, slots=True)
class NewDtype:
    """A dtype being made."""

    dtype: np.dtype[Any]


@dataclass(eq=False, slots=True)
class NewArray:
    """An array that waits for its state."""

    memo: list[int] = field(default_factory=list)  # where the memo has it


def of(kind: type, value: Any) -> Any:
    """Return `value` if it is exactly of a kind."""
    if type(value) is not kind:
        raise FileFormatError(
            f"a {type(value).__name__} stands where a {kind.__name__} should"
        )
    return value


def one_of(legal: tuple[Any, ...], value: Any, what: str) -> Any:
    """Return `value` if it is one of some, and of the same type."""
    # The type first: comparing what a file made may take for ever, or give an array.
    for one in legal:
        if type(value) is type(one) and value == one:
            return value
    kind = type(value).__name__
    shown = f"{value!r:.40}" if kind in ("str", "bytes") else f"a {kind}"
    if kind == "int" and -(2**63) <= value < 2**63:
        shown = str(value)
    raise FileFormatError(f"{what} is {shown}, which is refused")


def hashable(key: Any) -> Any:
    """Return what may be a key: scalars, since tuples may take for ever to hash."""
    if type(key) is Payload and key.kind is bytes:
        return key.value()
    if type(key) not in _SCALAR_KEYS:
        raise FileFormatError(f"a {type(key).__name__} is a key, which is refused")
    if type(key) is int and not -(2**63) <= key < 2**64:
        # Numbers beyond hash to the same as others: a dict of them takes for ever.
        raise FileFormatError("a key is an int of more than 64 bits, which is refused")
    return key


def hard_to_hash(keys: list[Any], held: int, last: Any) -> int:
    """Return how many steps at most it takes to add `keys` to `held` others.

    Texts and bytes are hashed with a secret, but compared with those that are equal.
    Hashes of numbers can be made to meet, unless each is the one after the `last`, as
    in lists that became dicts, or they are so small that few of them share a place, as
    those of tokens.
    """
    steps = 0
    for number, key in enumerate(keys):
        kind = type(key)
        if kind is str or kind is bytes:
            steps += len(key) // _COMPARED_NBYTES
        elif kind is int and 0 <= key < _CROWD * (held + number):
            steps += _CROWD
        elif kind in _NUMBER_KEYS and not (
            kind is int and type(last) is int and key == last + 1
        ):
            steps += held + number
        last = key
    return steps


def array_of_state(state: tuple[Any, ...]) -> np.ndarray[Any, Any]:
    """Return the array that NumPy's ``__setstate__`` would make of `state`."""
    version, shape, dtype, is_fortran, data = state
    one_of((1,), version, "the version of an array's state")
    order = "F" if one_of((False, True, 0, 1), is_fortran, "is_fortran") else "C"
    array: np.ndarray[Any, Any] = _array(shape, dtype, data, order)
    # As NumPy does: bytes become an array in the machine's own order.
    if array.dtype.isnative:
        return array
    return array.astype(array.dtype.newbyteorder("="))


def _array(shape: Any, dtype: Any, data: Any, order: Any) -> np.ndarray[Any, Any]:
    if type(data) not in (bytes, bytearray, Payload):
        raise FileFormatError(f"an array's bytes are a {type(data).__name__}")
    kind = of(NewDtype, dtype).dtype
    one_of(("C", "F"), order, "the order of an array")
    if len(of(tuple, shape)) > _MOST_DIMENSIONS:
        raise FileFormatError(f"an array of {len(shape)} dimensions is refused")
    dimensions = tuple(of(int, n) for n in shape)
    if not all(0 <= n < 2**63 for n in dimensions):
        raise FileFormatError("an array's shape has a negative or too large number")
    if math.prod(dimensions) * kind.itemsize != len(data):
        raise FileFormatError(
            f"an array of shape {dimensions} and dtype {kind} has {len(data)} bytes"
        )
    if not len(data):
        return np.empty(dimensions, kind, order=order)
    flat = np.empty(len(data), np.uint8)  # the caller may write to what was loaded
    if type(data) is Payload:
        data.read_into(flat)
    else:
        flat[:] = np.frombuffer(data, np.uint8)
    array: np.ndarray[Any, Any] = flat.view(kind).reshape(dimensions, order=order)
    return array


def dtype_with_state(dtype: np.dtype[Any], state: tuple[Any, ...]) -> np.dtype[Any]:
    """Return the dtype that NumPy's ``__setstate__`` would make of `state`."""
    kinds = tuple(type(item) for item in state)
    none = type(None)
    if kinds not in (
        (int, str, none, none, none, int, int, int),
        (int, str, none, none, none, int, int, int, none),
    ):
        raise FileFormatError("a dtype's state with fields, or of others, is refused")
    version, order, *_, itemsize, alignment, flags = state[:8]
    one_of((3, 4), version, "the version of a dtype's state")
    one_of(("<", ">", "|", "="), order, "a byte order")
    if is_ml_dtype(dtype):
        # One of ml_dtypes says what it has; none is in swapped order.
        if order == ">" or itemsize != dtype.itemsize:
            raise FileFormatError(f"a {dtype} of another size or order is refused")
        return dtype
    if (itemsize, alignment, flags) != (-1, -1, 0):
        raise FileFormatError(f"a {dtype} with a size or flags of its own is refused")
    # By its name, a dtype in the machine's order is the ordinary one.
    return dtype if order == "|" else np.dtype(dtype.newbyteorder(order).str)


def _new_array(kind: Any, shape: Any, code: Any) -> NewArray:
    if of(Global, kind) != Global("numpy", "ndarray"):
        raise FileFormatError(f"an array of the kind {kind} is refused")
    if len(of(tuple, shape)) != 1:
        raise FileFormatError("a new array has a first shape, which is refused")
    one_of((0,), shape[0], "the length of a new array")
    one_of((b"b", "b"), code, "the type code of a new array")
    return NewArray()


def _new_dtype(code: Any, align: Any = False, copy: Any = False) -> NewDtype:  # noqa: FBT002
    one_of((False, 0), align, "align of a dtype")
    one_of((False, True, 0, 1), copy, "copy of a dtype")
    if type(code) is Global and code.module == "ml_dtypes":
        return NewDtype(dtype_from_name(code.name))
    if type(code) is not str or not _PLAIN_CODE.fullmatch(code):
        shown = f"{code!r:.40}" if type(code) is str else f"of a {type(code).__name__}"
        raise FileFormatError(
            f"a dtype {shown} is refused: arrays hold booleans and numbers, no "
            f"objects, strings or records"
        )
    return NewDtype(savable(np.dtype(code)))


def _scalar(dtype: Any, data: Any) -> Any:
    return _array((), dtype, of(bytes, data), "C")[()]


def _frombuffer(
    data: Any, dtype: Any, shape: Any, order: Any, axis_order: Any = None
) -> Any:
    if axis_order is None:
        return _array(shape, dtype, data, order)
    one_of(("K",), order, "the order of an array with an order of its axes")
    axes = tuple(of(int, axis) for axis in of(tuple, axis_order))
    if sorted(axes) != list(range(len(of(tuple, shape)))):
        raise FileFormatError("an array's order of axes names others than it has")
    return _array(shape, dtype, data, "C").transpose(axes)


def _ndarray(shape: Any, dtype: Any, data: Any) -> Any:
    return _array(shape, dtype, data, "C")


def _encode(text: Any, encoding: Any) -> bytes:
    one_of(("latin1", "latin-1"), encoding, "the encoding of bytes")
    return bytes(of(str, text).encode("latin-1"))


def _complex(real: Any, imaginary: Any) -> complex:
    return complex(of(float, real), of(float, imaginary))


def _bytearray(data: Any = b"") -> bytearray:
    if type(data) is Payload:
        data = data.value()
    return bytearray(of(bytes, data))


def _bytes() -> bytes:
    return b""


def _tuple(items: Any) -> Any:
    # What paddle.save makes of a parameter: tuple(((name, array),)).
    return of(tuple, items)


def _set(items: Any = ()) -> set[Any]:
    if type(items) not in (list, tuple):
        raise FileFormatError(f"a set of a {type(items).__name__} is refused")
    return set(map(hashable, items))


def _frozenset(items: Any = ()) -> frozenset[Any]:
    return frozenset(_set(items))


def _ordered_dict() -> dict[Any, Any]:
    return {}


# What a name means here, when a pickle calls it. By module and name: joined, one could
# stand for another.
_CALLED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _new_dtype,
    ("numpy", "ndarray"): _ndarray,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): _ordered_dict,
}
for _module in ("numpy.core", "numpy._core"):
    _CALLED[f"{_module}.multiarray", "_reconstruct"] = _new_array
    _CALLED[f"{_module}.multiarray", "scalar"] = _scalar
    _CALLED[f"{_module}.numeric", "_frombuffer"] = _frombuffer
for _module in ("builtins", "__builtin__"):
    _CALLED[_module, "complex"] = _complex
    _CALLED[_module, "bytearray"] = _bytearray
    _CALLED[_module, "bytes"] = _bytes
    _CALLED[_module, "tuple"] = _tuple
    _CALLED[_module, "set"] = _set
    _CALLED[_module, "frozenset"] = _frozenset


def meaning(name: Global) -> Callable[..., Any] | None:
    """Return what a call of `name` does, or None."""
    return _CALLED.get((name.module, name.name))


def is_known(name: Global) -> bool:
    """Return whether `name` may stand on the stack at all."""
    if name.module == "ml_dtypes":
        return _ML_NAME.fullmatch(name.name) is not None
    return meaning(name) is not None
