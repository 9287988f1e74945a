"""Small objects to JSON and back, exactly: the values that need no code to load."""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np

from mpisave.dtypes import (
    dtype_from_name,
    dtype_name,
    is_ml_dtype,
    savable,
)

# A value that JSON has is itself. Others are an object of one member, named so.
Json = Any


def to_json(value: object) -> Json:
    """Return what `from_json` turns back into `value`, of the same type.

    Raises
    ------
    TypeError
        If `value` is of a type that only a pickle can hold.
    """
    if isinstance(value, (np.str_, np.bytes_)):
        value = value.item()  # with no dtype of its own, a string like any other
    kind = type(value)
    if value is None or kind is bool:
        return value
    if isinstance(value, str) and kind is str:
        # JSON joins two lone surrogates to one character.
        if any("\ud800" <= character <= "\udfff" for character in value):
            return {"str": value.encode("utf-8", "surrogatepass").hex()}
        return value
    if kind is int:
        # Python refuses to read decimals of more than 4,300 digits.
        return value if -(2**63) <= value < 2**63 else {"int": hex(value)}  # type: ignore[operator,arg-type]
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}  # type: ignore[arg-type]
    if kind is complex:
        return {"complex": [to_json(value.real), to_json(value.imag)]}  # type: ignore[attr-defined]
    if kind in (bytes, bytearray):
        return {kind.__name__: base64.b64encode(value).decode()}  # type: ignore[arg-type]
    if isinstance(value, np.generic):
        savable(value.dtype)
        return {"scalar": [dtype_name(value.dtype), value.tobytes().hex()]}
    raise TypeError(f"objects of type {kind.__module__}.{kind.__qualname__}")


def from_json(data: Json) -> Any:
    """Return the value that `to_json` was given.

    Raises
    ------
    ValueError
        If `data` is nothing that `to_json` returns.
    """
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    if isinstance(data, dict) and len(data) == 1:
        ((kind, content),) = data.items()
        try:
            if kind == "str":
                return bytes.fromhex(content).decode("utf-8", "surrogatepass")
            if kind == "int":
                return int(content, 16)
            if kind == "float":
                return float(content)
            if kind == "complex":
                return complex(from_json(content[0]), from_json(content[1]))
            if kind in ("bytes", "bytearray"):
                raw = base64.b64decode(content, validate=True)
                return raw if kind == "bytes" else bytearray(raw)
            if kind == "scalar":
                dtype = dtype_from_name(content[0])
                return np.frombuffer(bytes.fromhex(content[1]), dtype, count=1)[0]
        except (TypeError, IndexError, KeyError) as exc:
            raise ValueError(f"{data!r} is no value") from exc
    raise ValueError(f"{data!r} is no value")


def stored_scalar(value: np.generic) -> np.generic:
    """Return `value`, or its bits where only ml_dtypes knows its dtype."""
    if is_ml_dtype(value.dtype):
        bits: np.generic = np.frombuffer(value.tobytes(), f"u{value.dtype.itemsize}")[0]
        return bits
    return value
