# make repro | compare | test | check | sanitize | gpu | ui | clean. Each creates .venv on first use; PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
PORT ?= 5000
BIN := .venv/bin
INSTALLED := .venv/.installed
KERNELS := .venv/.kernels

# .env.defaults, without overriding what the user has set.
$(foreach line,$(shell grep '^[A-Z]' .env.defaults),$(eval export $(subst =, ?= ,$(line))))

# Tests run in several processes; threads inside them would only compete. Four, also on two cores: many wait for servers. A
# file stays with one process, so that what its tests share is made once; slow files come first in the alphabet.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder -q

.PHONY: help repro compare test check sanitize gpu ui clean
.DEFAULT_GOAL := help

help:
	@echo 'make repro   full precision -> packed 4-bit model, measured'
	@echo 'make compare every method side by side, with seeds: hours; FAST=1: six cases'
	@echo 'make test    all tests'
	@echo 'make check   lint, types, import contracts, fast tests: before each commit'
	@echo 'make sanitize   tests of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer (GCC): 10 minutes'
	@echo 'make gpu     tests and measurements on a card, where there is one: under 9 minutes'
	@echo 'make ui      recorded runs (MLflow, http://127.0.0.1:$(PORT)) and flows (Prefect, http://127.0.0.1:4200) in a browser'
	@echo 'make clean   remove caches (results and .venv stay)'

repro: $(KERNELS)
	@$(BIN)/qvgen repro

# Every method side by side; FAST=1 for a look, once learning rates are recorded.
compare: $(KERNELS)
	@$(BIN)/qvgen compare $(if $(FAST),--fast)

test: $(KERNELS)
	@$(TEST)

check: $(KERNELS)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright
	@$(BIN)/lint-imports
	@$(TEST) -m 'not slow'

# Python is not built with the sanitizers, so their runtimes are loaded before it. Leaks are not looked for: Python's own
# would drown any others. Reports go to files, because pytest would keep them to itself.
SANITIZE := build/sanitize
# A processor with AVX-512 alone runs the AVX-VNNI path too.
AVXVNNI := $(shell grep -qs avx_vnni /proc/cpuinfo || echo -DQVGEN_AVXVNNI_AS_EVEX=ON)
# Emulated tiles on every processor: into the real instructions the sanitizers cannot look.
AMX := -DQVGEN_AMX_EMULATED=ON
REPORT := log_path=$(CURDIR)/$(SANITIZE)/report
sanitize: $(INSTALLED)
	@mkdir -p $(SANITIZE) && rm -f $(SANITIZE)/report.*
	@{ PATH="$$PATH:$(CURDIR)/$(BIN)" cmake -S . -B $(SANITIZE) -DQVGEN_SANITIZE=ON $(AVXVNNI) $(AMX) -DCMAKE_CXX_COMPILER=$(CXX) && \
		PATH="$$PATH:$(CURDIR)/$(BIN)" cmake --build $(SANITIZE) -j; } > $(SANITIZE)/log 2>&1 || { tail -n 20 $(SANITIZE)/log; exit 1; }
	@QVGEN_CPU_LIBRARY=$(CURDIR)/$(SANITIZE)/libqvgen_cpu.so \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0:$(REPORT) UBSAN_OPTIONS=print_stacktrace=1:$(REPORT) \
		$(TEST) -x -m 'not slow' tests/kernels || { head -n 50 $(SANITIZE)/report.* 2> /dev/null; exit 1; }

gpu: $(INSTALLED)
	@$(BIN)/python -m bench.gpu

ui: $(KERNELS)
	@$(BIN)/qvgen ui --mlflow-port $(PORT)

clean:
	@rm -rf build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name .venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

# The lock ends with the process that holds it, so nothing stale can stay behind; whoever waited finds the work done.
LOCKED = $(PYTHON) -c 'import fcntl, subprocess, sys; lock = open(".venv.lock", "w"); \
	fcntl.flock(lock, fcntl.LOCK_EX); sys.exit(subprocess.call(sys.argv[1:]))'

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit( \
		"qvgen needs Python 3.11 or newer; $(PYTHON) is %d.%d. Try: make PYTHON=python3.12 $(MAKECMDGOALS)" % v[:2])'
	@echo 'Preparing .venv (another make that is at it goes first)'
	@$(LOCKED) $(MAKE) --no-print-directory install-under-lock

# An editable install leaves an import hook and a path. Only the path stays: the hook would win over the working directory,
# and a copy of the project (`dvc exp run --temp`) would run the original's code.
.PHONY: install-under-lock
install-under-lock:
	@if [ ! $(INSTALLED) -nt pyproject.toml ] || [ ! $(INSTALLED) -nt constraints.txt ]; then \
		echo 'Installing the packages of constraints.txt: some minutes, log in .venv/install.log'; \
		$(PYTHON) -m venv .venv && \
		{ $(BIN)/pip install -c constraints.txt -e '.[dev]' && $(BIN)/pip check; } > .venv/install.log 2>&1 && \
		sed -i '/^import/d' $$(find .venv -name _editable_skbc_qvgen.pth) && \
		touch $(INSTALLED) $(KERNELS) || { tail -n 20 .venv/install.log; \
		echo 'The installation failed; the whole log is .venv/install.log' >&2; exit 1; }; \
	fi

# The compiled kernels again, after a change of theirs.
$(KERNELS): $(INSTALLED) CMakeLists.txt $(wildcard $(addprefix qvgen/kernels/cpu/csrc/,*.cpp *.h */*.cpp */*.h))
	@if [ -n "$$(find $^ -newer $@ 2>&1)" ]; then \
		echo 'Compiling the kernels'; \
		{ $(BIN)/pip install --no-deps -e . && sed -i '/^import/d' $$(find .venv -name _editable_skbc_qvgen.pth); } \
			> .venv/kernels.log 2>&1 || { tail -n 20 .venv/kernels.log; exit 1; }; \
		touch $@; \
	fi
