"""Whether MPI may be given device memory: what it says, and trials that end badly."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import mpi_environment, mpirun

from mpisave import cuda_aware
from mpisave.cuda_aware import Answer, Trial, ask

WITHOUT_DEVICE = Path(__file__).parents[1] / "without_device"


class World:
    """A communicator that is asked for its info only."""

    def __init__(self, items=None, error=None):
        self.items = items or {}
        self.error = error
        self.freed = 0

    def Get_info(self):
        if self.error:
            raise self.error
        return self

    def Get(self, key):
        return self.items.get(key)

    def Free(self):
        self.freed += 1


KINDS = "mpi_memory_alloc_kinds"
SILENT = Answer(None, "no MPIX_Query_cuda_support")


@pytest.fixture
def query(monkeypatch):
    """Have the extension of the library answer what is set, and no switch be set."""

    def answers(answer):
        monkeypatch.setattr(cuda_aware, "_by_query", lambda _paths: answer)

    for name in cuda_aware._SWITCHES:
        monkeypatch.delenv(name, raising=False)
    answers(SILENT)
    return answers


# What the library says


@pytest.mark.parametrize(
    ("kinds", "says"),
    [
        ("mpi,system,cuda:device,cuda:managed", True),
        ("system, cuda", True),
        ("mpi,system", False),
        ("mpi,system,rocm:device,level_zero", False),
        ("", False),
    ],
)
def test_info_of_the_world_says_which_kinds_of_memory_there_are(query, kinds, says):
    world = World({KINDS: kinds})

    assert ask(world) == Answer(says, f"{KINDS} = {kinds}")
    assert world.freed == 1


@pytest.mark.parametrize("world", [World(), World(error=RuntimeError("no world"))])
def test_library_that_says_nothing_is_unknown(query, world):
    assert ask(world) == Answer(None, "the MPI library does not say")


@pytest.mark.parametrize("says", [True, False])
def test_extension_is_asked_where_the_info_is_silent(query, says):
    query(Answer(says, f"MPIX_Query_cuda_support = {says:d}"))

    assert ask(World()) == Answer(says, f"MPIX_Query_cuda_support = {says:d}")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("MPICH_GPU_SUPPORT_ENABLED", "1", True),
        ("MPICH_GPU_SUPPORT_ENABLED", "0", False),
        ("MV2_USE_CUDA", "1", True),
        ("I_MPI_OFFLOAD", "2", True),
        ("PSP_CUDA", " 1 ", True),
        ("PSP_CUDA", "", None),
        ("MV2_USE_CUDA", "maybe", None),
    ],
)
def test_switches_are_looked_at_last(query, monkeypatch, name, value, says):
    monkeypatch.setenv(name, value)

    found = ask(World())

    assert found.says is says
    assert says is None or found.how == f"{name}={value.strip()}"


def test_two_sources_that_disagree_are_unknown_and_both_named(query, monkeypatch):
    query(Answer(False, "MPIX_GPU_query_support = 0"))
    monkeypatch.setenv("MPICH_GPU_SUPPORT_ENABLED", "1")

    found = ask(World())

    how = "MPIX_GPU_query_support = 0 but MPICH_GPU_SUPPORT_ENABLED=1"
    assert found == Answer(None, how)


def test_info_without_cuda_is_no_word_against_a_library_that_says_yes(query):
    query(Answer(True, "MPIX_Query_cuda_support = 1"))

    assert ask(World({KINDS: "mpi,system"})).says is None


def test_info_with_cuda_is_believed_whatever_else_is_said(query, monkeypatch):
    query(Answer(False, "MPIX_Query_cuda_support = 0"))

    assert ask(World({KINDS: "cuda"})).says is True


C_OF_MPICH = "int MPIX_GPU_query_support(int k, int *f) {{ *f = k == 0; return {}; }}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("int MPIX_Query_cuda_support(void) { return 1; }", True),
        ("int MPIX_Query_cuda_support(void) { return 0; }", False),
        (C_OF_MPICH.format(0), True),
        (C_OF_MPICH.format(15), None),
        # MPICH 3.4: to ask the second is the end.
        (
            C_OF_MPICH.format(15)
            + "void abort(void); int MPIX_Query_cuda_support(void) { abort(); }",
            None,
        ),
        ("int MPI_Init(void) { return 0; }", None),
    ],
)
def test_extension_of_a_library_is_called(tmp_path, source, expected):
    (tmp_path / "x.c").write_text(source)
    library = tmp_path / "libmpi.so.99"
    compiled = subprocess.run(
        ["cc", "-shared", "-fPIC", "-w", "-o", library, tmp_path / "x.c"]
    )
    if compiled.returncode:
        pytest.skip("no C compiler")

    found = cuda_aware._by_query([str(tmp_path / "none.so"), str(library)])

    assert found.says is expected


def test_wheels_of_this_environment_say_no():
    script = (
        "from mpi4py import MPI; from mpisave import cuda_aware as c; "
        "print(c.ask(MPI.COMM_WORLD), c._by_query(c.mapped_libraries()), "
        "c.mapped_libraries()[0])"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=mpi_environment(),
    )

    assert run.stdout.count("says=False") == 2, run.stdout + run.stderr
    assert "/libmpi.so" in run.stdout


# The environment of a process alone


def test_launch_variables_go_and_settings_stay():
    launch = {
        *("PMI_RANK", "PMI_FD", "PMI2_X", "PMIX_RANK", "PMIX_NAMESPACE"),
        *("PMIX_SERVER_URI41", "PRTE_LAUNCHED", "HYDI_CONTROL_FD", "HYDRA_X"),
        *("MPI_LOCALRANKID", "OMPI_COMM_WORLD_RANK", "OMPI_UNIVERSE_SIZE"),
        *("OMPI_MCA_ess", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_hnp_uri"),
        *("OMPI_MCA_pmix", "OMPI_MCA_num_procs", "OMPI_MCA_PREFIXES"),
        *("MV2_COMM_WORLD_RANK", "SLURM_PROCID", "SLURM_JOB_ID", "FLUX_TASK_RANK"),
        *("PALS_RANKID", "JSM_NAMESPACE_RANK"),
    }
    settings = {
        *("OMPI_MCA_pml", "OMPI_MCA_btl", "OMPI_MCA_opal_cuda_support"),
        *("OMPI_ALLOW_RUN_AS_ROOT", "OPAL_PREFIX", "PMIX_PREFIX", "PRTE_PREFIX"),
        *("PMIX_MCA_gds", "PRTE_MCA_rmaps_default_mapping_policy", "UCX_TLS"),
        *("MPICH_GPU_SUPPORT_ENABLED", "MPIR_CVAR_ENABLE_GPU", "MV2_USE_CUDA"),
        *("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "MPI4PY_LIBMPI", "I_MPI_OFFLOAD"),
        *("SLINGSHOT_VNIS", "HOME", "FI_PROVIDER"),
    }
    environ = dict.fromkeys(launch | settings, "x")

    assert set(cuda_aware.environment_alone(environ)) == settings
    assert cuda_aware.launch_variables(environ) == sorted(launch)


# Trials


@pytest.fixture
def child(monkeypatch):
    """Have a trial run a program of Python instead."""

    def runs(program):
        command = [sys.executable, "-c", program]
        monkeypatch.setattr(cuda_aware, "_command", lambda _ordinal: command)

    return runs


SENDS = (
    "from mpisave.cuda_trial import _tell; import os, sys; "
    "_tell(at='it gave MPI 64 bytes', sends=True); "
)
STARTS = (
    "from mpisave.cuda_trial import _tell, STARTS_MPI; import os; "
    "_tell(at=STARTS_MPI); "
)


@pytest.mark.parametrize(
    ("program", "works", "how"),
    [
        ("import os; os.kill(os.getpid(), 11)", False, "ended by SIGSEGV when it had"),
        (SENDS + "os.kill(os.getpid(), 11)", False, "SIGSEGV when it gave MPI 64 byt"),
        (SENDS + "os.abort()", False, "ended by SIGABRT when it gave MPI 64 bytes"),
        (SENDS + "os.kill(os.getpid(), 50)", False, "ended by 50 when it gave"),
        (SENDS + "sys.exit('MPI is over')", False, "status 1 .* 64 bytes: MPI is over"),
        (SENDS + "_tell(works=True, how='fine'); os.abort()", True, "fine"),
        (SENDS + "_tell(works=False, how='3 wrong')", False, "3 wrong"),
        (SENDS, False, "ended with status 0 when it gave MPI 64 bytes"),
        (STARTS + "os.abort()", None, "ended by SIGABRT when it started MPI"),
        (STARTS + "_tell(works=None, how='no device')", None, "no device"),
        ("", None, "ended with status 0 when it had said nothing"),
        ("import sys; sys.exit(7)", None, "ended with status 7"),
        ("print('mpisave trial: {{{\\n' * 9, chr(7), '[]')", None, "status 0"),
        ("print('mpisave trial: []\\nmpisave trial: 3')", None, "status 0"),
        ("import sys; sys.stdout.buffer.write(bytes(range(256)))", None, "status 0"),
        ("print('x' * 10**6); raise ValueError('why')", None, "ValueError: why$"),
    ],
)
def test_end_of_the_child_is_told_apart(child, program, works, how):
    child(program)

    found = cuda_aware.trial(30)

    assert found.works is works
    assert re.search(how, found.how), found.how
    assert len(found.how) < 400


def test_child_that_hangs_is_ended_with_all_that_it_started(child, tmp_path):
    pid = tmp_path / "pid"
    child(
        SENDS + "import subprocess, time; "
        f"p = subprocess.Popen(['sleep', '600']); open({str(pid)!r}, 'w')"
        ".write(str(p.pid)); time.sleep(600)"
    )
    began = time.monotonic()

    found = cuda_aware.trial(2)

    assert found == Trial(None, "not done after 2 s: it gave MPI 64 bytes")
    assert time.monotonic() - began < 20
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid.read_text()}/stat").exists():
        stat = Path(f"/proc/{pid.read_text()}/stat").read_text().split()
        if stat[2] == "Z":  # dead: nobody has waited for it
            break
        assert time.monotonic() < deadline, "what the child started lives on"
        time.sleep(0.05)


def test_child_reads_nothing_and_leaves_no_core(child):
    child(
        "import resource, sys; from mpisave import cuda_trial; "
        "assert sys.stdin.read() == ''; "
        "cuda_trial.main(None, cupy_first=True); "
        "assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0); "
        "cuda_trial._tell(works=True, how='none')"
    )

    assert cuda_aware.trial(30) == Trial(True, "none")


def test_child_that_cannot_be_started_is_no_trial(monkeypatch):
    monkeypatch.setattr(cuda_aware, "_command", lambda _: ["/nowhere/python"])

    found = cuda_aware.trial(5)

    assert found.works is None
    assert "no process could be started" in found.how


# The program itself, with memory of the host in place of a device's


@pytest.fixture
def fake_cupy(monkeypatch):
    def befalls(what):
        monkeypatch.syspath_prepend(WITHOUT_DEVICE)
        monkeypatch.setenv("FAKE_CUPY", what)
        for name, value in mpi_environment().items():
            monkeypatch.setenv(name, value)

    return befalls


def test_program_needs_cupy(fake_cupy, monkeypatch):
    fake_cupy("")
    path = [p for p in sys.path if Path(p) != WITHOUT_DEVICE]
    if subprocess.run([sys.executable, "-c", "import cupy"], stderr=-3).returncode == 0:
        pytest.skip("CuPy is installed")
    monkeypatch.setattr(sys, "path", path)

    assert cuda_aware.trial(60) == Trial(None, "no module cupy")


def test_program_sends_to_itself_in_every_way_and_says_on_which_device(fake_cupy):
    fake_cupy("")

    found = cuda_aware.trial(60, ordinal=3)

    assert found == Trial(True, "device 3 to itself, 64 B to 4 MiB")


@pytest.mark.parametrize(
    ("what", "works", "how"),
    [
        ("fault", False, "ended by SIGSEGV when it gave MPI 64 bytes of device memory"),
        ("wrong", False, "Sendrecv to the device delivered 3 wrong of 8192 bytes"),
        ("no device", None, "no device: cudaErrorNoDevice"),
    ],
)
@pytest.mark.parametrize("cupy_first", [True, False])
def test_program_says_what_befell_it(
    fake_cupy, monkeypatch, what, works, how, cupy_first
):
    fake_cupy(what)
    if cupy_first:
        monkeypatch.setitem(sys.modules, "cupy", None)
        monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)

    found = cuda_aware.trial(60)

    assert found.works is works
    assert how in found.how


def test_program_takes_the_order_in_which_this_process_has_loaded_things(monkeypatch):
    for name in ("cupy", "mpi4py.MPI"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    order = []
    for name in ("mpi4py.MPI", "cupy"):
        order.append('"cupy_first": true' in cuda_aware._command(None)[-1])
        monkeypatch.setitem(sys.modules, name, None)
    order.append('"cupy_first": true' in cuda_aware._command(None)[-1])
    monkeypatch.delitem(sys.modules, "mpi4py.MPI")
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", None)
    order.append('"cupy_first": true' in cuda_aware._command(None)[-1])

    assert order == [False, False, False, True]


@pytest.mark.parametrize("ranks", [1, 2])
def test_program_starts_alone_from_within_a_rank(tmp_path, ranks):
    script = tmp_path / "rank.py"
    script.write_text(
        "from mpi4py import MPI\n"
        "from mpisave import cuda_aware\n"
        f"assert MPI.COMM_WORLD.size == {ranks}\n"
        "found = MPI.COMM_WORLD.gather(cuda_aware.trial(60))\n"
        "if MPI.COMM_WORLD.rank == 0: print(found)\n"
    )
    path = os.pathsep.join([str(WITHOUT_DEVICE), *filter(None, sys.path)])

    run = subprocess.run(
        [*mpirun(), "-n", str(ranks), sys.executable, str(script)],
        env=mpi_environment() | {"PYTHONPATH": path, "FAKE_CUPY": ""},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=100,
    )

    assert run.stdout.count("works=True") == ranks, run.stdout + run.stderr
