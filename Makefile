# make demo · make test · make lint: each sets up venv/ first, from nothing.
PYTHON ?= python3
PY := venv/bin/python

.PHONY: demo test lint system-packages

# The tests drive a real window; as root on Debian they install what that takes.
system-packages:
	@sh tests/install_system_packages.sh

# SAM2_BUILD_CUDA=0: the CUDA extension only fills holes in masks, which no script here does.
venv/.installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv venv
	SAM2_BUILD_CUDA=0 $(PY) -m pip install -r requirements.txt -r requirements-dev.txt
	touch $@

test: system-packages venv/.installed
	$(PY) -m pytest

lint: venv/.installed
	$(PY) -m ruff check .
