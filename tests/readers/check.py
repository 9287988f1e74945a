"""What other versions and libraries make of our files: ``make test-readers``.

``check.py write DIR`` saves states with mpisave. ``check.py numpy DIR`` reads the
pickles with stock pickle in an environment of an old NumPy, where mpisave is not
installed, with warnings as errors. ``check.py paddle DIR`` has Paddle load its own
state dicts that mpisave saved, and sets them.
"""

import pickle
import sys
import warnings
from pathlib import Path

import numpy as np

PROTOCOLS = (2, 3, 4, 5)


def state():
    """Return a state whose values need no file to be known."""
    return {
        "float": np.arange(1000, dtype="f4").reshape(10, 100),
        "big-endian": np.arange(5, dtype=">i2"),
        "scalar": np.float32(2.5),
        "0-d": np.array(1j),
        "empty": np.zeros((0, 3), ">f8"),
        "bool": np.array([True, False]),
        "nested": {0: [np.ones(2), (np.zeros(1, "u8"), "text")], "lr": 0.1},
    }


def assert_equal(found, expected):
    assert type(found) is type(expected), (found, expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, item in expected.items():
            assert_equal(found[key], item)
    elif isinstance(expected, (list, tuple)):
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, np.ndarray):
        assert found.dtype.str == expected.dtype.str
        assert found.shape == expected.shape
        assert found.tobytes() == expected.tobytes()
        assert found.flags.writeable
    else:
        assert found == expected


def write(folder):
    import mpisave

    for protocol in PROTOCOLS:
        mpisave.save(state(), folder / f"state{protocol}.pkl", protocol=protocol)
    print(f"written with NumPy {np.__version__}")


def read_with_numpy(folder):
    warnings.simplefilter("error")
    assert "mpisave" not in sys.modules
    for protocol in PROTOCOLS:
        with (folder / f"state{protocol}.pkl").open("rb") as file:
            assert_equal(pickle.load(file), state())
    print(f"NumPy {np.__version__}: {len(PROTOCOLS)} pickles equal")


def to_host(found):
    """Return a state dict of Paddle with arrays in place of tensors."""
    if isinstance(found, dict):
        return {key: to_host(item) for key, item in found.items()}
    return found.numpy() if hasattr(found, "numpy") else found


def read_with_paddle(folder):
    import paddle

    import mpisave

    def new():
        layers = [paddle.nn.Linear(8, 16), paddle.nn.ReLU(), paddle.nn.Linear(16, 4)]
        return paddle.nn.Sequential(*layers)

    model = new()
    schedule = paddle.optimizer.lr.StepDecay(0.1, 2)
    adam = paddle.optimizer.Adam(schedule, parameters=model.parameters())
    for _ in range(3):
        model(paddle.randn([5, 8])).sum().backward()
        adam.step()
        adam.clear_grad()
        schedule.step()
    params, moments = to_host(model.state_dict()), to_host(adam.state_dict())
    for protocol in PROTOCOLS:
        for name, saved in (("params", params), ("opt", moments)):
            path = str(folder / f"paddle.pd{name}")
            mpisave.save(saved, path, protocol=protocol, gather_to=0, state_type=name)
            assert_equal(to_host(paddle.load(path)), saved)
        other = new()
        missing, unexpected = other.set_state_dict(
            paddle.load(str(folder / "paddle.pdparams"))
        )
        assert not missing
        assert not unexpected
        assert_equal(to_host(other.state_dict()), params)
        adam.set_state_dict(paddle.load(str(folder / "paddle.pdopt")))
        assert_equal(to_host(adam.state_dict()), moments)
    print(f"Paddle {paddle.__version__}: loaded and set, protocols {PROTOCOLS}")


if __name__ == "__main__":
    what = {"write": write, "numpy": read_with_numpy, "paddle": read_with_paddle}
    what[sys.argv[1]](Path(sys.argv[2]))
