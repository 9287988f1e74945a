"""A small interpreter of the pickles of arrays, plain containers and scalars.

It imports nothing and calls nothing that a file names. A global is a name on the stack;
the few that pickles of NumPy need have a meaning in `rebuilding`; every other one is
refused. A refusal names the opcode and its offset, and there is no other way in.

A half-made array or dtype never leaves the stack and the memo: what is stored into a
container is whole. Time and memory are bounded by the file's size: each opcode takes as
much as it is long, or has a budget.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from mpisave.errors import FileFormatError
from mpisave.formats.opcodes import Payload, opcodes
from mpisave.formats.rebuilding import (
    Global,
    NewArray,
    NewDtype,
    array_of_state,
    dtype_with_state,
    hard_to_hash,
    hashable,
    is_known,
    meaning,
    of,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpisave.storage import Source

# Opcodes that push what they carry.
_PUSH = frozenset(
    {
        *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
        *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        # Of protocol 0.
        *("INT", "LONG", "FLOAT", "UNICODE"),
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
_PUT = ("BINPUT", "LONG_BINPUT", "PUT")
_GET = ("BINGET", "LONG_BINGET", "GET")
_MARK = object()
# What calls with wrong arguments raise, and sizes that nobody has memory for.
_NO_SENSE = (
    *(TypeError, ValueError, LookupError, AttributeError, OverflowError, MemoryError),
)
# Steps that hash tables of numbers may take: a second or two for 23,000 numbers that
# were made to meet, no limit for those that follow one another.
_STEPS, _STEPS_A_BYTE = 2**28, 64


def unpickle(source: Source) -> Any:
    """Return the state in a pickle that mpisave did not write.

    Raises
    ------
    FileFormatError
        If it is torn, or asks for anything but arrays, containers and scalars. The
        global or opcode is named, with its offset.
    """
    machine = _Machine(source.nbytes)
    for name, argument, offset in opcodes(source):
        _step(machine, name, argument, offset)
    return machine.result


def _step(machine: _Machine, name: str, argument: Any, offset: int) -> None:
    try:
        machine.step(name, argument)
    except FileFormatError as exc:
        raise FileFormatError(f"{exc} (opcode {name} at byte {offset})") from exc
    except _NO_SENSE as exc:
        raise FileFormatError(
            f"opcode {name} at byte {offset} makes no sense: {exc!s:.200}"
        ) from exc


class _Machine:
    """The stack and the memo."""

    result: Any = None

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        # Bytes and items that each function was given so far: a reference to bytes
        # costs the file next to none, what is made of them memory.
        self._given: Counter[str] = Counter()
        self._steps = _STEPS + _STEPS_A_BYTE * nbytes
        self._last_set: tuple[Any, Any] = (None, None)  # and what was added to it last
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        # What tuples are as part of a state, by their id; those that are something else
        # there are kept, so that their id stays their own.
        self._plain_tuples: dict[int, tuple[Any, ...]] = {}
        self._replaced: list[tuple[Any, ...]] = []

    def step(self, name: str, argument: Any) -> None:
        """Carry out an opcode."""
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
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _PUT or name == "MEMOIZE":
            self._put(len(self._memo) if name == "MEMOIZE" else argument)
        elif name in _GET:
            if argument not in self._memo:
                raise FileFormatError(f"the memo has no {argument}")
            stack.append(self._memo[argument])
        elif name not in ("PROTO", "FRAME"):
            handler = getattr(self, f"_op_{name.lower()}", None)
            if handler is None:
                raise FileFormatError(f"the opcode {name} is refused")
            handler(argument)

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
        if isinstance(value, NewArray):
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

    def _put(self, number: int) -> None:
        if number < 0:
            raise FileFormatError("a place in the memo is negative")
        top = self._top()
        self._memo[number] = top
        if isinstance(top, NewArray):
            top.memo.append(number)

    def _op_stop(self, _: object) -> None:
        if len(self._stack) != 1 or self._stack[0] is _MARK:
            raise FileFormatError(f"{len(self._stack)} values are left at the end")
        self.result = self._plain(self._stack[0])

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
        of(list, self._top()).append(item)

    def _op_appends(self, _: object) -> None:
        items = [self._plain(item) for item in self._to_mark()]
        of(list, self._top()).extend(items)

    def _op_dict(self, _: object) -> None:
        made: dict[Any, Any] = {}
        self._set_items(made, self._to_mark())
        self._stack.append(made)

    def _op_setitem(self, _: object) -> None:
        value, key = self._pop(), self._pop()
        self._set_items(of(dict, self._top()), [key, value])

    def _op_setitems(self, _: object) -> None:
        items = self._to_mark()
        self._set_items(of(dict, self._top()), items)

    def _op_additems(self, _: object) -> None:
        items = self._to_mark()
        made = of(set, self._top())
        made.update(self._keys(items, made))

    def _op_frozenset(self, _: object) -> None:
        self._stack.append(frozenset(self._keys(self._to_mark(), ())))

    def _op_global(self, argument: tuple[str, str]) -> None:
        self._push_global(*argument)

    def _op_stack_global(self, _: object) -> None:
        name, module = self._pop(), self._pop()
        self._push_global(of(str, module), of(str, name))

    def _push_global(self, module: str, name: str) -> None:
        found = Global(module, name)
        if not is_known(found):
            raise FileFormatError(
                f"the pickle asks for {found}, which is refused: mpisave loads arrays, "
                f"plain containers and scalars, and runs nothing that a file names. "
                f"Only if you trust whoever wrote it: allow_pickle=True gives it to "
                f"pickle.load, which executes whatever it says"
            )
        self._stack.append(found)

    def _op_reduce(self, _: object) -> None:
        arguments = of(tuple, self._pop())
        name = of(Global, self._pop())
        function = meaning(name)
        if function is None:
            raise FileFormatError(f"{name} is called, which is refused")
        self._spend(name.name, arguments)
        if name.name in ("set", "frozenset") and arguments:
            self._keys(list(arguments[0]), ())
        self._stack.append(function(*arguments))

    def _op_build(self, _: object) -> None:
        state = of(tuple, self._pop())
        made = self._take()
        if isinstance(made, NewDtype):
            made.dtype = dtype_with_state(made.dtype, state)
            self._stack.append(made)
        elif isinstance(made, NewArray):
            self._spend("BUILD", state)
            array = array_of_state(state)
            self._stack.append(array)
            for number in made.memo:
                if self._memo[number] is made:
                    self._memo[number] = array
        else:
            raise FileFormatError(f"BUILD on a {type(made).__name__} is refused")

    def _spend(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Refuse to make more of what is in the file than there is."""
        sized = (str, bytes, bytearray, Payload, list, tuple)
        lengths = [len(a) for a in arguments if type(a) in sized]
        self._given[name] += max(lengths, default=0)
        if self._given[name] > self._nbytes:
            raise FileFormatError(
                f"what calls of {name} make is larger than the file: its parts are "
                f"used over and over"
            )

    def _set_items(self, made: dict[Any, Any], items: list[Any]) -> None:
        if len(items) % 2:
            raise FileFormatError("a key has no value")
        keys = self._keys(items[::2], made)
        for key, value in zip(keys, items[1::2], strict=True):
            made[key] = self._plain(value)

    def _keys(self, items: list[Any], made: Any) -> list[Any]:
        """Return what is to be added to a dict or set, if that takes no time."""
        keys = [hashable(item) for item in items]
        last = next(reversed(made), None) if type(made) is dict else None
        if type(made) is set and made is self._last_set[0]:
            last = self._last_set[1]
        self._steps -= hard_to_hash(keys, len(made), last)
        if self._steps < 0:
            raise FileFormatError(
                "too many keys are numbers without order: they can be made such that "
                "a dict of them takes for ever"
            )
        if type(made) is set and keys:
            self._last_set = made, keys[-1]
        return keys

    def _plain(self, value: Any) -> Any:
        """Return what `value` is as part of a state.

        A tuple may hold the arguments of a call; as part of a state, it may not. Once
        each: a few bytes of references stand for 2**n tuples.
        """
        if type(value) is not tuple:
            return _plain_leaf(value)
        done, pending = self._plain_tuples, [value]
        while pending:
            item = pending[-1]
            inner = [i for i in item if type(i) is tuple and id(i) not in done]
            if inner and id(item) not in done:
                pending.extend(inner)
                continue
            pending.pop()
            if id(item) not in done:
                parts = tuple(
                    done[id(i)] if type(i) is tuple else _plain_leaf(i) for i in item
                )
                if all(a is b for a, b in zip(parts, item, strict=True)):
                    done[id(item)] = item
                else:
                    done[id(item)] = parts
                    self._replaced.append(item)
        return done[id(value)]


def _plain_leaf(value: Any) -> Any:
    if isinstance(value, Global):
        raise FileFormatError(f"{value} is part of the state, which is refused")
    if isinstance(value, (NewDtype, NewArray)):
        raise FileFormatError("a dtype, or an array without bytes, is a value")
    return value.value() if isinstance(value, Payload) else value
