# Darkroom. `make run` starts it, `make test` proves it, `make help` lists the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
RUN := .venv/bin
DEV := .venv-dev/bin
HOST ?= 127.0.0.1
PORT ?= 8000

.PHONY: help run test check lint types setup setup-dev system system-dev lock goldens demo clean

help:  ## list what make can do
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

run: setup  ## set up and start Darkroom on this machine with the built-in model
	@$(RUN)/darkroom serve --host $(HOST) --port $(PORT)

test: setup-dev  ## set up and run the whole test suite that needs no container
	$(DEV)/python -m pytest

check: setup-dev lint types test  ## what CI runs: ruff, mypy --strict, tests

lint: setup-dev  ## look for defects with ruff
	$(DEV)/ruff check .

types: setup-dev  ## check the types with mypy --strict
	$(DEV)/mypy

setup: .venv/.ready  ## install the appliance alone (no torch) into .venv
setup-dev: .venv-dev/.ready  ## install both sides and the tests' tools into .venv-dev

.venv/.ready: pyproject.toml requirements/build.lock requirements/appliance.lock | system
	@echo "installing the appliance into .venv"
	@$(PYTHON) -m venv .venv
	@$(RUN)/pip install --quiet --require-hashes --no-deps --requirement requirements/build.lock
	@$(RUN)/pip install --quiet --require-hashes --no-deps --no-build-isolation --use-pep517 --requirement requirements/appliance.lock
	@$(RUN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

.venv-dev/.ready: pyproject.toml requirements/build.lock | system-dev
	@echo "installing both sides and the tests' tools into .venv-dev (torch's CPU build among them: some minutes)"
	@$(PYTHON) -m venv .venv-dev
	@$(DEV)/pip install --quiet --require-hashes --no-deps --requirement requirements/build.lock
	@$(DEV)/pip install --quiet --no-build-isolation --editable '.[cpu,provisioning,dev]'
	@touch $@

system:  # Debian packages: libseccomp compiles the filters; the others are what systemd-python is built against
	@sh packaging/debian-packages libseccomp2 gcc libc6-dev pkg-config libsystemd-dev python3-dev python3-venv
system-dev: system  # … and those that the tests drive: a browser, a second witness for signatures, one for the kernel's calls
	@sh packaging/debian-packages chromium openssl strace systemd

lock: setup-dev  ## write the locks with hashes anew
	$(DEV)/python packaging/lock.py

goldens: setup-dev  ## make the samplers' golden arrays anew with diffusers
	$(DEV)/python -m provisioning.goldens
	$(DEV)/python tests/test_sampling.py docs/sampler-parity.md

demo: setup-dev  ## train the built-in model anew (hours on two cores)
	$(DEV)/darkroom-provision train-demo

clean:  ## remove what make installed
	rm -rf .venv .venv-dev
