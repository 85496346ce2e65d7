# Two commands: `make demo` and `make test`. The first call of either installs into .venv; later ones do not.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two processes at a time, each file's tests in one of them: most tests have one thread.
TESTS := -m pytest -n 2 --dist loadfile

.PHONY: demo test test-all test-oldest test-newest test-templates test-formats test-gpu bench-gpu lint bench clean

demo: $(STAMP)
	$(BIN)/treering demo

test: $(STAMP)
	$(BIN)/python $(TESTS)

test-all: $(STAMP)
	$(BIN)/python $(TESTS) -m "slow or not slow"

test-templates: $(STAMP)
	$(BIN)/python -m tests.templates.fuzz

test-formats: $(STAMP)
	$(BIN)/python -m tests.formats.libraries

# The default tests with the oldest versions that pyproject.toml allows, and with the newest that were tried: some
# gigabytes each, because pip may take the CUDA build of torch. CPU builds fit as well, from an index that has them.
test-oldest test-newest: test-%: .venv-%/.installed
	.venv-$*/bin/python $(TESTS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m benchmarks.data --quick
	$(BIN)/python -m benchmarks.loop --quick

# torch by its exact pin and before anything else: a range would let pip take the newest build, with gigabytes of CUDA
# packages, on a machine that has no GPU. With another torch already in .venv, delete the line from constraints.txt.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Treering needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
	@touch $@

.venv-%/.installed: pyproject.toml constraints-%.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-$*.txt -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest runs .pytest_cache .ruff_cache .mypy_cache

# On a machine with a card nothing is installed: the torch and transformers that are there are used.
CARD_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

test-gpu:
	PYTHONPATH=src $(CARD_PYTHON) -m pytest -m gpu tests/gpu

bench-gpu:
	$(CARD_PYTHON) -m benchmarks.gpu
