# Every target sets itself up: the first one makes .venv and installs the tested versions; later ones don't wait.
#
#   make demo     fine-tune a tiny GPT-2 with LoRA and QLoRA, and show that it learned (minutes, on a CPU)
#   make test     all tests that need no GPU
#   make check    format, lint, types, import contracts, generated pages
#   make fmt      format and mend what can be mended
#   make bench    speed against a padded loop
#   make docs     write the generated pages

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test check fmt bench docs clean

demo: $(READY)
	@OMP_NUM_THREADS= $(BIN)/python scripts/demo.py

test: $(READY)
	$(BIN)/python -m pytest -n 2 -q

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/docs.py --check

fmt: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)
	OMP_NUM_THREADS= $(BIN)/python scripts/bench_train.py

docs: $(READY)
	$(BIN)/python scripts/docs.py

clean:
	rm -rf .venv .demo build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12"; exit 2; }
	@echo "setting up .venv (once)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
