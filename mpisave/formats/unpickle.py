"""A small interpreter of the pickles of arrays, plain containers and scalars.

It imports nothing and calls nothing that a file names. A global is a name on the stack;
the few that pickles of NumPy need have a meaning in `rebuilding`; every other one is
refused. A refusal names the opcode and its offset, and there is no other way in.

A half-made array or dtype never leaves the stack and the memo: what is stored into a
container is whole. Time and memory are bounded by the file's size: each opcode takes as
much as it is long, or has a budget; memory is counted, object by object.
"""

from __future__ import annotations

import pickletools
from sys import getsizeof
from typing import TYPE_CHECKING, Any

import numpy as np

from mpisave.errors import FileFormatError
from mpisave.formats.budget import ARRAY, RECORD, SLOT, Budget
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

    from mpisave.source import Source

# Opcodes that push what they carry.
_PUSH = frozenset(
    {
        *("BININT", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
        *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        # Of protocol 0.
        *("INT", "LONG", "FLOAT", "UNICODE"),
    }
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_NEW: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_SET": set,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUT = ("BINPUT", "LONG_BINPUT", "PUT")
_GET = ("BINGET", "LONG_BINGET", "GET")
_MARK = object()
# Arguments of REDUCE and BUILD travel in tuples: names and dtypes may be in one.
_HALF_MADE = "an array is used before it has its bytes"
# What calls with wrong arguments raise, and sizes that nobody has memory for.
_NO_SENSE = (
    *(TypeError, ValueError, LookupError, AttributeError, OverflowError, MemoryError),
)


def unpickle(source: Source) -> Any:
    """Return the state in a pickle that mpisave did not write.

    Raises
    ------
    FileFormatError
        If it is torn, asks for anything but arrays, containers and scalars, or makes
        more of them than a file of its size may. The global or opcode is named, with
        its offset.
    """
    machine = _Machine(source.nbytes)
    for name, argument, offset in opcodes(source):
        handler = _HANDLERS.get(name)
        if handler is None:
            raise FileFormatError(f"the opcode {name} at byte {offset} is refused")
        try:
            handler(machine, argument)
        except FileFormatError as exc:
            raise FileFormatError(f"{exc} (opcode {name} at byte {offset})") from exc
        except _NO_SENSE as exc:
            raise FileFormatError(
                f"opcode {name} at byte {offset} makes no sense: {exc!s:.200}"
            ) from exc
    return machine.result


class _Machine:
    """The stack and the memo."""

    result: Any = None

    def __init__(self, nbytes: int) -> None:
        self._budget = Budget(nbytes)
        self._last_set: tuple[Any, Any] = (None, None)  # and what was added to it last
        self._stack: list[Any] = []
        # Places of the memo are numbered as they are filled. If not, those beyond the
        # first that is empty are apart.
        self._memo: list[Any] = []
        self._far_memo: dict[int, Any] = {}
        # What tuples are as part of a state, by their id; those that are something else
        # there are kept, so that their id stays their own.
        self._plain_tuples: dict[int, tuple[Any, ...]] = {}
        self._replaced: list[tuple[Any, ...]] = []

    def push(self, value: Any) -> None:
        """Push what was made just now."""
        self._budget.take(SLOT + getsizeof(value))
        self._stack.append(value)

    def _push_made(self, value: Any) -> None:
        """Push what a function made, perhaps an array."""
        if isinstance(value, np.ndarray):
            # getsizeof does not see the bytes of an array that lie in another.
            self._budget.take(ARRAY + value.nbytes)
        self.push(value)

    def push_known(self, value: Any) -> None:
        """Push what was there already."""
        self._budget.take(SLOT)
        self._stack.append(value)

    def _top(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise FileFormatError("the stack is empty")
        return self._stack[-1]

    def _pop(self) -> Any:
        """Return the top of the stack, to be stored."""
        value = self._top()
        if type(value) is NewArray:
            raise FileFormatError(_HALF_MADE)
        del self._stack[-1]
        return value

    def _to_mark(self) -> list[Any]:
        stack = self._stack
        count = 0
        for value in reversed(stack):
            if value is _MARK:
                break
            if type(value) is NewArray:
                raise FileFormatError(_HALF_MADE)
            count += 1
        else:
            raise FileFormatError("there is no mark")
        items = stack[len(stack) - count :]
        del stack[-count - 1 :]
        return items

    def _place(self, number: int) -> list[Any] | dict[int, Any] | None:
        """Return what has a number of the memo, if anything."""
        if 0 <= number < len(self._memo):
            return self._memo
        return self._far_memo if number in self._far_memo else None

    def get(self, number: int) -> None:
        place = self._place(number)
        if place is None:
            raise FileFormatError(f"the memo has no {number}")
        self.push_known(place[number])

    def put(self, number: int) -> None:
        if number < 0:
            raise FileFormatError("a place in the memo is negative")
        top = self._top()
        self._budget.take(SLOT)
        if number == len(self._memo):
            self._memo.append(top)
            self._far_memo.pop(number, None)
        elif number < len(self._memo):
            self._memo[number] = top
        else:
            self._budget.take(RECORD)
            self._far_memo[number] = top
        if isinstance(top, NewArray):
            top.memo.append(number)

    def op_memoize(self, _: object) -> None:
        self.put(len(self._memo) + len(self._far_memo))

    def op_proto(self, _: object) -> None:
        pass

    op_frame = op_proto

    def op_mark(self, _: object) -> None:
        self.push_known(_MARK)

    def op_stop(self, _: object) -> None:
        if len(self._stack) != 1 or self._stack[0] is _MARK:
            raise FileFormatError(f"{len(self._stack)} values are left at the end")
        self.result = self._plain(self._stack[0])

    def op_pop(self, _: object) -> None:
        if not self._stack:
            raise FileFormatError("the stack is empty")
        del self._stack[-1]

    def op_pop_mark(self, _: object) -> None:
        self._to_mark()

    def push_tuple(self, count: int) -> None:
        """Make a tuple of as many values."""
        items = [self._pop() for _ in range(count)]
        self.push(tuple(items[::-1]))

    def op_tuple(self, _: object) -> None:
        self.push(tuple(self._to_mark()))

    def op_list(self, _: object) -> None:
        self.push([self._plain(item) for item in self._to_mark()])

    def op_append(self, _: object) -> None:
        item = self._plain(self._pop())
        made = of(list, self._top())
        self._budget.take_growth(made, made.append, item)

    def op_appends(self, _: object) -> None:
        items = map(self._plain, self._to_mark())
        made = of(list, self._top())
        self._budget.take_growth(made, made.extend, items)

    def op_dict(self, _: object) -> None:
        items = self._to_mark()
        self.push({})
        self._set_items(self._top(), items)

    def op_setitem(self, _: object) -> None:
        value, key = self._pop(), self._pop()
        self._set_items(of(dict, self._top()), [key, value])

    def op_setitems(self, _: object) -> None:
        items = self._to_mark()
        self._set_items(of(dict, self._top()), items)

    def op_additems(self, _: object) -> None:
        items = self._to_mark()
        made = of(set, self._top())
        self._budget.take_growth(made, made.update, self._keys(items, made))

    def op_frozenset(self, _: object) -> None:
        self.push(frozenset(self._keys(self._to_mark(), ())))

    def op_global(self, argument: tuple[str, str]) -> None:
        self._push_global(*argument)

    def op_stack_global(self, _: object) -> None:
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
        self.push(found)

    def op_reduce(self, _: object) -> None:
        arguments = of(tuple, self._pop())
        name = of(Global, self._pop())
        function = meaning(name)
        if function is None:
            raise FileFormatError(f"{name} is called, which is refused")
        self._budget.take_parts(name.name, arguments)
        if name.name in ("set", "frozenset") and arguments:
            self._keys(list(arguments[0]), ())
        self._push_made(function(*arguments))

    def op_build(self, _: object) -> None:
        state = of(tuple, self._pop())
        made = self._top()
        del self._stack[-1]
        if isinstance(made, NewDtype):
            made.dtype = dtype_with_state(made.dtype, state)
            self._stack.append(made)
        elif isinstance(made, NewArray):
            self._budget.take_parts("BUILD", state)
            array = array_of_state(state)
            self._push_made(array)
            for number in made.memo:
                place = self._place(number)
                if place is not None and place[number] is made:
                    place[number] = array
            made.memo.clear()  # copies on the stack may be built as well
        else:
            raise FileFormatError(f"BUILD on a {type(made).__name__} is refused")

    def _set_items(self, made: dict[Any, Any], items: list[Any]) -> None:
        if len(items) % 2:
            raise FileFormatError("a key has no value")
        keys, values = self._keys(items[::2], made), map(self._plain, items[1::2])
        self._budget.take_growth(made, made.update, zip(keys, values, strict=True))

    def _keys(self, items: list[Any], made: Any) -> list[Any]:
        """Return what is to be added to a dict or set, if that takes no time."""
        keys = [hashable(item) for item in items]
        last = next(reversed(made), None) if type(made) is dict else None
        if type(made) is set and made is self._last_set[0]:
            last = self._last_set[1]
        self._budget.take_steps(hard_to_hash(keys, len(made), last))
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
        if id(value) in done:
            return done[id(value)]
        while pending:
            item = pending[-1]
            # First: there may be many references to it, and many items in it.
            if id(item) in done:
                pending.pop()
                continue
            inner = {id(i): i for i in item if type(i) is tuple and id(i) not in done}
            if inner:
                pending.extend(inner.values())
                continue
            pending.pop()
            self._budget.take(RECORD)
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


def _handler(name: str) -> Callable[[_Machine, Any], None] | None:
    """Return what carries out an opcode, given its argument."""
    if name in _PUSH:
        return _Machine.push
    if name == "BININT1":
        return _Machine.push_known  # Python has these ints always
    if name in _CONSTANTS:
        constant = _CONSTANTS[name]
        return lambda machine, _: machine.push_known(constant)
    if name in _NEW:
        make = _NEW[name]
        return lambda machine, _: machine.push(make())
    if name in _TUPLES:
        count = _TUPLES[name]
        return lambda machine, _: machine.push_tuple(count)
    if name in _PUT:
        return _Machine.put
    if name in _GET:
        return _Machine.get
    return getattr(_Machine, f"op_{name.lower()}", None)


_HANDLERS = {opcode.name: _handler(opcode.name) for opcode in pickletools.opcodes}
