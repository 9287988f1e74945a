"""Save in a single process: what is written, reported, warned of and refused."""

import errno
import io
import logging
import os
import pickle
import sys
import warnings
from collections import OrderedDict, defaultdict
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest
from fakes import FakeDeviceArray, put_in_place
from helpers import assert_equal_states, files_in

import mpisave
from mpisave.errors import (
    ArgumentError,
    LaunchError,
    StateDictError,
    StorageError,
)

FORMATS = [pytest.param(False, id="pickle"), pytest.param(True, id="hdf5")]
STATE = {"w": np.arange(6.0).reshape(2, 3), "b": np.zeros(3, np.int8)}

LAUNCHERS = ("SLURM", "PMI", "OMPI", "MV2", "ENVIRONMENT")


@pytest.fixture(autouse=True)
def launched_by_hand(monkeypatch):
    """Take what a job around the tests has set out of the environment."""
    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)


@pytest.fixture
def without_mpi(monkeypatch):
    """Have mpi4py look as if it were not installed, and not started."""
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    monkeypatch.setitem(sys.modules, "mpi4py", None)


def read_stock(path, use_binary_format):
    if not use_binary_format:
        return pickle.loads(Path(path).read_bytes())
    with h5py.File(path) as file:
        return {key: dataset[()] for key, dataset in file.items()}


def reloaded(state, use_binary_format):
    buffer = io.BytesIO()
    mpisave.save(state, buffer, use_binary_format=use_binary_format)
    return mpisave.load(buffer)


class TestReport:
    @pytest.mark.parametrize("use_binary_format", FORMATS)
    @pytest.mark.parametrize("gather_to", [None, 0, [0]])
    def test_report_says_what_was_done(self, tmp_path, use_binary_format, gather_to):
        path = tmp_path / "x.params"

        report = mpisave.save(
            STATE,
            path,
            gather_to=gather_to,
            state_type="params",
            use_binary_format=use_binary_format,
        )

        assert report.paths == (str(path),)
        assert report.path == str(path)
        assert report.nbytes == path.stat().st_size
        assert report.payload_nbytes == 6 * 8 + 3
        assert report.step_nbytes == {"gather": 0, "write": 6 * 8 + 3}
        assert report.rounds == 0
        assert report.transport == "none"
        steps = {"describe", "plan", "stage", "move", "gather", "write", "seal"}
        assert set(report.seconds) == {*steps, "publish", "total"}
        assert all(seconds >= 0 for seconds in report.seconds.values())
        assert report.seconds["total"] >= report.seconds["move"]

    def test_report_is_read_by_a_person(self, tmp_path):
        report = mpisave.save(STATE, tmp_path / "x")

        text = str(report)

        assert text.startswith(f"{tmp_path / 'x'}: {report.nbytes} bytes in ")
        assert "GB/s" in text
        assert "seal" in text

    def test_report_of_a_file_object_has_its_type_for_a_name(self):
        buffer = io.BytesIO()

        report = mpisave.save(STATE, buffer)

        assert report.paths == ("<BytesIO>",)
        assert report.nbytes == len(buffer.getvalue())

    def test_one_line_is_logged_and_nothing_printed(self, tmp_path, caplog, capfd):
        with caplog.at_level(logging.INFO, logger="mpisave"):
            mpisave.save(STATE, tmp_path / "x")

        assert [record.levelname for record in caplog.records] == ["INFO"]
        assert str(tmp_path / "x") in caplog.text
        assert capfd.readouterr() == ("", "")


