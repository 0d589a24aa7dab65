# Everything here sets itself up: a virtual environment in .venv, the pinned packages, the native build.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= $(shell nproc)

.PHONY: demo test test-all fuzz fuzz-gpu sanitize sanitize-gpu check bench bench-compare lint docs plots memcheck wheel test-wheel test-pages test-oldest test-newest clean

demo: .venv/installed
	$(BIN)/python examples/demo.py $(if $(PLOT),--plot $(PLOT))

# As many processes as cores, of which one that is done takes over tests of another; without what is marked nightly.
test: .venv/installed
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not nightly"

test-all: .venv/installed
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# Drawn calls against an oracle; each that goes wrong is printed as a script. SEED draws others.
CALLS ?= 20000
SEED ?= 0
fuzz: .venv/installed
	PYTHONPATH=tests $(BIN)/python -m fuzz --calls $(CALLS) --seed $(SEED) --jobs $(JOBS)

# The same on a GPU, for triton and xla.
fuzz-gpu: .venv/installed
	PYTHONPATH=tests $(BIN)/python -m fuzz --gpu --calls $(CALLS) --seed $(SEED) --jobs $(JOBS)

# The native part built with AddressSanitizer and UBSan (address) and with ThreadSanitizer (thread), under the fuzz.
SANITIZERS ?= address thread
SANITIZED_CALLS ?= 2000
sanitize: .venv/installed
	for name in $(SANITIZERS); do \
	  $(BIN)/python tools/sanitize.py $$name --calls $(SANITIZED_CALLS) --seed $(SEED) || exit 1; \
	done

check: .venv/installed
	$(BIN)/python -m ssu_bridge check

bench: .venv/installed
	$(BIN)/python -m ssu_bridge bench --device cpu

# What a change does to the speed: make bench-compare BASE=main builds that and HEAD in build/compare and runs both in turn.
BASE ?= HEAD~1
bench-compare: .venv/installed
	$(BIN)/python tools/bench_compare.py $(BASE) HEAD

# The site, into build/site. Warnings are errors.
docs: .venv/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The plots of docs/benchmarks.md and docs/reliability.md, from the recorded figures.
plots: .venv/installed
	for csv in docs/data/*.csv; do \
	  $(BIN)/python -m ssu_bridge bench --read $$csv --plot docs/images/$$(basename $$csv .csv).png || exit 1; \
	done
	$(BIN)/python tools/drift.py $(patsubst %,--read %,$(wildcard docs/data/drift/*.csv)) --plot docs/images/drift.png

# On a machine with a GPU: calls of Torch's whose index tables hold anything touch no memory but their arrays'.
memcheck: .venv/installed
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
	  $(BIN)/python -m pytest -m gpu -k no_index_reaches tests/core/test_indices.py

# The fuzz on a GPU under NVIDIA's sanitizers: memory (memcheck), and races in shared memory (racecheck).
GPU_TOOLS ?= memcheck racecheck
GPU_CALLS ?= 500
sanitize-gpu: .venv/installed
	for name in $(GPU_TOOLS); do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=tests compute-sanitizer --tool $$name --target-processes all --error-exitcode 9 \
	    $(BIN)/python -m fuzz --gpu --calls $(GPU_CALLS) --traced 0 --alike 10 --seed $(SEED) --jobs 1 || exit 1; \
	done

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files "*.cc" "*.h")
	$(BIN)/mypy

# Where pip's torch is a build with CUDA, this installs gigabytes of it; any build of Torch's CPU version will do.
.venv/installed: pyproject.toml CMakeLists.txt requirements-ci.txt $(wildcard ssu_bridge/native/*.* ssu_bridge/native/[a-z]*/*.*)
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

# A wheel for other machines, into build/wheels; WHEEL_FLAGS=--system-compiler makes it for this machine's glibc.
wheel: .venv/wheel-installed
	rm -rf build/wheels
	$(BIN)/python tools/build_wheel.py build/wheels $(WHEEL_FLAGS)

# Installs it in fresh environments. Where pip's torch is a build with CUDA, FRAMEWORKS="numpy jax torch" installs gigabytes.
PYTHONS ?= python3.11 python3.12 python3.13
FRAMEWORKS ?= numpy jax
test-wheel: wheel
	$(BIN)/python tools/test_wheel.py build/wheels $(PYTHONS:%=--python %) $(FRAMEWORKS:%=--framework %)

# The code of README.md and docs/, in fresh environments, each with no more than its page names.
test-pages: wheel
	$(BIN)/python tools/test_pages.py build/wheels

.venv/wheel-installed: .venv/installed requirements-wheel.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-wheel.txt
	touch $@

# The tests with the oldest versions that pyproject.toml allows, and with the newest; each in an environment of its own.
# The newest for that Python, of which later ones have later versions of JAX and NumPy: make test-newest PYTHON=python3.13.
test-oldest: build/oldest/installed
	build/oldest/bin/python -m pytest -n $(JOBS) -m "not nightly" $(TESTS)

test-newest: build/newest/installed
	build/newest/bin/python -m pytest -n $(JOBS) -m "not nightly" $(TESTS)

build/%/installed: pyproject.toml requirements-%.txt $(wildcard ssu_bridge/native/*.* ssu_bridge/native/[a-z]*/*.*)
	$(PYTHON) -m venv build/$*
	build/$*/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --constraint requirements-$*.txt \
	  --config-settings=build-dir=build/$*/native --editable ".[jax,torch,cuda,test]"
	touch $@

clean:
	rm -rf .venv build
