# make demo: Linf-robust digits, before and after E-AT fine-tuning.   make test: lint, types, tests.   make bench: speed.
# make gpu: what a machine with an NVIDIA GPU shows; PART=1 to 5, each under nine minutes; DATA_DIR=DIR with CIFAR-10.
# Each sets itself up in .venv. A CPU build of torch, which is smaller: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
PY := .venv/bin/python
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
CODE := attacks evaluation training models plotting utils config.py data.py train.py eval.py plot.py benchmarks examples

.PHONY: demo test test-slow bench gpu lint clean

.venv/.run: requirements-tested.txt
	@echo "installing into .venv: about 6 GB with torch's CUDA build on Linux, downloaded once (make's first lines: a CPU build)"
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet $(INDEX) -r requirements-tested.txt
	touch $@

.venv/.dev: .venv/.run requirements-dev.txt
	$(PY) -m pip install --quiet $(INDEX) -r requirements-dev.txt
	touch $@

demo: .venv/.run
	@$(PY) benchmarks/demo.py

lint: .venv/.dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/typos
	$(PY) -m mypy $(CODE)

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses=2 --dist=loadfile  # threads of two processes would wait for each other

test-slow: .venv/.dev  # minutes: robust accuracy against pyautoattack's, torchrun, more kills
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow --numprocesses=2 --dist=loadfile

.venv/.libraries: .venv/.dev benchmarks/requirements.txt
	$(PY) -m pip install --quiet --no-deps --upgrade --target .venv/libraries -r benchmarks/requirements.txt
	touch $@

bench: .venv/.libraries  # a quarter of an hour on two cores: ratios to the plain way and to other libraries
	$(PY) benchmarks/speed.py

gpu: .venv/.dev
	$(PY) benchmarks/gpu.py $(if $(PART),--part=$(PART)) $(if $(DATA_DIR),--data_dir=$(DATA_DIR))

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
