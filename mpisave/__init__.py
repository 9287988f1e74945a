"""Save what many MPI ranks hold into one file that anybody can open."""

from __future__ import annotations

from mpisave.errors import (
    ArgumentError,
    CollectiveError,
    CollectiveTimeout,
    FileFormatError,
    LaunchError,
    MpisaveError,
    StateDictError,
    StorageError,
    UnknownArgumentError,
)
from mpisave.loading import load
from mpisave.report import SaveReport
from mpisave.saving import save
from mpisave.shards import Shard, Shards
from mpisave.state_types import StateType, register_state_type
from mpisave.tree import PerRank
from mpisave.verifying import VerifyReport, verify

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "CollectiveError",
    "CollectiveTimeout",
    "FileFormatError",
    "LaunchError",
    "MpisaveError",
    "PerRank",
    "SaveReport",
    "Shard",
    "Shards",
    "StateDictError",
    "StateType",
    "StorageError",
    "UnknownArgumentError",
    "VerifyReport",
    "load",
    "register_state_type",
    "save",
    "verify",
]
