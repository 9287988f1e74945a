"""The states that are measured, and how ranks share them. Pure."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MIB = 2**20
State = dict[str, Any]
# By flat key: that of the state, or of both levels with "/" between.
Arrays = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

# The shapes of one block of GPT-2 (Radford et al., 2019), hidden size 768.
_BLOCK: Shapes = {
    "ln_1.weight": (768,),
    "ln_1.bias": (768,),
    "attn.c_attn.weight": (768, 2304),
    "attn.c_attn.bias": (2304,),
    "attn.c_proj.weight": (768, 768),
    "attn.c_proj.bias": (768,),
    "ln_2.weight": (768,),
    "ln_2.bias": (768,),
    "mlp.c_fc.weight": (768, 3072),
    "mlp.c_fc.bias": (3072,),
    "mlp.c_proj.weight": (3072, 768),
    "mlp.c_proj.bias": (768,),
}
# The names that PyTorch's Adam gives its moments, after what they are moments of.
_PARTS = ("params", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Whole:
    """The float32 state of all ranks together.

    Parameters
    ----------
    layers : sequence of dict of str to shape
        Shapes by flat key; what belongs to one layer stays on one rank.
    is_nested : bool
        Whether the part of a flat key before "/" names a dict within the state.
    is_dealt : bool
        Whether rank r holds layers r, r + size and so on; else each a run of them.
    """

    layers: tuple[Shapes, ...]
    is_nested: bool = False
    is_dealt: bool = True

    @property
    def shapes(self) -> Shapes:
        """The shape of each array, by flat key, in order."""
        return {key: shape for layer in self.layers for key, shape in layer.items()}

    @property
    def state_type(self) -> str:
        """What mpisave is to call such a state."""
        return "opt" if self.is_nested else "params"

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return 4 * sum(map(_count, self.shapes.values()))

    def shares(self, size: int) -> list[list[str]]:
        """Return the flat keys that each of `size` ranks holds, whole layers each."""
        if self.is_dealt:
            dealt = [self.layers[rank::size] for rank in range(size)]
        else:
            stops = [len(self.layers) * rank // size for rank in range(size + 1)]
            dealt = [
                self.layers[start:stop] for start, stop in itertools.pairwise(stops)
            ]
        return [
            self._in_order([key for layer in layers for key in layer])
            for layers in dealt
        ]

    def shares_of_writers(self, writers: int, readers: int) -> list[list[str]]:
        """Return the flat keys of each writer of a file that `readers` ranks load.

        As many writers as readers hold what the readers want. Otherwise arrays are
        dealt to the writers one by one, so that each reader wants something of each.
        """
        if writers == readers:
            return self.shares(readers)
        keys = list(self.shapes)
        return [self._in_order(keys[rank::writers]) for rank in range(writers)]

    def _in_order(self, keys: list[str]) -> list[str]:
        """Return keys as they stand in a state: dict by dict where it is nested."""
        if not self.is_nested:
            return keys
        return sorted(keys, key=lambda key: _PARTS.index(key.partition("/")[0]))

    def state(self, keys: Iterable[str]) -> State:
        """Return the state that holds `keys`; equal keys have equal values."""
        # Seeded by the array and not by the rank: any rank can check any array.
        numbers = {key: number for number, key in enumerate(self.shapes)}
        shapes = self.shapes
        arrays = {
            key: np.random.default_rng(numbers[key]).standard_normal(
                shapes[key], np.float32
            )
            for key in keys
        }
        return self._nest(arrays)

    def ready(self, keys: Iterable[str]) -> State:
        """Return a state that holds `keys`, of ones, whose memory was touched."""
        shapes = self.shapes
        return self._nest({key: np.ones(shapes[key], np.float32) for key in keys})

    def _nest(self, arrays: Arrays) -> State:
        if not self.is_nested:
            return arrays
        nested: State = {part: {} for part in _PARTS}
        for key, array in arrays.items():
            first, _, rest = key.partition("/")
            nested[first][rest] = array
        return nested


def gpt2(nbytes: int, *, least: int) -> Whole:
    """Return blocks of GPT-2 of about `nbytes` in all, `least` blocks or more."""
    block_nbytes = 4 * sum(map(_count, _BLOCK.values()))
    return Whole(
        tuple(
            {f"h.{block}.{name}": shape for name, shape in _BLOCK.items()}
            for block in range(max(least, round(nbytes / block_nbytes)))
        )
    )


def with_moments(whole: Whole) -> Whole:
    """Return `whole` with two moments for each array, as an optimizer's state."""
    return Whole(
        tuple(
            {f"{part}/{key}": shape for part in _PARTS for key, shape in layer.items()}
            for layer in whole.layers
        ),
        is_nested=True,
        is_dealt=whole.is_dealt,
    )


def many(arrays: int, nbytes_of_each: int) -> Whole:
    """Return `arrays` arrays of as many bytes each, shared in blocks."""
    shape = (nbytes_of_each // 4,)
    return Whole(
        tuple({f"layer{number}.weight": shape} for number in range(arrays)),
        is_dealt=False,
    )


def mixed(nbytes: int, arrays: int) -> Whole:
    """Return about `nbytes` in `arrays` arrays: a fifth small, the others of one size.

    The small ones have 4 to 60 KiB, as biases and norms do.
    """
    small = {number: 1024 * (1 + number % 15) for number in range(4, arrays, 5)}
    rest = nbytes // 4 - sum(small.values())
    large = max(1, rest // max(1, arrays - len(small)))
    return Whole(
        tuple(
            {f"layer{number}.bias": (small[number],)}
            if number in small
            else {f"layer{number}.weight": (large,)}
            for number in range(arrays)
        )
    )


def gpt2_like(nbytes: int, rank: int, size: int) -> State:
    """Return this rank's blocks of a float32 state of about `nbytes` in all."""
    whole = gpt2(nbytes, least=size)
    return whole.state(whole.shares(size)[rank])


def flat(state: State) -> Arrays:
    """Return the arrays of `state` by flat key."""
    arrays: Arrays = {}
    for key, value in state.items():
        if isinstance(value, dict):
            arrays.update({f"{key}/{name}": array for name, array in value.items()})
        else:
            arrays[key] = value
    return arrays


def offsets(shapes: Shapes, shares: Sequence[Sequence[str]]) -> dict[str, int]:
    """Return where each array lies in a bare file: one after another, rank by rank."""
    found: dict[str, int] = {}
    offset = 0
    for keys in shares:
        for key in keys:
            found[key] = offset
            offset += 4 * _count(shapes[key])
    return found


def _count(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))
