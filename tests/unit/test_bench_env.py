"""`python -m mpisave.bench env` says what there is, and why what is missing is not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launching import mpi_environment

import mpisave
from mpisave.bench import env
from mpisave.cuda_aware import Trial, current_device

WITHOUT_DEVICE = Path(__file__).parents[1] / "without_device"


def by_name(rows):
    rows = list(rows)
    assert all(list(row) == ["what", "value", "note"] for row in rows)
    found = {row["what"]: (row["value"], row["note"]) for row in rows}
    assert len(found) == len(rows), "a name twice"
    return found


def bench_env(tmp_path, *python, **changed):
    out = tmp_path / "rows.json"
    run = subprocess.run(
        [sys.executable, *python, "env", "--json", str(out)],
        capture_output=True,
        text=True,
        timeout=120,
        env=mpi_environment() | changed,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return by_name(json.loads(out.read_text())), run.stdout


def test_a_machine_without_gpu_is_described(tmp_path):
    found, printed = bench_env(
        tmp_path, "-m", "mpisave.bench", SLURM_PROCID="0", CUDA_VISIBLE_DEVICES="7"
    )

    assert found["mpisave"][0] == mpisave.__version__
    assert "MPI" in found["MPI library"][0]
    assert Path(found["libmpi"][0]).name.startswith("libmpi")
    assert found["CUDA-aware, it says"][0] == "no"
    assert found["launcher variables"] == (1, "SLURM_PROCID")
    assert "CUDA_VISIBLE_DEVICES=7" in found["settings"][1]
    assert found["cores"][0] >= 1
    assert found["memory"][0] > 0.1
    assert list(found)[-4:-1] == ["cores", "memory", "locked memory"]
    assert printed.splitlines()[0].split() == ["what", "value", "note"]


WITHOUT = """
import importlib.abc, sys
class Nothing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in ("mpi4py", "cupy", "h5py"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Nothing())
"""


def test_a_machine_without_mpi_cupy_and_h5py_is_described(tmp_path):
    # For the processes that it starts, too.
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)

    found, _ = bench_env(
        tmp_path, "-m", "mpisave.bench", PYTHONPATH=f"{tmp_path}:{Path.cwd()}"
    )

    assert found["h5py"] == (None, "No module named 'h5py'")
    assert found["MPI library"][0] is None
    assert "No module named 'mpi4py'" in found["MPI library"][1]
    assert found["device memory in MPI"][0] is None
    assert found["CuPy"][0] is None
    assert "mpisave[cuda12]" in found["CuPy"][1]


@pytest.mark.parametrize(
    ("code", "words"),
    [(1, "ended with status 1: PMI is gone"), (None, "not started in time")],
)
def test_mpi_that_does_not_start_is_no_failure(monkeypatch, code, words):
    monkeypatch.setattr(env, "run_alone", lambda *_: (code, "", "x\nPMI is gone\n\n"))

    found = by_name(env._mpi())

    assert found["MPI library"][0] is None
    assert words in found["MPI library"][1]


@pytest.mark.parametrize(
    ("works", "value"), [(True, "works"), (False, "does not work"), (None, None)]
)
def test_trial_is_shown(monkeypatch, works, value):
    monkeypatch.setattr(env, "trial", lambda _: Trial(works, "so"))

    assert env._trial() == {
        "what": "device memory in MPI",
        "value": value,
        "note": "so",
    }


@pytest.fixture
def fake_cupy(monkeypatch):
    monkeypatch.syspath_prepend(WITHOUT_DEVICE)
    monkeypatch.setattr(env, "_COPIED_NBYTES", 2**20)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    yield __import__("cupy")
    sys.modules.pop("cupy")


def test_copies_of_each_gpu_are_measured_both_ways(fake_cupy):
    found = by_name(env._cupy(repeats=2))

    assert found["CuPy"][0] == "0 (fake)"
    assert found["CUDA runtime"][0] == "13.2"
    copies = [
        *("pinned to device", "device to pinned", "pageable to device"),
        *("device to pageable", "device to device"),
    ]
    names = [f"GPU {ordinal}: {copy}" for ordinal in (0, 1) for copy in copies]
    assert list(found)[2:] == names
    for name in names:
        assert found[name][0] > 0
        assert found[name][1] == "GB/s, median of 2, 1 MiB"


def test_copies_go_where_the_row_says(fake_cupy, monkeypatch):
    kinds = []
    memcpy = fake_cupy.cuda.runtime.memcpy

    def watched(target, source, nbytes, kind):
        assert target != source
        kinds.append(kind)
        memcpy(target, source, nbytes, kind)

    monkeypatch.setattr(fake_cupy.cuda.runtime, "memcpy", watched)

    env._copies(fake_cupy, 0, repeats=1)

    assert kinds == [1, 1, 2, 2, 1, 1, 2, 2, 3, 3]


def test_gpu_that_cannot_be_used_is_said_and_the_others_are_measured(
    fake_cupy, monkeypatch
):
    def memcpy(target, source, nbytes, kind):
        raise MemoryError("out of memory:\n allocating")

    monkeypatch.setattr(fake_cupy.cuda.runtime, "memcpy", memcpy)

    found = by_name(env._cupy(repeats=1))

    for ordinal in (0, 1):
        copies = found[f"GPU {ordinal}: copies"]
        assert copies == (None, "out of memory: allocating")


def test_cupy_without_a_device_says_so(fake_cupy, monkeypatch):
    monkeypatch.setattr(fake_cupy, "BEFALLS", "no device")

    found = by_name(env._cupy(repeats=1))

    why = "cudaErrorNoDevice: no CUDA-capable device"
    assert found["CUDA runtime"] == (None, why)


DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return INIT; }
int cuDriverGetVersion(int *n) { *n = 13010; return 0; }
int cuDeviceGetCount(int *n) { *n = 2; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 40 + ordinal; return 0; }
int cuDeviceGetName(char *name, int length, int device) {
    strcpy(name, "Fake 80GB"); return device == 41 ? 999 : 0; }
int cuDeviceTotalMem_v2(size_t *n, int device) { *n = (size_t)1 << 33; return 0; }
int cuDeviceGetPCIBusId(char *id, int length, int device) {
    strcpy(id, "0000:3B:00.0"); return 0; }
int cuDeviceGetAttribute(int *n, int attribute, int device) {
    *n = attribute == 20 ? 3 : -1; return 0; }
int cuCtxGetDevice(int *n) { *n = 1; return CONTEXT; }
"""


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Return a function that puts a driver in place, made of C."""

    def build(init=0, context=0):
        (tmp_path / "x.c").write_text(DRIVER)
        library = tmp_path / "libcuda.so.1"
        macros = [f"-DINIT={init}", f"-DCONTEXT={context}"]
        compiled = subprocess.run(
            ["cc", "-shared", "-fPIC", *macros, "-o", library, tmp_path / "x.c"]
        )
        if compiled.returncode:
            pytest.skip("no C compiler")
        cdll = env.ctypes.CDLL
        monkeypatch.setattr(
            env.ctypes,
            "CDLL",
            lambda name: cdll(str(library) if name == "libcuda.so.1" else name),
        )

    return build


def test_driver_says_which_gpus_there_are(driver):
    driver()

    found = by_name(env._driver())

    assert found["CUDA driver"][0] == "13.1"
    assert found["GPUs"][0] == 2
    about = "8.0 GiB, 0000:3B:00.0, compute mode exclusive process"
    assert found["GPU 0"] == ("Fake 80GB", about)
    assert found["GPU 1"] == (None, "the driver fails with errors [0, 999, 0, 0, 0]")


def test_driver_that_does_not_start_says_with_which_error(driver):
    driver(init=100)

    assert by_name(env._driver()) == {
        "CUDA driver": (None, "cuInit fails with error 100")
    }


@pytest.mark.parametrize(("context", "ordinal"), [(0, 1), (201, None)])
def test_device_of_this_thread_is_that_of_its_context(driver, context, ordinal):
    driver(context=context)

    assert current_device() == ordinal
