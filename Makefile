# `make demo` and `make test` are all a newcomer needs; each makes its own virtual environment and installs what it uses.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
CONSTRAINTS = deploy/constraints.txt
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed
RESULTS = tests/benchmarks/results
JOBS ?= 3
# Test files that run at once. Many tests wait for processes: three files on two quiet cores are a fifth faster than two.
AT_ONCE = -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Hundreds of processes of the tests import the same modules: compile each once, whatever the environment says.
export PYTHONDONTWRITEBYTECODE =

# What `make test` leaves to `make test-all`: it takes long, or needs more than Python (pyproject.toml describes the markers).
QUICK = not (cluster or simulator or browser or images or gpu or slow)

.PHONY: demo success test test-fast test-all test-busy test-sim test-remote test-cluster test-images test-faults lint clean install bench bench-peers bench-gpu bench-prepare soak soak-sim help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 16

install: $(INSTALLED)  ## virtual environment with the trainer and the test tools

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c $(CONSTRAINTS) -e '.[train,dev]'
	$(BIN)/python -m pip install --quiet --no-deps -c $(CONSTRAINTS) openpi-client  # a test's client; it wants numpy 1, and runs with 2
	touch $@

demo: $(INSTALLED)  ## two loaders, two DeepSpeed ZeRO-3 ranks, real demonstrations, export
	$(BIN)/python deploy/demo.py

success: $(VENV)/.installed-sim  ## demonstrations, training, closed-loop success in four tasks (70 minutes on 2 cores; SUCCESS="--task PushCube-v1 ...")
	$(BIN)/python deploy/success.py $(SUCCESS)

test: $(INSTALLED)  ## the test suite, without what is slow or needs more than Python
	$(BIN)/python -m pytest $(AT_ONCE) -m "$(QUICK)"

test-fast: $(INSTALLED)  ## only tests that start no process and take a moment each: under a minute
	$(BIN)/python -m pytest $(AT_ONCE) -m "$(QUICK) and not (process or long)" --ignore=tests/deploy --ignore=tests/end_to_end

test-all: $(INSTALLED)  ## everything that this machine can run; what it cannot is skipped with the reason
	$(BIN)/python -m pytest

test-busy: $(INSTALLED)  ## `make test` beside five busy loops per core
	$(BIN)/python -m tests.support.busy $(BIN)/python -m pytest $(AT_ONCE) -m "$(QUICK)"

test-remote: $(INSTALLED)  ## s3:// and gs:// against servers of these APIs on loopback
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[test-remote]'
	$(BIN)/python -m pytest tests/loader_service/remote/test_buckets.py

test-sim: $(VENV)/.installed-sim  ## collector and evaluator in the real simulator (needs the renderer: trainer/sim/install_renderer.sh)
	$(BIN)/python -m pytest tests/trainer/sim

$(VENV)/.installed-sim: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[sim]'
	touch $@

test-cluster: $(INSTALLED)  ## Ray nodes that are killed, two network namespaces, Slurm (minutes; as root, with slurm-wlm and munge)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[ray]'
	$(BIN)/python -m pytest -m cluster

test-images: $(INSTALLED)  ## both images built without a daemon, the services of compose.yaml run in them, the units under systemd (root; minutes)
	$(BIN)/python -m pytest tests/deploy/images

test-faults: $(INSTALLED)  ## every fault on real processes, the slow ones too (a DeepSpeed run that is killed; as root: pulled cables)
	$(BIN)/python -m pytest tests/end_to_end/faults

lint: $(INSTALLED)  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)  ## loader CPU per sample against a hand-tuned pipeline and a plain DataLoader
	$(BIN)/python tests/benchmarks/loader_cost.py

bench-peers: $(INSTALLED)  ## Stoker beside torch, tf.data service, Ray Data, SPDL, Grain, LeRobot's loader (half an hour, 12 GB; PEERS="--only stoker,torch")
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[bench]'
	$(BIN)/python tests/benchmarks/peers/bench.py --json $(RESULTS)/peers.json --markdown $(RESULTS)/peers.md --plot $(RESULTS)/peers.png $(PEERS)

bench-gpu:  ## on one GPU, under 8 minutes, nothing is installed: parity, loaders, LoRA, ZeRO-3 (BENCH_GPU=--tiny tries it on a CPU)
	$(PYTHON) tests/benchmarks/gpu.py $(BENCH_GPU)

bench-prepare: $(INSTALLED)  ## loader-prepare on 100,000 synthetic trajectories
	$(BIN)/python tests/benchmarks/prepare_scale.py

soak: $(INSTALLED)  ## SOAK_MINUTES (30) of real loaders and a client, SOAK_KILLS (100) kills: digests, memory, descriptors
	$(BIN)/python -m tests.end_to_end.faults.soak

soak-sim: $(INSTALLED)  ## SOAK_SEEDS (200,000) fresh schedules of faults against the client's core
	$(BIN)/python -m tests.faults.soak

clean:  ## remove everything that the targets above made
	rm -rf $(VENV) build dist outputs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find tests -name .stoker -type d -prune -exec rm -rf {} +
