"""What a state of a given type is made of: handlers, and their registry. Pure.

A handler is asked about every node of every rank's state before anything moves. It
refuses what does not belong into a state of its type, so that optimizer moments do
not end in a file of parameters.
"""

from __future__ import annotations

from typing import Protocol

from mpisave.errors import ArgumentError, Key, StateDictError, show_key


class StateType(Protocol):
    """What a handler of a state type offers."""

    def check(self, key: Key, kind: str, type_name: str) -> None:
        """Refuse a node that no state of this type has.

        Parameters
        ----------
        key : tuple of str and int
            Where the node stands; empty for the state itself.
        kind : str
            ``"dict"``, ``"per_rank"``, ``"list"``, ``"tuple"``, ``"array"`` or
            ``"object"``.
        type_name : str
            Name of the Python type of an object.

        Raises
        ------
        StateDictError
            If it does not belong there.
        """
        ...


_NAMES = {"per_rank": "PerRank"}


class Params:
    """Parameters: a flat dict of arrays."""

    def check(self, key: Key, kind: str, type_name: str) -> None:
        """Refuse all but one dict of arrays."""
        if not key and kind != "dict":
            raise StateDictError(
                f"a state of type 'params' is a dict of arrays, not: {kind} {type_name}"
            )
        if key and kind != "array":
            what = (
                f"an object of type {type_name}"
                if kind == "object"
                else f"a {_NAMES.get(kind, kind)}"
            )
            raise StateDictError(
                f"{show_key(key)} is {what}: a state of type 'params' is a flat "
                f"dict of arrays. Save nested states and small objects with "
                f"state_type='opt'."
            )


class Opt:
    """Optimizer state: arrays, nested dicts and lists of them, and small objects.

    ``master_weights`` is a dict of arrays, and ``LR_Scheduler`` holds small objects,
    where a state has them.
    """

    def check(self, key: Key, kind: str, type_name: str) -> None:
        """Refuse small objects in ``master_weights``, arrays in ``LR_Scheduler``."""
        if not key and kind not in ("dict", "list", "tuple"):
            raise StateDictError(
                f"a state of type 'opt' is a dict, not: {kind} {type_name}"
            )
        top = key[0] if key else None
        if top == "master_weights" and kind == "object":
            raise StateDictError(
                f"{show_key(key)} is an object of type {type_name}: 'master_weights' "
                f"holds arrays"
            )
        if top == "LR_Scheduler" and kind == "array":
            raise StateDictError(
                f"{show_key(key)} is an array: 'LR_Scheduler' holds small objects that "
                f"are the same on every rank. Save item() of a single number."
            )


_REGISTRY: dict[str, StateType] = {"params": Params(), "opt": Opt()}


def register_state_type(name: str, handler: StateType) -> None:
    """Make `handler` known as ``state_type=name``, on every rank that saves.

    Raises
    ------
    ArgumentError
        If the name is taken or is no identifier, or the handler has no `check`.
    """
    given: object = name
    if not isinstance(given, str) or not given.isidentifier():
        raise ArgumentError(f"a state type is named by an identifier, not {name!r}")
    if not callable(getattr(handler, "check", None)):
        raise ArgumentError(f"the handler of {name!r} has no method check: {handler!r}")
    if name in _REGISTRY and _REGISTRY[name] is not handler:
        raise ArgumentError(f"state_type {name!r} is registered already")
    _REGISTRY[name] = handler


def handler_of(name: object) -> StateType:
    """Return the handler registered as `name`.

    Raises
    ------
    ArgumentError
        If there is none.
    """
    if not isinstance(name, str) or name not in _REGISTRY:
        known = ", ".join(map(repr, _REGISTRY))
        raise ArgumentError(f"state_type is {name!r}; registered are: {known}")
    return _REGISTRY[name]
