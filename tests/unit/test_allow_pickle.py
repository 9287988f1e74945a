"""allow_pickle=True: what the file says is executed, and only then."""

import io
import os
import pickle
from datetime import date

import numpy as np
import pytest

import mpisave
from mpisave.errors import ArgumentError, FileFormatError

TRIPWIRE = "mpisave-tripwire"


class RunsCode:
    def __reduce__(self):
        return os.mkdir, (TRIPWIRE,)


def saved(state):
    out = io.BytesIO()
    with pytest.warns(UserWarning, match=r"pickle\.load"):
        mpisave.save(state, out, state_type="opt")
    return bytearray(out.getvalue())


@pytest.mark.parametrize("protocol", range(6))
def test_other_pickle_is_given_to_pickle_load_only_when_allowed(protocol, tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"d": date(2026, 1, 1), "w": np.arange(3)}, protocol))

    with pytest.raises(FileFormatError, match="executes whatever it says"):
        mpisave.load(path)
    found = mpisave.load(path, allow_pickle=True)

    assert found["d"] == date(2026, 1, 1)
    assert found["w"].tolist() == [0, 1, 2]


def test_code_runs_only_when_allowed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps([RunsCode()])

    with pytest.raises(FileFormatError):
        mpisave.load(io.BytesIO(data))
    assert os.listdir() == []
    mpisave.load(io.BytesIO(data), allow_pickle=True)

    assert os.listdir() == [TRIPWIRE]


def test_what_pickle_load_refuses_is_a_format_error_that_names_the_file(tmp_path):
    path = tmp_path / "torn.pkl"
    path.write_bytes(pickle.dumps(list(range(1000)))[:-5])

    with pytest.raises(FileFormatError, match=r"torn\.pkl: pickle\.load failed"):
        mpisave.load(path, allow_pickle=True)


def test_object_in_a_file_of_ours_comes_back_when_allowed():
    data = saved({"w": np.arange(5), "when": date(2026, 1, 1), "n": [date(1, 1, 1)]})

    with pytest.raises(FileFormatError, match="executes whatever it says"):
        mpisave.load(io.BytesIO(data))
    found = mpisave.load(io.BytesIO(data), allow_pickle=True)

    assert found["when"] == date(2026, 1, 1)
    assert found["n"] == [date(1, 1, 1)]
    assert found["w"].tolist() == list(range(5))


def test_part_of_a_file_with_objects_can_be_asked_for():
    data = saved({"w": np.arange(5), "when": date(2026, 1, 1)})

    found = mpisave.load(io.BytesIO(data), keys="when", allow_pickle=True)

    assert found == {"when": date(2026, 1, 1)}


def test_altered_skeleton_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = saved({"w": np.arange(5), "when": date(2026, 1, 1)})
    at = data.index(b"datetime\ndate\n")
    data[at : at + 14] = b"xxxxtime\ndate\n"

    with pytest.raises(FileFormatError, match="It was not executed"):
        mpisave.load(io.BytesIO(data), allow_pickle=True)


def test_altered_payload_of_a_file_with_objects_is_found():
    data = saved({"w": np.full(5, 0x0123456789ABCDEF), "when": date(2026, 1, 1)})
    at = data.index(b"\xef\xcd\xab\x89")
    data[at] ^= 1

    with pytest.raises(FileFormatError, match="'w'"):
        mpisave.load(io.BytesIO(data), allow_pickle=True)


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_allow_pickle_is_a_bool(value):
    with pytest.raises(ArgumentError, match="allow_pickle"):
        mpisave.load(io.BytesIO(pickle.dumps(1)), allow_pickle=value)
