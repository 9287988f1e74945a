"""A small interpreter of the pickles of arrays, plain containers and scalars.

It imports nothing and calls nothing that a file names. A global is a name on the stack;
the few that pickles of NumPy need have a meaning here, given by code of this module
that checks every type and size; every other one is refused. Opcodes are parsed by
`pickletools`, of the standard library.

A half-made array or dtype never leaves the stack and the memo: what is stored into a
container is whole. Keys of dicts are scalars, since a tuple that holds itself many
times over takes for ever to hash.
"""

from __future__ import annotations

import math
import pickletools
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from mpisave.arrays import savable
from mpisave.errors import FileFormatError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpisave.storage import Source

_SCALAR_KEYS = (str, int, float, bool, bytes, type(None))

# Opcodes that push what they carry.
_PUSH = frozenset(
    {
        *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
        *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
        *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    }
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NEW: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


@dataclass(frozen=True, slots=True)
class _Global:
    """A name that a file gave. Never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class _Dtype:
    """A dtype being made."""

    dtype: np.dtype[Any]


@dataclass(eq=False, slots=True)
class _NewArray:
    """An array that waits for its state."""

    memo: list[int] = field(default_factory=list)  # where the memo has it


class _Reader:
    """The file as pickletools reads it: never more than there is."""

    def __init__(self, source: Source, start: int) -> None:
        self._source = source
        self._at = start

    def tell(self) -> int:
        return self._at

    def read(self, nbytes: int) -> bytes:
        data = self._source.read(self._at, nbytes)
        self._at += len(data)
        return data

    def readline(self) -> bytes:
        # Names of modules and classes: nothing legal is longer.
        data = self._source.read(self._at, 512)
        line = data[: data.find(b"\n") + 1]
        self._at += len(line)
        return line


def unpickle(source: Source) -> Any:
    """Return the state in a pickle that mpisave did not write.

    Raises
    ------
    FileFormatError
        If it is torn, or asks for anything but arrays, containers and scalars. The
        global or opcode is named, with its offset.
    """
    machine = _Machine(source.nbytes)
    reader = _Reader(source, 0)
    try:
        for opcode, argument, offset in pickletools.genops(reader):  # type: ignore[arg-type]
            if _step(machine, opcode.name, argument, offset or 0):
                return machine.result()
    except FileFormatError:
        raise
    except (ValueError, UnicodeError, OverflowError, MemoryError) as exc:
        raise FileFormatError(
            f"the pickle ends or is altered at byte {reader.tell()}: {exc}"
        ) from exc
    raise FileFormatError("the pickle has no end: it is torn")


def _step(machine: _Machine, name: str, argument: Any, offset: int) -> bool:
    """Carry out an opcode; return whether it was the last."""
    try:
        return machine.step(name, argument)
    except FileFormatError as exc:
        raise FileFormatError(f"{exc} (opcode {name} at byte {offset})") from exc
    except (TypeError, ValueError, IndexError, KeyError, AttributeError) as exc:
        raise FileFormatError(
            f"opcode {name} at byte {offset} makes no sense: {exc}"
        ) from exc


class _Machine:
    """The stack and the memo."""

    def __init__(self, nbytes: int) -> None:
        # Bytes that arrays may have: a reference to bytes costs the file next to none.
        self._left = nbytes
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._checked: dict[
            int, tuple[Any, ...]
        ] = {}  # by id; kept, so ids stay theirs

    def result(self) -> Any:
        if len(self._stack) != 1 or self._stack[0] is _MARK:
            raise FileFormatError(f"{len(self._stack)} values are left at the end")
        return self._plain(self._stack[0])

    def step(self, name: str, argument: Any) -> bool:
        """Carry out an opcode; return whether it was the last."""
        stack = self._stack
        if name in _PUSH:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _NEW:
            stack.append(_NEW[name]())
        elif name in _TUPLES:
            items = [self._pop() for _ in range(_TUPLES[name])]
            stack.append(tuple(items[::-1]))
        elif name == "BYTEARRAY8":
            stack.append(bytearray(argument))
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            number = len(self._memo) if name == "MEMOIZE" else argument
            self._memo[number] = top = self._top()
            if isinstance(top, _NewArray):
                top.memo.append(number)
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "STOP":
            return True
        elif name not in ("PROTO", "FRAME"):
            handler = getattr(self, f"_op_{name.lower()}", None)
            if handler is None:
                raise FileFormatError(f"the opcode {name} is refused")
            handler(argument)
        return False

    def _top(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise FileFormatError("the stack is empty")
        return self._stack[-1]

    def _take(self) -> Any:
        top = self._top()
        del self._stack[-1]
        return top

    def _pop(self) -> Any:
        """Return the top of the stack, to be stored."""
        value = self._take()
        # Arguments of REDUCE and BUILD travel in tuples: names and dtypes among them.
        if isinstance(value, _NewArray):
            raise FileFormatError("an array is used before it has its bytes")
        return value

    def _to_mark(self) -> list[Any]:
        items = []
        while self._stack and self._stack[-1] is not _MARK:
            items.append(self._pop())
        if not self._stack:
            raise FileFormatError("there is no mark")
        del self._stack[-1]
        return items[::-1]

    def _op_pop(self, _: object) -> None:
        if not self._stack:
            raise FileFormatError("the stack is empty")
        del self._stack[-1]

    def _op_pop_mark(self, _: object) -> None:
        self._to_mark()

    def _op_tuple(self, _: object) -> None:
        self._stack.append(tuple(self._to_mark()))

    def _op_list(self, _: object) -> None:
        self._stack.append([self._plain(item) for item in self._to_mark()])

    def _op_append(self, _: object) -> None:
        item = self._plain(self._pop())
        _of(list, self._top()).append(item)

    def _op_appends(self, _: object) -> None:
        items = [self._plain(item) for item in self._to_mark()]
        _of(list, self._top()).extend(items)

    def _op_dict(self, _: object) -> None:
        made: dict[Any, Any] = {}
        self._set_items(made, self._to_mark())
        self._stack.append(made)

    def _op_setitem(self, _: object) -> None:
        value, key = self._pop(), self._pop()
        self._set_items(_of(dict, self._top()), [key, value])

    def _op_setitems(self, _: object) -> None:
        items = self._to_mark()
        self._set_items(_of(dict, self._top()), items)

    def _op_additems(self, _: object) -> None:
        items = self._to_mark()
        _of(set, self._top()).update(map(_hashable, items))

    def _op_frozenset(self, _: object) -> None:
        self._stack.append(frozenset(map(_hashable, self._to_mark())))

    def _op_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._push_global(module, name)

    def _op_stack_global(self, _: object) -> None:
        name, module = self._pop(), self._pop()
        self._push_global(_of(str, module), _of(str, name))

    def _push_global(self, module: str, name: str) -> None:
        found = _Global(module, name)
        if str(found) not in _MEANING:
            raise FileFormatError(
                f"the pickle asks for {found}, which is refused: mpisave loads arrays, "
                f"plain containers and scalars, and runs nothing that a file names"
            )
        self._stack.append(found)

    def _op_reduce(self, _: object) -> None:
        arguments = _of(tuple, self._pop())
        function = _of(_Global, self._pop())
        meaning = _MEANING.get(str(function))
        if meaning is None:
            raise FileFormatError(f"{function} is called, which is refused")
        self._push_made(meaning(*arguments))

    def _push_made(self, made: Any) -> None:
        self._left -= getattr(made, "nbytes", 0)
        if self._left < 0:
            raise FileFormatError("the arrays have more bytes than the file")
        self._stack.append(made)

    def _op_build(self, _: object) -> None:
        state = _of(tuple, self._pop())
        made = self._take()
        if isinstance(made, _Dtype):
            made.dtype = _dtype_with_state(made.dtype, state)
            self._stack.append(made)
        elif isinstance(made, _NewArray):
            array = _array_of_state(*state)
            self._push_made(array)
            for number in made.memo:
                if self._memo[number] is made:
                    self._memo[number] = array
        else:
            raise FileFormatError(f"BUILD on a {type(made).__name__} is refused")

    def _set_items(self, made: dict[Any, Any], items: list[Any]) -> None:
        if len(items) % 2:
            raise FileFormatError("a key has no value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            made[_hashable(key)] = self._plain(value)

    def _plain(self, value: Any) -> Any:
        """Return `value` if it may be part of a state.

        A tuple may hold the arguments of a call; as part of a state, it may not.
        """
        pending = [value]
        while pending:
            item = pending.pop()
            if isinstance(item, _Global):
                raise FileFormatError(f"{item} is part of the state, which is refused")
            if isinstance(item, (_Dtype, _NewArray)):
                raise FileFormatError("a dtype, or an array without bytes, is a value")
            # Once each: a few bytes of references stand for 2**n tuples.
            if type(item) is tuple and id(item) not in self._checked:
                self._checked[id(item)] = item
                pending.extend(item)
        return value


def _of(kind: type, value: Any) -> Any:
    """Return `value` if it is exactly of a kind."""
    if type(value) is not kind:
        raise FileFormatError(
            f"a {type(value).__name__.strip('_')} stands where a "
            f"{kind.__name__.strip('_')} should"
        )
    return value


def _hashable(key: Any) -> Any:
    if not isinstance(key, _SCALAR_KEYS):
        raise FileFormatError(f"a {type(key).__name__} is a key, which is refused")
    return key


def _new_array(kind: Any, shape: Any, code: Any) -> _NewArray:
    if str(_of(_Global, kind)) != "numpy.ndarray" or shape != (0,):
        raise FileFormatError(f"an array of the kind {kind} is refused")
    if code not in (b"b", "b"):
        raise FileFormatError(f"an array of type code {code!r} is refused")
    return _NewArray()


def _array_of_state(
    version: Any, shape: Any, dtype: Any, is_fortran: Any, data: Any
) -> np.ndarray[Any, Any]:
    if version != 1:
        raise FileFormatError(f"an array's state of version {version!r} is refused")
    array = _array(shape, dtype, data, "F" if _of(bool, is_fortran) else "C")
    # As NumPy does: bytes become an array in the machine's own order.
    return (
        array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    )


def _array(shape: Any, dtype: Any, data: Any, order: Any) -> np.ndarray[Any, Any]:
    if type(data) not in (bytes, bytearray):
        raise FileFormatError(f"an array's bytes are a {type(data).__name__}")
    kind = _of(_Dtype, dtype).dtype
    dimensions = tuple(_of(int, n) for n in _of(tuple, shape))
    if len(dimensions) > _MOST_DIMENSIONS or min(dimensions, default=0) < 0:
        raise FileFormatError(f"an array of shape {dimensions} is refused")
    if math.prod(dimensions) * kind.itemsize != len(data):
        raise FileFormatError(
            f"an array of shape {dimensions} and dtype {kind} has {len(data)} bytes"
        )
    if order not in ("C", "F"):
        raise FileFormatError(f"an array of order {order!r} is refused")
    if not data:
        return np.empty(dimensions, kind, order=order)
    flat = np.frombuffer(data, kind)
    if type(data) is bytes:
        flat = flat.copy()  # the caller may write to what was loaded
    return flat.reshape(dimensions, order=order)


_MOST_DIMENSIONS = 32


def _new_dtype(code: Any, *_flags: Any) -> _Dtype:
    if type(code) is not str or not re.fullmatch(r"[biufc][0-9]{1,2}", code):
        raise FileFormatError(
            f"a dtype {code!r:.40} is refused: arrays hold booleans and numbers, no "
            f"objects, strings or records"
        )
    return _Dtype(savable(np.dtype(code)))


def _dtype_with_state(dtype: np.dtype[Any], state: tuple[Any, ...]) -> np.dtype[Any]:
    order = state[1]
    plain = (None, None, None, -1, -1, 0)
    if state[0] != 3 or order not in ("<", ">", "|", "=") or state[2:8] != plain:
        raise FileFormatError(f"a dtype with the state {state!r:.80} is refused")
    # By its name, a dtype in the machine's order is the ordinary one.
    return dtype if order == "|" else np.dtype(dtype.newbyteorder(order).str)


def _scalar(dtype: Any, data: Any) -> Any:
    return _array((), dtype, _of(bytes, data), "C")[()]


def _frombuffer(
    data: Any, dtype: Any, shape: Any, order: Any, axis_order: Any = None
) -> Any:
    if order != "K" or axis_order is None:
        return _array(shape, dtype, data, order)
    axes = tuple(_of(int, axis) for axis in _of(tuple, axis_order))
    return _array(shape, dtype, data, "C").transpose(axes)


def _ndarray(shape: Any, dtype: Any, data: Any) -> Any:
    return _array(shape, dtype, data, "C")


def _encode(text: Any, encoding: Any) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise FileFormatError(f"bytes in the encoding {encoding!r} are refused")
    return bytes(_of(str, text).encode("latin-1"))


def _complex(real: Any, imaginary: Any) -> complex:
    return complex(_of(float, real), _of(float, imaginary))


def _bytearray(data: Any = b"") -> bytearray:
    return bytearray(_of(bytes, data))


def _bytes() -> bytes:
    return b""


def _set(items: Any = ()) -> set[Any]:
    if type(items) not in (list, tuple):
        _refuse_set(items)
    return set(map(_hashable, items))


def _refuse_set(items: Any) -> NoReturn:
    raise FileFormatError(f"a set of a {type(items).__name__} is refused")


def _frozenset(items: Any = ()) -> frozenset[Any]:
    return frozenset(_set(items))


def _ordered_dict() -> dict[Any, Any]:
    return {}


_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
_BUILTINS = ("builtins", "__builtin__")

# What a name means here, when a pickle calls it.
_MEANING: dict[str, Callable[..., Any]] = {
    "numpy.dtype": _new_dtype,
    "numpy.ndarray": _ndarray,
    "_codecs.encode": _encode,
    "collections.OrderedDict": _ordered_dict,
    **{f"{module}._reconstruct": _new_array for module in _MULTIARRAY},
    **{f"{module}.scalar": _scalar for module in _MULTIARRAY},
    **{f"{module}._frombuffer": _frombuffer for module in _NUMERIC},
    **{f"{module}.complex": _complex for module in _BUILTINS},
    **{f"{module}.bytearray": _bytearray for module in _BUILTINS},
    **{f"{module}.bytes": _bytes for module in _BUILTINS},
    **{f"{module}.set": _set for module in _BUILTINS},
    **{f"{module}.frozenset": _frozenset for module in _BUILTINS},
}
