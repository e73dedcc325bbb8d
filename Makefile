# make test: everything installed, checked and tested.  make test-slow: the tests that take minutes.
# make test-pillow: the tests of images with a newer Pillow (make test-pillow PILLOW=13.1).
# make demo: a training run on bundled data and its merge, offline.
# All work on a fresh machine with Python 3.11 or later and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# PyTorch first and alone: asked for by another package it would come as a build of several gigabytes for CUDA.
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)

.PHONY: demo test test-slow test-pillow lint clean

# Run again, it says that both are done; removing runs/quickstart has it all done anew.
demo: $(VENV)/installed
	@echo "--- train and score: finetune recipes/quickstart.yaml"
	@$(BIN)/finetune recipes/quickstart.yaml
	@echo "--- adapter and base in one checkpoint: finetune merge runs/quickstart --to runs/quickstart/merged"
	@$(BIN)/finetune merge runs/quickstart --to runs/quickstart/merged

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

PILLOW ?= 13.0.0

# Beside the installed one, which is what the other tests run with.
test-pillow: $(VENV)/installed-test
	$(BIN)/pip install --quiet --no-deps --upgrade --target build/pillow-$(PILLOW) pillow==$(PILLOW)
	PYTHONPATH=build/pillow-$(PILLOW) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/qwenvl/images

lint: $(VENV)/installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

# The bindings of llama.cpp without a library of their own, which takes 20 minutes to build: another package's wheel has it.
$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	CMAKE_ARGS=-DLLAMA_BUILD=OFF $(BIN)/pip install --quiet --constraint constraints.txt llama-cpp-python xllamacpp \
		|| echo "the tests of llama.cpp are skipped: its packages could not be installed"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
