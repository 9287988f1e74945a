"""What this machine has: versions, MPI and device memory, GPUs and their copies."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import mpisave
from mpisave.bench.states import MIB
from mpisave.cuda_aware import (
    TRIAL_S,
    ask,
    launch_variables,
    mapped_libraries,
    run_alone,
    trial,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from mpisave.bench.turns import Row

_GIB = 2**30
_COPIED_NBYTES = 256 * MIB

# What decides how device memory travels; the values are shown.
_SETTINGS = (
    *("CUDA_VISIBLE_DEVICES", "UCX_TLS", "UCX_MEMTYPE_CACHE", "MPI4PY_LIBMPI"),
    *("OMPI_MCA_pml", "OMPI_MCA_btl", "OMPI_MCA_opal_cuda_support"),
    *("MPICH_GPU_SUPPORT_ENABLED", "MV2_USE_CUDA", "I_MPI_OFFLOAD", "PSP_CUDA"),
)
# In a process of its own: some MPI libraries end a process in which they cannot start.
_ASKS_MPI = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from mpisave.bench.env import tell_of_mpi; tell_of_mpi()"
)
_MARK = "mpisave env: "

# cuda.h: CUdevice_attribute, CUcomputemode
_COMPUTE_MODE = 20
_COMPUTE_MODES = {0: "default", 2: "prohibited", 3: "exclusive process"}


def bench_env(args: argparse.Namespace) -> list[Row]:
    """Return what is there, and why what is missing is not.

    Nothing of it needs a GPU, CuPy, MPI or mpirun.
    """
    return [
        *_software(),
        *_mpi(),
        # Before this process uses a device that may be for one process only.
        _trial(),
        *_driver(),
        *_cupy(args.repeats),
        *_host(),
    ]


def _row(what: str, value: object, note: str = "") -> Row:
    return {"what": what, "value": value, "note": note}


def _missing(what: str, why: object) -> Row:
    return _row(what, None, " ".join(str(why).split())[:300])


def _software() -> Iterator[Row]:
    yield _row("mpisave", mpisave.__version__)
    yield _row("Python", platform.python_version(), platform.platform())
    yield _row("NumPy", np.__version__)
    try:
        import h5py
    except ImportError as exc:
        yield _missing("h5py", exc)
    else:
        mpi = "with MPI" if h5py.get_config().mpi else "without MPI"
        yield _row("h5py", h5py.__version__, f"HDF5 {h5py.version.hdf5_version}, {mpi}")
    try:
        yield _row("mpi4py", importlib.metadata.version("mpi4py"))
    except importlib.metadata.PackageNotFoundError:
        yield _missing("mpi4py", "not installed: pip install 'mpisave[mpi]'")


# ---- MPI


def tell_of_mpi() -> None:
    """Print what MPI says of itself, as a process of its own."""
    from mpi4py import MPI

    answer = ask(MPI.COMM_WORLD)  # noqa: TID251 - a program, not a library
    found = {
        "library": MPI.Get_library_version().splitlines()[0].strip(" \0"),
        "standard": ".".join(map(str, MPI.Get_version())),
        "paths": mapped_libraries(),
        "says": answer.says,
        "how": answer.how,
    }
    print(f"\n{_MARK}{json.dumps(found)}", flush=True)


def _mpi() -> Iterator[Row]:
    path = json.dumps([str(entry) for entry in sys.path])
    command = [sys.executable, "-c", _ASKS_MPI, path]
    code, out, err = run_alone(command, TRIAL_S)
    told = [line[len(_MARK) :] for line in out.splitlines() if line.startswith(_MARK)]
    if told:
        found = json.loads(told[-1])
        name = " ".join(found["library"].partition(",")[0].split())
        yield _row("MPI library", name, f"MPI {found['standard']}")
        yield _row("libmpi", next(iter(found["paths"]), None))
        says = {True: "yes", False: "no", None: "unknown"}[found["says"]]
        yield _row("CUDA-aware, it says", says, found["how"])
    else:
        words = [line for line in (out + err).splitlines() if line.strip()]
        last = words[-1] if words else "without a word"
        ended = "not started in time" if code is None else f"ended with status {code}"
        yield _missing("MPI library", f"{ended}: {last}")
    seen = launch_variables(os.environ)
    names = ", ".join(seen[:6]) + (", ..." if len(seen) > 6 else "")
    yield _row("launcher variables", len(seen), names)
    values = [f"{name}={os.environ[name]}" for name in _SETTINGS if name in os.environ]
    yield _row("settings", len(values), " ".join(values))


def _trial() -> Row:
    found = trial(TRIAL_S)
    value = {True: "works", False: "does not work", None: None}[found.works]
    return _row("device memory in MPI", value, found.how)


# ---- GPUs


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _driver() -> Iterator[Row]:
    """Ask the driver, which needs no CuPy."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as exc:
        yield _missing("CUDA driver", exc)
        return
    number = ctypes.c_int()
    code = cuda.cuInit(0)
    if code:
        yield _missing("CUDA driver", f"cuInit fails with error {code}")
        return
    cuda.cuDriverGetVersion(ctypes.byref(number))
    kernel = Path("/sys/module/nvidia/version")
    release = f"NVIDIA {kernel.read_text().strip()}" if kernel.exists() else ""
    yield _row("CUDA driver", _version(number.value), release)
    cuda.cuDeviceGetCount(ctypes.byref(number))
    yield _row("GPUs", number.value)
    for ordinal in range(number.value):
        yield _gpu(cuda, ordinal)


