# Targets for people and for .ci/run. PYTHON is only used to create .venv.
PYTHON ?= python3
BIN := .venv/bin
TESTS ?= tests
# Every test runs on one thread; a file's tests stay together.
WORKERS ?= -n 2 --dist loadfile

.PHONY: install quickstart test test-all test-minimum check format clean

install: .venv/installed

.venv/installed: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import sys; assert sys.version_info >= (3, 10), 'Python 3.10 or newer is needed'"
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[test]"
	touch $@

# Train the light preset on built-in scenes, evaluate it, reload it through pipeline(): at most 10 minutes on 2 cores.
quickstart: install
	$(BIN)/hf-maskformer quickstart --output-dir runs/quickstart

test: install
	$(BIN)/python -m pytest -q $(WORKERS) -m "not slow" $(TESTS)

# The oldest supported transformers, beside the torch of .venv; run before a release.
test-minimum: install
	test -d .minimum/transformers || $(BIN)/python -m pip install --quiet --target .minimum "transformers==5.17.0" "huggingface_hub<2"
	PYTHONPATH=.minimum $(BIN)/python -m pytest -q -m "not slow" $(TESTS)

test-all: install
	$(BIN)/python -m pytest -q $(WORKERS) $(TESTS)

# Style, types, and the tests of what changed since the last commit (all that mirror a changed room).
check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/changed_tests.py | xargs -r $(BIN)/python -m pytest -q -m "not slow"

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
