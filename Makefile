# make demo: Linf-robust digits, before and after E-AT fine-tuning.   make test: lint, types, tests.   make bench: speed.
# Each sets itself up.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test test-slow bench lint clean

.venv/.done: requirements-tested.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -r requirements-tested.txt
	touch $@

demo: .venv/.done
	$(PY) benchmarks/demo.py

lint: .venv/.done
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/typos
	$(PY) -m mypy attacks evaluation training models utils config.py data.py train.py eval.py plot.py benchmarks

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses=2 --dist=loadfile  # threads of two processes would wait for each other

test-slow: .venv/.done  # minutes: robust accuracy against pyautoattack's
	$(PY) -m pytest -m slow

.venv/.libraries: .venv/.done benchmarks/requirements.txt
	$(PY) -m pip install --quiet --no-deps --upgrade --target .venv/libraries -r benchmarks/requirements.txt
	touch $@

bench: .venv/.libraries  # a quarter of an hour on two cores: ratios to the plain way and to other libraries
	$(PY) benchmarks/speed.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
