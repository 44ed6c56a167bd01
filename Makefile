PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test clean
setup: .venv/ready

# Remade only when the dependencies change.
.venv/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q "torch>=2.11,<2.14"
	$(BIN)/pip install -q -e ".[test,bench,dev]"
	touch $@

# llama.cpp, which the tests compare GGUF files with, is built from source (some minutes, once); the demo does without it.
.venv/llama: .venv/ready
	$(BIN)/pip install -q -e ".[llama]"
	touch $@

demo: setup
	$(BIN)/pascaline run recipes/laptop.toml --out runs/demo

# Two at a time, a file after the other, each on one thread: half of the time on two cores.
test: setup .venv/llama
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

clean:
	rm -rf .venv runs build *.egg-info
