# The verbs of this repository. Each one sets itself up from nothing: it needs Python 3.11 or newer and a package index.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
BENCH := .venv-bench

.PHONY: setup demo check gpu docs bench

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

demo: setup
	$(BIN)/crosscoder demo

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/pytest -n 2 -m 'not gpu'
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 tests/triton  # the interpreter is chosen before Triton is imported

# A GPU machine may have torch and Triton but neither network nor package: the sources are enough for the kernels, and
# pydantic, xxhash and pyyaml beside them for the trainer.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
GPU_OUT ?= runs/gpu

gpu:
	test ! -x $(BIN)/pytest || $(BIN)/pytest -m gpu || test $$? -eq 5  # 5: no test has the mark
	PYTHONPATH=src $(GPU_PYTHON) benchmarks/gpu/check.py --out $(GPU_OUT)
	PYTHONPATH=src $(GPU_PYTHON) benchmarks/gpu/step.py --out $(GPU_OUT)

docs: setup
	$(BIN)/pytest tests/documents

bench: $(BENCH)/.ready
	$(call run_all,benchmarks,$(BENCH)/bin)

# Peers are what the training step is compared with. They bring trackers along, whose absence the tests rely on.
$(BENCH)/.ready: pyproject.toml constraints.txt
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

# Files whose names have an underscore are modules of a benchmark.
define run_all
	for script in $(1)/*.py; do case "$$script" in *_*) continue;; esac; \
	  test ! -e "$$script" || { echo "== $$script"; $(2)/python "$$script" || exit 1; }; done
endef