class TestWarnings:
    def test_path_that_does_not_end_in_the_state_type_is_warned_about_once(
        self, tmp_path
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mpisave.save(STATE, tmp_path / "x.pkl", state_type="params", gather_to=0)

        assert len(caught) == 1
        assert "x.pkl' does not end in the state type 'params'" in str(
            caught[0].message
        )
        assert files_in(tmp_path) == ["x.pkl"]

    @pytest.mark.parametrize("name", ["x.params", "x.pdparams", "params"])
    def test_path_that_ends_in_the_state_type_is_not_warned_about(self, tmp_path, name):
        mpisave.save(STATE, tmp_path / name, state_type="params")

        assert files_in(tmp_path) == [name]

    @pytest.mark.parametrize("gather_to", [None, 0])
    def test_warning_points_to_the_line_that_called_save(self, tmp_path, gather_to):
        given = {"gather_to": gather_to}

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mpisave.save(STATE, tmp_path / "x", state_type="params", **given)
            mpisave.save({"hook": {1}}, tmp_path / "x", **given)

        assert [warning.filename for warning in caught] == [__file__] * 2

    def test_string_of_numpy_is_not_warned_about(self, tmp_path):
        mpisave.save({"x": np.str_("a"), "y": np.bytes_(b"b")}, tmp_path / "x")

        assert_equal_states(mpisave.load(tmp_path / "x"), {"x": "a", "y": b"b"})

    def test_file_object_has_no_name_to_warn_about(self):
        mpisave.save(STATE, io.BytesIO(), state_type="params")

    def test_object_that_load_will_refuse_is_warned_about_by_key(self, tmp_path):
        state = {"w": np.zeros(2), "n": {"spread": {1, 2}}}

        with pytest.warns(UserWarning, match=r"\['n'\]\['spread'\] is an .* type set"):
            mpisave.save(state, tmp_path / "x")

        assert read_stock(tmp_path / "x", use_binary_format=False)["n"] == state["n"]
        with pytest.raises(mpisave.FileFormatError, match=r"\['n'\]\['spread'\]"):
            mpisave.load(tmp_path / "x")


class TestWhatIsSaved:
    @pytest.mark.parametrize("use_binary_format", FORMATS)
    def test_stock_reader_finds_the_arrays(self, tmp_path, use_binary_format):
        mpisave.save(STATE, tmp_path / "x", use_binary_format=use_binary_format)

        found = read_stock(tmp_path / "x", use_binary_format)

        assert set(found) == set(STATE)
        for key, made in STATE.items():
            assert found[key].dtype == made.dtype
            np.testing.assert_array_equal(found[key], made)

    @pytest.mark.parametrize("use_binary_format", FORMATS)
    @pytest.mark.parametrize(
        "state",
        [
            np.arange(5),
            np.array(2.5),
            np.zeros((0, 2)),
            {},
            [],
            (),
            [np.arange(2), (np.arange(3), [])],
            5,
            None,
            "text",
            [1, "a", None],
            {"a": {"b": {"c": {}}}},
            {"e": np.zeros(0)},
        ],
        ids=repr,
    )
    def test_state_of_any_shape_comes_back(self, state, use_binary_format):
        assert_equal_states(reloaded(state, use_binary_format), state)

    @pytest.mark.parametrize("use_binary_format", FORMATS)
    def test_small_objects_come_back_with_value_and_type(self, use_binary_format):
        state = {
            "scalars": [
                *(np.float32(0.1), np.float16(2), np.int8(-1), np.uint64(2**63)),
                *(np.bool_(True), np.complex64(1j), ml_dtypes.bfloat16(1.5)),
            ],
            "numbers": {"i": 2**70, "f": 0.1, "c": 1j, "b": True, "none": None},
            "texts": ("", "\N{GREEK SMALL LETTER ALPHA}", "a\0b", "x" * 100_000),
            "bytes": (b"", b"\0\xff", bytearray(b"x"), b"x" * 100_000),
            "lr": np.float32(0.5),
            7: {"seven": 7, "7": "text", 7: "int"},
        }

        found = reloaded(state, use_binary_format)

        assert_equal_states(found, state)
        for mine, theirs in zip(found["scalars"], state["scalars"], strict=True):
            assert type(mine) is type(theirs)

    @pytest.mark.parametrize("use_binary_format", FORMATS)
    def test_float_that_is_no_number_comes_back(self, use_binary_format):
        nan, inf = float("nan"), float("inf")
        state = {"nan": nan, "inf": [inf, -inf], "c": complex(nan, -0.0), "z": -0.0}

        found = reloaded(state, use_binary_format)

        assert repr(found) == repr(state)

    @pytest.mark.parametrize("use_binary_format", FORMATS)
    def test_mapping_of_another_type_comes_back_as_a_dict(self, use_binary_format):
        state = OrderedDict(z=np.arange(2), a=defaultdict(int, x=1))

        found = reloaded(state, use_binary_format)

        assert_equal_states(found, {"z": np.arange(2), "a": {"x": 1}})

    @pytest.mark.parametrize("use_binary_format", FORMATS)
    def test_array_that_two_keys_share_is_saved_under_both(self, use_binary_format):
        made = np.arange(4)

        found = reloaded({"a": made, "b": [made, made[::2]]}, use_binary_format)

        assert_equal_states(found, {"a": made, "b": [made, made[::2].copy()]})

    @pytest.mark.parametrize("use_binary_format", FORMATS)
    @pytest.mark.parametrize("cap", [1, 64, "1K", "3G"])
    def test_cap_of_any_size_saves_the_same_bytes(self, use_binary_format, cap):
        state = {
            "f": np.asfortranarray(np.arange(300.0).reshape(20, 15)),
            "big": np.arange(99, dtype=">u2")[::2],
            "c": np.arange(1000),
        }
        first, second = io.BytesIO(), io.BytesIO()

        for buffer, size in ((first, "3G"), (second, cap)):
            mpisave.save(
                state,
                buffer,
                use_binary_format=use_binary_format,
                max_grouped_size=size,
            )

        assert first.getvalue() == second.getvalue()

    @pytest.mark.parametrize("use_binary_format", FORMATS)
    def test_device_array_is_saved_without_being_read_by_numpy(
        self, monkeypatch, use_binary_format
    ):
        library = put_in_place(monkeypatch)
        host = np.arange(12, dtype=np.float32).reshape(3, 4)

        found = reloaded({"w": FakeDeviceArray(host)}, use_binary_format)

        assert_equal_states(found, {"w": host})
        assert library.calls == [("read", 48)]
        assert library.settled == 1

    @pytest.mark.parametrize("use_binary_format", FORMATS)
    def test_arrays_are_not_modified(self, use_binary_format):
        made = np.arange(6).reshape(2, 3).T
        made.flags.writeable = False
        state = {"w": made, "n": [1]}

        reloaded(state, use_binary_format)

        assert list(state) == ["w", "n"]
        assert made.tolist() == [[0, 3], [1, 4], [2, 5]]

    def test_rank_is_filled_into_the_path(self, tmp_path):
        report = mpisave.save(STATE, tmp_path / "r{rank}.pkl")

        assert files_in(tmp_path) == ["r0.pkl"]
        assert report.path == str(tmp_path / "r0.pkl")

    def test_older_file_is_replaced(self, tmp_path):
        (tmp_path / "x").write_bytes(b"old" * 10_000)

        mpisave.save({"n": 1}, tmp_path / "x")

        assert read_stock(tmp_path / "x", use_binary_format=False) == {"n": 1}

    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    def test_protocol_is_that_of_the_file(self, protocol):
        buffer = io.BytesIO()

        mpisave.save(STATE, buffer, protocol=protocol)

        assert buffer.getvalue()[:2] == bytes([0x80, protocol])


class TestWhatIsRefused:
    @pytest.mark.parametrize("use_binary_format", FORMATS)
    def test_state_that_holds_itself_is_refused(self, tmp_path, use_binary_format):
        state = {"a": [1]}
        state["a"].append(state)

        with pytest.raises(StateDictError, match="itself"):
            mpisave.save(state, tmp_path / "x", use_binary_format=use_binary_format)

        assert files_in(tmp_path) == []

    @pytest.mark.parametrize("use_binary_format", FORMATS)
    @pytest.mark.parametrize("key", [1.5, None, (1,), b"x", True])
    def test_key_that_is_neither_str_nor_int_is_refused(self, key, use_binary_format):
        with pytest.raises(StateDictError, match="keys are str or int"):
            reloaded({key: 1}, use_binary_format)

    @pytest.mark.parametrize(
        "value",
        [{1, 2}, range(3), np.datetime64("2026-01-01"), Path("x"), frozenset()],
        ids=lambda value: type(value).__name__,
    )
    @pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], lambda x: {"n": x}])
    def test_object_that_hdf5_cannot_hold_is_refused_by_key_and_type(
        self, tmp_path, value, wrap
    ):
        with pytest.raises(StateDictError, match="'hook'") as caught:
            mpisave.save({"hook": wrap(value)}, tmp_path / "x", use_binary_format=True)

        assert type(value).__name__ in str(caught.value)
        assert "use_binary_format=False" in str(caught.value)
        assert files_in(tmp_path) == []

    def test_key_that_is_no_unicode_is_refused_by_hdf5(self):
        with pytest.raises(StateDictError, match="no valid Unicode"):
            reloaded({"\ud800": np.zeros(1)}, use_binary_format=True)

    @pytest.mark.parametrize("use_binary_format", FORMATS)
    @pytest.mark.parametrize(
        "made", [np.array([None]), np.array(["x"]), np.zeros(2, [("a", "i4")])]
    )
    def test_dtype_that_no_file_holds_is_refused_by_key(self, made, use_binary_format):
        with pytest.raises(StateDictError, match=r"\['n'\]\[0\]: arrays of dtype"):
            reloaded({"n": [made]}, use_binary_format)

    def test_params_with_a_small_object_are_refused(self, tmp_path):
        with pytest.raises(StateDictError, match="'lr' is an object of type float"):
            mpisave.save({"lr": 0.1}, tmp_path / "params", state_type="params")

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"protocol": 1}, "protocol is 1"),
            ({"use_binary_format": 1}, "use_binary_format is 1"),
            ({"gather_to": 1}, r"has 1 rank"),
            ({"gather_to": []}, "gather_to is empty"),
            ({"max_grouped_size": "3"}, "max_grouped_size is '3'"),
            ({"state_type": "model"}, "state_type is 'model'"),
        ],
    )
    def test_argument_that_is_not_legal_is_refused(self, tmp_path, given, words):
        with pytest.raises(ArgumentError, match=words) as caught:
            mpisave.save(STATE, tmp_path / "x", **given)

        assert caught.value.step == "check arguments"
        assert list(caught.value.failures) == [0]
        assert isinstance(caught.value, ValueError)
        assert files_in(tmp_path) == []

    def test_unknown_argument_is_a_type_error(self, tmp_path):
        with pytest.raises(TypeError, match="did you mean 'gather_to'"):
            mpisave.save(STATE, tmp_path / "x", gather=0)

    @pytest.mark.parametrize("path", [None, "", b"x", 5])
    def test_path_that_is_none_is_refused(self, path):
        with pytest.raises(ArgumentError, match="path"):
            mpisave.save(STATE, path)

    def test_failed_flush_leaves_the_older_file(self, tmp_path, monkeypatch):
        mpisave.save({"n": 1}, tmp_path / "x")
        before = (tmp_path / "x").read_bytes()

        def fail(descriptor):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(StorageError, match="Input/output error") as caught:
            mpisave.save({"n": 2}, tmp_path / "x")

        assert caught.value.step == "seal"
        assert (tmp_path / "x").read_bytes() == before
        assert files_in(tmp_path) == ["x"]

    def test_refusal_before_any_file_is_made_leaves_a_file_object_alone(self):
        buffer = io.BytesIO(b"what was there")

        with pytest.raises(StateDictError):
            mpisave.save({1.5: 1}, buffer)

        assert buffer.getvalue() == b"what was there"


