# Everything here sets itself up: a virtual environment in .venv, the pinned packages, the native build.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= $(shell nproc)

.PHONY: demo test test-all check bench lint docs plots memcheck clean

demo: .venv/installed
	$(BIN)/python examples/demo.py $(if $(PLOT),--plot $(PLOT))

# As many processes as cores; what only a nightly run needs is left out.
test: .venv/installed
	$(BIN)/python -m pytest -n $(JOBS) -m "not nightly"

test-all: .venv/installed
	$(BIN)/python -m pytest -n $(JOBS)

check: .venv/installed
	$(BIN)/python -m ssu_bridge check

bench: .venv/installed
	$(BIN)/python -m ssu_bridge bench --device cpu

# The site, into build/site. Warnings are errors.
docs: .venv/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The plots of docs/benchmarks.md, from the recorded figures.
plots: .venv/installed
	for csv in docs/data/*.csv; do \
	  $(BIN)/python -m ssu_bridge bench --read $$csv --plot docs/images/$$(basename $$csv .csv).png || exit 1; \
	done

# On a machine with a GPU: calls of Torch's whose index tables hold anything touch no memory but their arrays'.
memcheck: .venv/installed
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
	  $(BIN)/python -m pytest -m gpu -k no_index_reaches tests/core/test_indices.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files "*.cc" "*.h")
	$(BIN)/mypy

# Where pip's torch is a build with CUDA, this installs gigabytes of it; any build of Torch's CPU version will do.
.venv/installed: pyproject.toml CMakeLists.txt requirements-ci.txt $(wildcard ssu_bridge/native/*.* ssu_bridge/native/*/*.*)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed: make PYTHON=..."'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements-ci.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps \
	  --config-settings=cmake.define.SSU_BRIDGE_WERROR=ON --editable .
	touch $@

.venv/docs-installed: .venv/installed requirements-docs.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-docs.txt
	touch $@

clean:
	rm -rf .venv build
