"""What mpisave promises by name, and what importing it costs."""

import dataclasses
import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mpisave
from mpisave import errors

ROOT = Path(mpisave.__file__).parents[1]

BLOCK_MPI4PY = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mpi4py":
            raise ImportError("mpi4py is not installed here")

sys.meta_path.insert(0, Blocker())
"""


def run_python(code, **environ):
    """Run code in a fresh process in which mpi4py cannot be imported."""
    mpi = ("PMI", "OMPI", "SLURM", "MV2")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(mpi)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCK_MPI4PY + code],
        env={**inherited, "PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_public_names_are_frozen():
    assert mpisave.__all__ == [
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
    assert all(hasattr(mpisave, name) for name in mpisave.__all__)


def test_error_classes_and_their_bases_are_frozen():
    found = {
        name: tuple(base.__name__ for base in value.__bases__)
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, BaseException)
    }

    assert found == {
        "MpisaveError": ("Exception",),
        "CollectiveError": ("MpisaveError", "RuntimeError"),
        "ArgumentError": ("CollectiveError", "ValueError"),
        "UnknownArgumentError": ("ArgumentError", "TypeError"),
        "StateDictError": ("CollectiveError", "ValueError"),
        "LaunchError": ("CollectiveError",),
        "CollectiveTimeout": ("CollectiveError", "TimeoutError"),
        "StorageError": ("CollectiveError", "OSError"),
        "FileFormatError": ("CollectiveError", "ValueError"),
    }


def arguments_of(function):
    """Return the arguments by kind: positional ones, and keywords with defaults."""
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = [(p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY]
    return positional, keywords


def test_arguments_of_save_are_frozen():
    positional, keywords = arguments_of(mpisave.save)

    assert positional == ["state_dict", "path"]
    assert keywords == [
        ("protocol", 4),
        ("use_binary_format", False),
        ("gather_to", None),
        ("state_type", None),
        ("max_grouped_size", "3G"),
        ("replicas", "first"),
        ("transport", "auto"),
        ("durable", True),
        ("overwrite", True),
        ("timeout", 600.0),
        ("comm", None),
    ]


def test_arguments_of_load_are_frozen():
    positional, keywords = arguments_of(mpisave.load)

    assert positional == ["path"]
    assert keywords == [
        ("comm", None),
        ("like", None),
        ("into", "new"),
        ("keys", None),
        ("device", None),
        ("mmap", False),
        ("missing", "error"),
        ("unexpected", "error"),
        ("per_rank", None),
        ("verify", True),
        ("timeout", 600.0),
        ("allow_pickle", False),
    ]


def test_arguments_of_verify_are_frozen():
    keywords = [("comm", None), ("timeout", 600.0)]
    assert arguments_of(mpisave.verify) == (["path"], keywords)


def test_arguments_of_the_parts_of_a_state_are_frozen():
    assert arguments_of(mpisave.Shard) == (["array", "global_shape", "start"], [])
    assert arguments_of(mpisave.PerRank) == (["value"], [])
    assert str(inspect.signature(mpisave.Shards)) == "(*boxes: 'Shard') -> 'None'"


def test_parts_of_a_state_are_frozen_and_say_what_they_hold():
    shard = mpisave.Shard([1], [4], [np.int64(2)])
    both = mpisave.Shards(shard, shard)
    own = mpisave.PerRank(5)

    assert (shard.array, shard.global_shape, shard.start) == ([1], (4,), (2,))
    assert type(shard.start[0]) is int
    assert both.boxes == (shard, shard)
    assert own.value == 5
    for part, name in [(shard, "start"), (both, "boxes"), (own, "value")]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, None)


@pytest.mark.parametrize("boxes", [(), (5,), (np.zeros(3),)], ids=repr)
def test_shards_are_made_of_shards(boxes):
    with pytest.raises(TypeError, match="made of one Shard or more"):
        mpisave.Shards(*boxes)


@pytest.mark.parametrize("numbers", [5, (1.0,), ("1",), None], ids=repr)
@pytest.mark.parametrize("name", ["global_shape", "start"])
def test_shard_has_whole_numbers_for_shape_and_start(name, numbers):
    with pytest.raises(TypeError):
        mpisave.Shard(
            np.zeros(1), **{"global_shape": (1,), "start": (0,), name: numbers}
        )


@pytest.mark.parametrize("kind", errors.CollectiveError.__subclasses__())
def test_collective_error_survives_pickling(kind):
    failure = errors.Failure(3, "node042", "OSError", "[Errno 28] No space")
    error = kind("seal failed", step="seal", failures={3: failure})

    found = pickle.loads(pickle.dumps(error))

    assert type(found) is kind
    assert (str(found), found.step, found.failures) == (
        "seal failed",
        "seal",
        {3: failure},
    )


def test_version_is_a_plain_string_that_setuptools_reads():
    source = (ROOT / "mpisave" / "__init__.py").read_text(encoding="utf-8")

    assert f'__version__ = "{mpisave.__version__}"' in source.splitlines()


def test_import_needs_no_mpi4py_and_loads_no_optional_library():
    loaded = run_python(
        "import mpisave\n"
        "print(sorted({'mpi4py', 'h5py', 'cupy', 'ml_dtypes'} & set(sys.modules)))"
    )

    assert loaded.strip() == "[]"


@pytest.mark.parametrize("use_binary_format", [False, True], ids=["pickle", "hdf5"])
def test_save_and_load_work_without_mpi4py(tmp_path, use_binary_format):
    path = tmp_path / "state.params"

    printed = run_python(
        "import os, numpy as np, mpisave\n"
        "path = os.environ['STATE_PATH']\n"
        "mpisave.save({'w': np.arange(5)}, path, gather_to=0, state_type='params',\n"
        f"             use_binary_format={use_binary_format})\n"
        "print(mpisave.load(path)['w'].tolist())\n"
        "print(sorted({'mpi4py', 'cupy', 'ml_dtypes'} & set(sys.modules)))",
        STATE_PATH=str(path),
    )

    assert printed.split("\n")[:2] == ["[0, 1, 2, 3, 4]", "[]"]


def test_pickle_needs_no_h5py(tmp_path):
    printed = run_python(
        "import os, numpy as np, mpisave\n"
        "sys.modules['h5py'] = None\n"
        "path = os.environ['STATE_PATH']\n"
        "mpisave.save({'w': np.arange(5)}, path)\n"
        "print(mpisave.load(path)['w'].tolist())",
        STATE_PATH=str(tmp_path / "state.pkl"),
    )

    assert printed.strip() == "[0, 1, 2, 3, 4]"


def test_load_reads_hdf5_without_h5py(tmp_path):
    path = tmp_path / "state.h5"
    run_python(
        "import os, numpy as np, mpisave\n"
        "mpisave.save({'w': np.arange(5)}, os.environ['STATE_PATH'],\n"
        "             use_binary_format=True)",
        STATE_PATH=str(path),
    )

    printed = run_python(
        "import os, mpisave\n"
        "sys.modules['h5py'] = None\n"
        "print(mpisave.load(os.environ['STATE_PATH'])['w'].tolist())",
        STATE_PATH=str(path),
    )

    assert printed.strip() == "[0, 1, 2, 3, 4]"
