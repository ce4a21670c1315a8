# Every target sets up $(VENV) when it is missing, and again when pyproject.toml or constraints.txt changed.
#
#   make test PYTHON=python3.12     another interpreter
#   make test TORCH_INDEX=          PyTorch from the same place as all other packages (on Linux: the CUDA build)
#   make workshop OUT=class         another folder than workshop/

PYTHON      ?= python3
VENV        ?= .venv
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
OUT         ?= workshop

BIN     := $(VENV)/bin
PIP     := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip
FLAGS   := --quiet --retries 1 -c constraints.txt
FROM    := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
READY   := $(VENV)/.ready-notebooks
BOOK    := $(VENV)/.ready-book
DEV     := $(VENV)/.ready-dev
BROWSER := $(VENV)/.ready-browser
# Strict: every output that was stored has to come out again. One thread, so that sums are added in the same order.
# The longest cell trains. On two cores without bf16 instructions, beside other work, it took more than ten minutes.
NBVAL   := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --nbval --nbval-current-env \
           --nbval-cell-timeout 1500 --nbval-sanitize-with tests/sanitize.cfg

# Long lines of code wrap, so that nothing is cut off on a laptop. Settings that a user makes in JupyterLab go first.
LAB_SETTINGS := mkdir -p $(VENV)/share/jupyter/lab/settings && \
                cp notebooks/lab_settings.json $(VENV)/share/jupyter/lab/settings/overrides.json

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint unit nbval test-browser lab lab-solutions notebooks workshop doctor wheelhouse book live wheel clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## answer questions about pictures with the shipped model
	$(BIN)/minivlm demo

test: $(DEV) ## about half an hour: run lint, unit and nbval; all three, also where one of them fails
	@echo "make test: about half an hour on two cores"
	@failed=; $(BIN)/python docs/book/build.py --unless-current & \
	$(MAKE) --no-print-directory lint || failed=" lint"; wait; \
	for part in unit nbval; do $(MAKE) --no-print-directory $$part || failed="$$failed $$part"; done; \
	if [ -n "$$failed" ]; then echo "make test: failed in:$$failed" >&2; exit 1; fi

lint: $(DEV) ## check style, types and spelling
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m codespell_lib
	$(BIN)/python docs/live/check_types.py

unit: $(DEV) ## build the book, then run the tests
	$(BIN)/python docs/book/build.py --unless-current
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

nbval: $(DEV) ## run every notebook and compare what comes out with what is stored
	$(NBVAL) notebooks/

# BROWSER_ARGS="-m 'not slow'" leaves out the notebooks that take longest.
test-browser: $(BROWSER) ## run notebooks, book and hover page in Chromium (skipped where there is none)
	$(BIN)/python docs/book/build.py --unless-current
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -r s $(BROWSER_ARGS) tests/browser

notebooks: $(DEV) ## run every notebook from a clean kernel and store its outputs
	$(BIN)/python notebooks/execute.py

# As root, JupyterLab asks for LAB_ARGS=--allow-root; LAB_ARGS="--no-browser --port 9000" is for a machine elsewhere.
# What you write there stays: a notebook of mine/ is written once, and never again.
lab: $(READY) ## open your own copy of the notebooks, mine/, in JupyterLab: exercises to solve, solutions folded
	$(BIN)/minivlm workshop mine --keep --solutions
	@$(LAB_SETTINGS)
	$(BIN)/jupyter-lab $(LAB_ARGS) --LabApp.default_url=/lab/tree/mine/notebooks/00_tour.ipynb

lab-solutions: $(READY) ## open the notebooks themselves, solved, in JupyterLab
	@$(LAB_SETTINGS)
	$(BIN)/jupyter-lab $(LAB_ARGS) --LabApp.default_url=/lab/tree/notebooks/00_tour.ipynb

workshop: $(READY) ## write the notebooks for students into workshop/
	$(BIN)/minivlm workshop $(OUT)

doctor: $(READY) ## check that this machine is ready for the course
	$(BIN)/minivlm doctor

# As below, torch comes first and alone; the second step finds its wheel and takes no other build.
wheelhouse: $(READY) ## gather all wheels in wheelhouse/, for machines without a network like this one
	$(PIP) wheel $(FLAGS) --no-deps $(FROM) --wheel-dir wheelhouse torch
	$(PIP) wheel $(FLAGS) --find-links wheelhouse --wheel-dir wheelhouse ".[notebooks]"

book: $(BOOK) ## build the book, a static site, in build/book
	@echo "make book: about three minutes"
	$(BIN)/python docs/book/build.py

live: $(READY) ## build the page in which the model answers, in build/live: one folder, opened by a double click
	$(BIN)/python docs/live/build.py

wheel: $(DEV) ## build the package in dist, install it into an empty environment and run its demonstration
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python tests/try_wheel.py dist

clean: ## remove the environment, caches, wheelhouse/ and what `make demo` wrote (mine/, runs/ and workshop/ stay)
	rm -rf $(VENV) demo dist build wheelhouse .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# The environment. Each stamp says that one extra is installed as pyproject.toml and constraints.txt ask for.

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "minivlm needs Python 3.11 or newer, and '$(PYTHON)' is not:" \
	       "name one that is, for example: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)

# What PyTorch's own build asks for is known once it is there, before the larger part is fetched.
define WARN_OF_CUDA
import importlib.metadata as metadata, sys
if sys.platform == "linux" and any("nvidia" in name or "cuda" in name for name in metadata.requires("torch") or ()):
    print("This is PyTorch for NVIDIA GPUs, and pip is about to fetch CUDA: 5.1 GB in all instead of 1.4. To avoid it,")
    print("stop here with Ctrl-C, and run: make clean && make TORCH_INDEX=https://download.pytorch.org/whl/cpu lab")
endef
export WARN_OF_CUDA

# PyTorch comes first and alone: only this one package is looked up at $(TORCH_INDEX), and where that index is out of
# reach pip says so once and goes on without it. The second step keeps the build that the first one chose.
$(VENV)/.ready-torch: $(BIN)/python constraints.txt
	@echo "Setting up $(VENV) (the first time: about a minute, 1.4 GB) ..."
	$(PIP) install $(FLAGS) --no-deps $(FROM) torch
	@$(BIN)/python -c "$$WARN_OF_CUDA" >&2
	@touch $@

$(READY): $(VENV)/.ready-torch pyproject.toml constraints.txt
	$(PIP) install $(FLAGS) -e ".[notebooks]"
	@touch $@

$(BOOK): $(VENV)/.ready-torch pyproject.toml constraints.txt
	$(PIP) install $(FLAGS) -e ".[book]"
	@touch $@

$(DEV): $(VENV)/.ready-torch pyproject.toml constraints.txt
	$(PIP) install $(FLAGS) -e ".[dev]"
	@touch $(READY) $(BOOK) $@

$(BROWSER): $(VENV)/.ready-torch pyproject.toml constraints.txt
	$(PIP) install $(FLAGS) -e ".[browser]"
	@touch $(READY) $(BOOK) $(DEV) $@
