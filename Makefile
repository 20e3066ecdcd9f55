# One environment, .venv, made here and brought up to date whenever pyproject.toml changes. `make` alone lists what there is.
#
#   PYTHON=python3.12   the interpreter the environment is made from (3.11 or newer)
#   EXTRAS=gpu,hub      what is installed beside the base (default cpu,hub,serve)
#   VENV=elsewhere      another place for the environment
#   ARGS='...'          passed on to the command of the target

SHELL  := /bin/bash
PYTHON ?= python3
EXTRAS ?= cpu,hub,serve
VENV   ?= .venv
ARGS   ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

# One line a package that is fetched, out of all that pip says.
PROGRESS := /^ *Downloading .*\(/ { print "    " $$2, $$3, $$4; fflush() }
PROGRESS += /^ *Processing .*\.whl/ { n = split($$2, path, "/"); print "    " path[n]; fflush() }
PROGRESS += /does not provide the extra/ { print; fflush() }

# $(call install,WHAT TO SAY,PIP ARGUMENTS): says what comes and how far it is; the log has the rest, and is shown when pip fails.
define install
@echo "==> $(1)"
@set -o pipefail; $(PIP) install $(2) </dev/null 2>&1 | tee $(VENV)/install.log | awk '$(PROGRESS)' || { \
    grep -v '^WARNING: Location' $(VENV)/install.log | tail -n 12 >&2; echo "the whole of it: $(VENV)/install.log" >&2; exit 1; }
endef

# Where there is a C++ compiler, what runs a model builds the native kernels first; tests and figures insist on them, people need not.
NATIVE := $(if $(shell command -v $(CXX)),$(VENV)/.kernels)
KERNEL_FILES := $(shell find kernels -name build -prune -o -type f -print)

.PHONY: help chat serve story test lint kernels wheels sanitise arm count arm-tools count-tools docs bench clean native browser always
.NOTPARALLEL:
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

chat: $(VENV)/.run native  ## set everything up, then talk to the starter model (other models: ARGS='MODEL --prompt ...')
	@$(BIN)/ernie chat $(ARGS)

serve: $(VENV)/.run native  ## set everything up, then serve the starter model on http://127.0.0.1:8000 (others: ARGS='MODEL --port ...')
	@$(BIN)/ernie serve $(ARGS)

story: $(VENV)/.story native  ## train a small model that sees, from nothing to a served chat, in about half an hour (ARGS=--quick: minutes)
	$(BIN)/python -m story $(if $(findstring --quick,$(ARGS))$(findstring --scale,$(ARGS)),,--publish .) $(ARGS)

test: $(VENV)/.test $(NATIVE) browser  ## set up what the tests need, then run all of them, one process a core
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal $(ARGS)

lint: $(VENV)/.lint  ## style, types, import contracts and the house rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/contracts

docs: $(VENV)/.docs  ## build the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

bench: $(VENV)/.bench $(NATIVE)  ## measure speed and memory beside transformers, in one run
	$(BIN)/python benchmarks/run.py $(ARGS)

kernels: $(VENV)/.kernels  ## build and install the native kernels (needs a C++20 compiler; without them everything runs, slower)

native: $(VENV)/.run
	@[ -z "$(NATIVE)" ] || $(MAKE) --no-print-directory $(VENV)/.kernels || \
	    echo "==> the native kernels could not be built ($(VENV)/install.log says why); everything runs without them, quantised models slower" >&2

wheels: $(VENV)/.run  ## build the wheels of ernie45 and its native kernels into dist/ (needs a C++20 compiler)
	$(call install,tools to build the native kernels,--group kernels)
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist ./kernels
	@ls dist/*.whl

sanitise:  ## run the kernels' own check under the sanitisers: address and undefined behaviour, then threads
	cmake -S kernels -B build/sanitise -DERNIE45_SANITISE=address,undefined
	cmake --build build/sanitise --parallel 2
	build/sanitise/check
	cmake -S kernels -B build/threads -DERNIE45_SANITISE=thread
	cmake --build build/threads --parallel 2
	build/threads/check step

arm: arm-tools  ## build the kernels' own check for ARM and run it emulated: NEON must give the bits of the plain kernels
	cmake -S kernels -B build/arm -DERNIE45_CHECK=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static
	cmake --build build/arm --parallel 2 --target check
	qemu-aarch64 -cpu max build/arm/check

count: count-tools  ## count the kernels' instructions under valgrind and compare with the record
	cmake -S kernels -B build/count -DERNIE45_CHECK=ON
	cmake --build build/count --parallel 2 --target count
	$(PYTHON) kernels/tests/count.py build/count $(ARGS)

arm-tools: PACKAGES = g++-aarch64-linux-gnu qemu-user cmake
arm-tools: PROGRAMS = aarch64-linux-gnu-g++ qemu-aarch64 cmake
count-tools: PACKAGES = valgrind cmake
count-tools: PROGRAMS = valgrind cmake
arm-tools count-tools:
	@command -v $(PROGRAMS) >/dev/null 2>&1 && [ $$(command -v $(PROGRAMS) | wc -l) = $(words $(PROGRAMS)) ] || \
	    { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
	      apt-get install -y -qq --no-install-recommends $(PACKAGES) >/dev/null; } || \
	    { echo "this needs: apt-get install $(PACKAGES)" >&2; exit 1; }

# The web page is tested in a real browser; Debian and Ubuntu have one as a package.
BROWSER := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
browser:
ifeq ($(BROWSER),)
	@{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "==> chromium, for the tests of the web page" && \
	    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; } || \
	    { echo "the tests of the web page need chromium: apt-get install chromium" >&2; exit 1; }
endif

clean:  ## remove the environment and everything that was built; models in the cache stay
	rm -rf $(VENV) site build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find ernie45 tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# The stamps: each says that a set of packages stands as the pyproject.toml of that moment asked for.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "ernie45 needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -n 1). Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "==> environment $(VENV), from $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV) || { echo "could not make an environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

# `pip install --group` came with pip 25.1; what a new environment carries is often older.
$(VENV)/.pip: | $(BIN)/python
	$(call install,pip,--quiet --upgrade 'pip>=25.1')
	@touch $@

# Other extras than last time: install again. The file changes only when its content does.
$(VENV)/.extras: always | $(BIN)/python
	@echo '$(EXTRAS)' | cmp -s - $@ || echo '$(EXTRAS)' >$@

$(VENV)/.run: pyproject.toml $(VENV)/.pip $(VENV)/.extras
	$(call install,ernie45 and PyTorch (the first time this takes minutes),--editable '.[$(EXTRAS)]')
	@touch $@

$(VENV)/.kernels: $(KERNEL_FILES) $(VENV)/.run
	$(call install,tools to build the native kernels,--group kernels)
	$(call install,native kernels (compiling takes a minute or two),--no-build-isolation --no-deps --force-reinstall ./kernels)
	@touch $@

$(VENV)/.test $(VENV)/.lint $(VENV)/.docs $(VENV)/.bench $(VENV)/.story: $(VENV)/.%: $(VENV)/.run
	$(call install,packages for make $*,--group $*)
	@touch $@