@pytest.mark.usefixtures("without_mpi")
class TestLaunch:
    @pytest.mark.parametrize(
        "environ",
        [
            {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "2"},
            {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "8"},
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},
            {"PMI_SIZE": "4"},
            {"OMPI_COMM_WORLD_SIZE": "4"},
            {"MV2_COMM_WORLD_SIZE": "4"},
        ],
        ids=",".join,
    )
    def test_task_of_several_that_mpi_does_not_know_is_refused(
        self, tmp_path, monkeypatch, environ
    ):
        for name, value in environ.items():
            monkeypatch.setenv(name, value)

        with pytest.raises(LaunchError, match="started 4 processes") as caught:
            mpisave.save(STATE, tmp_path / "x")

        assert "--mpi=pmi2" in str(caught.value)
        assert files_in(tmp_path) == []

    @pytest.mark.parametrize(
        "environ",
        [
            {},
            {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "ENVIRONMENT": "BATCH"},
            {"SLURM_NTASKS": "4"},
            {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"},
            {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"},
            {"SLURM_STEP_ID": "0"},
            {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "many"},
            {"PMI_SIZE": "1"},
        ],
        ids=",".join,
    )
    def test_process_that_is_meant_to_be_alone_saves(
        self, tmp_path, monkeypatch, environ
    ):
        for name, value in environ.items():
            monkeypatch.setenv(name, value)

        mpisave.save(STATE, tmp_path / "x")

        assert files_in(tmp_path) == ["x"]
