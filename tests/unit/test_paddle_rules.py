"""What paddle.load demands of a pickle, checked without Paddle.

It takes plain pickles of ``{name: ndarray}``, with bytes behind them. It refuses arrays
of ml_dtypes and mappings that are no dict, and reads uint16 as bfloat16.
"""

import io
import pickle
import pickletools
from collections import OrderedDict, defaultdict

import ml_dtypes
import numpy as np
import pytest

import mpisave

PROTOCOLS = (2, 3, 4)  # those that paddle.save writes


class Arrays(pickle.Unpickler):
    """An unpickler that finds what NumPy's own pickles need, and nothing else."""

    def __init__(self, file):
        super().__init__(file)
        self.found = set()

    def find_class(self, module, name):
        self.found.add(f"{module}.{name}")
        return super().find_class(module, name)


def saved(state, protocol, state_type):
    buffer = io.BytesIO()
    mpisave.save(state, buffer, gather_to=0, state_type=state_type, protocol=protocol)
    return buffer.getvalue()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_params_are_a_plain_dict_of_plain_arrays(protocol):
    state = OrderedDict(w=np.ones((2, 3), np.float32), b=np.zeros(3, np.float32))

    found = pickle.loads(saved(state, protocol, "params"))

    assert type(found) is dict
    assert list(found) == ["w", "b"]
    assert {type(value) for value in found.values()} == {np.ndarray}
    assert {type(key) for key in found} == {str}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_bfloat16_is_stored_as_paddle_stores_it(protocol):
    made = np.array([1.0, -2.5, 0.0], ml_dtypes.bfloat16)

    found = pickle.loads(saved({"w": made}, protocol, "params"))["w"]

    assert found.dtype == np.uint16
    assert found.tolist() == [0x3F80, 0xC020, 0]
    assert mpisave.load(io.BytesIO(saved({"w": made}, protocol, "params")))[
        "w"
    ].dtype == np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "dtype",
    ["float16", "float32", "float64", "int8", "int32", "int64", "uint8", "bool"],
)
def test_dtype_that_paddle_knows_stays_what_it_is(dtype, protocol):
    found = pickle.loads(saved({"w": np.ones(2, dtype)}, protocol, "params"))["w"]

    assert found.dtype == np.dtype(dtype)
    assert found.dtype.isnative


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_optimizer_state_is_made_of_plain_containers(protocol):
    state = defaultdict(dict)
    state["w_moment1_0"] = np.zeros(3, np.float32)
    state["w_beta1_pow_acc_0"] = np.array([0.9], np.float32)
    state["master_weights"] = OrderedDict(w=np.zeros(3, np.float32))
    state["LR_Scheduler"] = {"last_epoch": 3, "last_lr": 0.1, "verbose": False}

    found = pickle.loads(saved(state, protocol, "opt"))

    assert list(found) == list(state)
    assert type(found) is dict
    assert type(found["master_weights"]) is dict
    assert found["LR_Scheduler"] == {"last_epoch": 3, "last_lr": 0.1, "verbose": False}
    assert [type(value) for value in found["LR_Scheduler"].values()] == [
        int,
        float,
        bool,
    ]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_only_names_of_numpy_are_looked_up(protocol):
    state = {"w": np.ones(2, np.float32), "h": np.ones(2, ml_dtypes.bfloat16)}
    unpickler = Arrays(io.BytesIO(saved(state, protocol, "params")))

    unpickler.load()

    assert unpickler.found == {
        "numpy.core.multiarray._reconstruct",
        "numpy.ndarray",
        "numpy.dtype",
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_pickle_needs_no_newer_python_than_its_protocol(protocol):
    data = saved({"w": np.ones(2, np.float32)}, protocol, "params")

    protocols = {op.proto for op, _, _ in pickletools.genops(data)}

    assert max(protocols) <= max(3, protocol)


def test_reader_that_is_given_more_than_the_pickle_stops_at_its_end():
    stream = io.BytesIO(saved({"w": np.ones(2)}, 4, "params"))

    pickle.load(stream)

    assert stream.read().endswith(b"\x89mpisave")