def _gpu(cuda: Any, ordinal: int) -> Row:
    device, mode = ctypes.c_int(), ctypes.c_int()
    name, bus = ctypes.create_string_buffer(100), ctypes.create_string_buffer(32)
    nbytes = ctypes.c_size_t()
    codes = [
        cuda.cuDeviceGet(ctypes.byref(device), ordinal),
        cuda.cuDeviceGetName(name, len(name), device),
        cuda.cuDeviceTotalMem_v2(ctypes.byref(nbytes), device),
        cuda.cuDeviceGetPCIBusId(bus, len(bus), device),
        cuda.cuDeviceGetAttribute(ctypes.byref(mode), _COMPUTE_MODE, device),
    ]
    if any(codes):
        return _missing(f"GPU {ordinal}", f"the driver fails with errors {codes}")
    about = _COMPUTE_MODES.get(mode.value, mode.value)
    return _row(
        f"GPU {ordinal}",
        name.value.decode(errors="replace"),
        f"{nbytes.value / _GIB:.1f} GiB, {bus.value.decode()}, compute mode {about}",
    )


def _cupy(repeats: int) -> Iterator[Row]:
    try:
        import cupy
    except ImportError as exc:
        advice = "pip install 'mpisave[cuda12]' or 'mpisave[cuda13]'"
        yield _missing("CuPy", f"{exc}: {advice}")
        return
    yield _row("CuPy", cupy.__version__)
    try:
        runtime = _version(cupy.cuda.runtime.runtimeGetVersion())
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as exc:  # noqa: BLE001 - whatever CUDA has against it
        yield _missing("CUDA runtime", exc)
        return
    yield _row("CUDA runtime", runtime)
    for ordinal in range(count):
        yield from _speeds(cupy, ordinal, repeats)


def _speeds(cupy: Any, ordinal: int, repeats: int) -> Iterator[Row]:
    note = f"GB/s, median of {repeats}, {_COPIED_NBYTES // MIB} MiB"
    try:
        for name, gb_per_s in _copies(cupy, ordinal, repeats).items():
            yield _row(f"GPU {ordinal}: {name}", gb_per_s, note)
    except Exception as exc:  # noqa: BLE001 - such as no memory: of the others still
        yield _missing(f"GPU {ordinal}: copies", exc)


def _copies(cupy: Any, ordinal: int, repeats: int) -> dict[str, float]:
    """Return GB/s of copies from host to device, back, and within the device."""
    runtime = cupy.cuda.runtime
    up, down = runtime.memcpyHostToDevice, runtime.memcpyDeviceToHost
    nbytes = _COPIED_NBYTES
    found = {}
    with cupy.cuda.Device(ordinal):
        first, second = (cupy.empty(nbytes, np.uint8) for _ in range(2))
        memory = cupy.cuda.alloc_pinned_memory(nbytes)
        pinned = np.frombuffer(memory, np.uint8, nbytes)
        pageable = np.empty(nbytes, np.uint8)
        pinned[:] = pageable[:] = 1  # to have its pages
        device, within = first.data.ptr, runtime.memcpyDeviceToDevice
        for name, target, source, kind in (
            ("pinned to device", device, pinned.ctypes.data, up),
            ("device to pinned", pinned.ctypes.data, device, down),
            ("pageable to device", device, pageable.ctypes.data, up),
            ("device to pageable", pageable.ctypes.data, device, down),
            ("device to device", second.data.ptr, device, within),
        ):
            times = []
            for _ in range(repeats + 1):  # the first warms up
                runtime.deviceSynchronize()
                began = time.perf_counter()
                runtime.memcpy(target, source, nbytes, kind)
                runtime.deviceSynchronize()
                times.append(time.perf_counter() - began)
            found[name] = nbytes / statistics.median(times[1:]) / 1e9
        del first, second, pinned, memory
        cupy.get_default_memory_pool().free_all_blocks()
        cupy.get_default_pinned_memory_pool().free_all_blocks()
    return found


# ---- the host


def _host() -> Iterator[Row]:
    yield _row("cores", len(os.sched_getaffinity(0)), f"of {os.cpu_count()}")
    nbytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield _row("memory", nbytes / _GIB, "GiB")
    soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        yield _row("locked memory", "unlimited", "ulimit -l")
    else:
        yield _row("locked memory", soft / MIB, "MiB, ulimit -l")
    place = "/dev/shm"  # noqa: S108 - where MPI libraries have shared memory
    try:
        shm = shutil.disk_usage(place)
    except OSError as exc:
        yield _missing(place, exc)
    else:
        yield _row(place, shm.total / _GIB, f"GiB, {shm.free / _GIB:.4g} free")
