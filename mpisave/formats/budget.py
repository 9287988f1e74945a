"""What the interpreter of pickles may take of memory and time, by the file's size.

All is counted and nothing given back, so that no order of opcodes gets around it.
"""

from __future__ import annotations

from collections import Counter
from sys import getsizeof
from typing import TYPE_CHECKING, Any

from mpisave.errors import FileFormatError
from mpisave.formats.opcodes import Payload

if TYPE_CHECKING:
    from collections.abc import Callable

# Bytes of memory, and as many more for each byte of the file. By this count, what
# pickle.dump writes takes up to 85 a byte (tuples of None), and of empty sets 136;
# without a memo (pickletools.optimize), dicts that are empty take 96.
MEMORY, MEMORY_A_BYTE = 2**26, 96
# What is beside an object: a place on the stack, in the memo, or in what is cut off the
# stack, and what malloc adds; a place in a dict, with its key; the objects of an array.
SLOT, RECORD, ARRAY = 24, 128, 400
# Steps that hash tables may take: a second or two for 23,000 numbers that were made to
# meet, no limit for those that follow one another.
_STEPS, _STEPS_A_BYTE = 2**28, 64


class Budget:
    """What is left of it.

    Parameters
    ----------
    nbytes : int
        Length of the file.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._memory = self._most = MEMORY + MEMORY_A_BYTE * nbytes
        self._steps = _STEPS + _STEPS_A_BYTE * nbytes
        # Bytes and items that each function was given so far: a reference to bytes
        # costs the file next to none.
        self._given: Counter[str] = Counter()

    def take(self, nbytes: int) -> None:
        """Take memory.

        Raises
        ------
        FileFormatError
            If there is less; from the other methods too.
        """
        self._memory -= nbytes
        if self._memory < 0:
            raise FileFormatError(
                f"what the pickle makes takes more than {self._most} bytes of memory, "
                f"the most that a file of {self._nbytes} bytes may. Only if you trust "
                f"whoever wrote it: allow_pickle=True has no such limit"
            )

    def take_growth(self, made: Any, add: Callable[[Any], None], items: Any) -> None:
        """Call `add`, a method of a container that was paid for, and take the rest."""
        before = getsizeof(made)
        add(items)
        self.take(getsizeof(made) - before)

    def take_parts(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Refuse that a function makes more of what is in the file than there is."""
        sized = (str, bytes, bytearray, Payload, list, tuple)
        lengths = [len(a) for a in arguments if type(a) in sized]
        self._given[name] += max(lengths, default=0)
        if self._given[name] > self._nbytes:
            raise FileFormatError(
                f"what calls of {name} make is larger than the file: its parts are "
                f"used over and over"
            )

    def take_steps(self, steps: int) -> None:
        """Take time for a hash table."""
        self._steps -= steps
        if self._steps < 0:
            raise FileFormatError(
                "too many keys are numbers without order, or long and used over and "
                "over: they can be made such that a dict of them takes for ever"
            )
