"""Dtypes that a file may hold, and their names. Pure."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np

# Booleans, integers, floats and complex numbers.
_KINDS = frozenset("biufc")
# All that `dtype_name` gives. NumPy would parse more, with Python's own parser:
# records, subarrays, and what makes it raise SyntaxError.
_PLAIN_NAME = re.compile(r"[<>|=][biufc][0-9]{1,2}")


def savable(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return `dtype` if a file may hold it.

    Raises
    ------
    TypeError
        If it is none of bool, int, uint, float, complex and those of ml_dtypes.
    """
    if is_ml_dtype(dtype):
        if dtype.isnative:
            return dtype
        raise TypeError(f"arrays of {dtype.name} in swapped byte order cannot be saved")
    if dtype.kind in _KINDS:
        return dtype
    advice = (
        "take the objects out into lists of small objects"
        if dtype.hasobject
        else "view it as integers, or take its fields apart"
    )
    raise TypeError(f"arrays of dtype {dtype} cannot be saved: {advice}")


@functools.lru_cache(maxsize=1024)
def is_ml_dtype(dtype: np.dtype[Any]) -> bool:
    """Return whether `dtype` is one that ml_dtypes adds, such as bfloat16."""
    return dtype.type.__module__.partition(".")[0] == "ml_dtypes"


def stored_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype under which every reader knows the bytes of `dtype`.

    That of ml_dtypes are stored as their bits, in unsigned integers.
    """
    if is_ml_dtype(dtype):
        return np.dtype(f"<u{dtype.itemsize}" if dtype.itemsize > 1 else "u1")
    return dtype


def dtype_name(dtype: np.dtype[Any]) -> str:
    """Return a name that `dtype_from_name` turns back into `dtype`."""
    return dtype.name if is_ml_dtype(dtype) else dtype.str


def dtype_from_name(name: str) -> np.dtype[Any]:
    """Return the dtype that `dtype_name` gave `name`.

    Raises
    ------
    ValueError
        If there is none.
    ImportError
        If it needs ml_dtypes, and that is not installed.
    """
    if name[:1] in "<>|=":
        if not _PLAIN_NAME.fullmatch(name):
            raise ValueError(f"{name!r:.80} is no dtype that a file may hold")
        try:
            return np.dtype(name)
        except TypeError as exc:
            raise ValueError(f"{name!r} is no dtype") from exc
    try:
        import ml_dtypes
    except ImportError as exc:
        raise ImportError(
            f"dtype {name!r} needs ml_dtypes: pip install 'mpisave[bfloat16]'"
        ) from exc
    scalar = getattr(ml_dtypes, name, None)
    if not (isinstance(scalar, type) and issubclass(scalar, np.generic)):
        raise ValueError(  # noqa: TRY004 - the name is at fault
            f"{name!r} is no dtype of ml_dtypes {ml_dtypes.__version__}"
        )
    return np.dtype(scalar)
