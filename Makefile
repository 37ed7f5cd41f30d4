# make train sets everything up and trains; make help lists the rest. Variables may be given on the command line:
#   ARGS         handed to what runs       make train ARGS="--config configs/movielens_1m.yaml"
#   NPROC        training processes        make train NPROC=4; by default one for each GPU, two on a CPU
#   FLAVOUR      cpu or cuda               by default cuda where an NVIDIA driver is loaded
#   PYTHON       the interpreter to use    3.11 to 3.14
#   TORCH_INDEX  a package index to take torch from, such as PyTorch's own for CPU builds, which are far smaller
#   LOGDIR       what TensorBoard shows
#   WORKERS      processes that run tests at once (2), each with its own ranks; 0: this one alone, as a debugger needs
ARGS ?=
NPROC ?= $(if $(filter cuda,$(FLAVOUR)),$(shell "$(VENV)/bin/python" -c 'import torch; print(torch.cuda.device_count() or 2)'),2)
PYTHON ?= python3
TORCH_INDEX ?=
LOGDIR ?= outputs
WORKERS ?= 2
FLAVOUR ?= $(shell if test -e /proc/driver/nvidia/version || nvidia-smi -L >/dev/null 2>&1; \
	then echo cuda; else echo cpu; fi)

ifeq ($(filter $(FLAVOUR),cpu cuda),)
$(error FLAVOUR is "$(FLAVOUR)"; it must be cpu or cuda)
endif

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := $(CURDIR)/.venv
PINS := requirements/$(FLAVOUR).txt
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' $(PINS))
# Named by what is to be installed, so that a change of pins installs again and a mere checkout does not.
READY := $(VENV)/.ready-$(FLAVOUR)-$(shell cat $(PINS) pyproject.toml | sha256sum | cut -c1-16)
UV := uv==0.13.9

# Looked up before PATH changes below: .venv's own interpreter must not be asked to make .venv.
INTERPRETER := $(shell command -v "$(PYTHON)")

# As in the activated environment: torchrun, too, must be found.
export VIRTUAL_ENV := $(VENV)
export PATH := $(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup train test test-long test-faults test-cluster test-gpu test-image lint format tensorboard doctor lock

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

setup: $(READY) ## install the pinned packages into .venv

# The environment is made afresh: packages of an earlier set must not stay, above all not the other fbgemm.
$(READY):
	@test -n "$(INTERPRETER)" || { echo "$(PYTHON) not found; give an interpreter: make PYTHON=..." >&2; exit 1; }
	@"$(INTERPRETER)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || \
		{ echo "$(PYTHON) is $$("$(INTERPRETER)" -V 2>&1); HiloRec needs Python 3.11 to 3.14: make PYTHON=..." >&2; exit 1; }
	@"$(INTERPRETER)" -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "[1/3] making .venv with $$("$(INTERPRETER)" -V) ($(FLAVOUR))"
	@"$(INTERPRETER)" -m venv --clear "$(VENV)"
	@echo "[2/3] installing $$(grep -c == $(PINS)) pinned packages from $(PINS): a minute or more, mostly torch"
ifneq ($(TORCH_INDEX),)
	@"$(VENV)/bin/pip" install -qq --no-deps --index-url "$(TORCH_INDEX)" "$(TORCH)"
endif
	@"$(VENV)/bin/pip" install -qq --no-deps -r $(PINS)
# Adds nothing to a CPU build of torch; completes a CUDA build that the index gave in its place.
	@"$(VENV)/bin/pip" install -qq "$(TORCH)"
	@echo "[3/3] installing hilorec in place and checking that the versions match"
	@"$(VENV)/bin/pip" install -qq --no-deps --no-build-isolation -e .
	@"$(VENV)/bin/python" -c 'from recsys.versions import check_versions; check_versions()'
	@touch "$@"

# TorchX notes each of its steps at INFO; its errors and the run's own output stay.
train: export LOGLEVEL ?= WARNING
train: $(READY) ## train: NPROC processes, ARGS to recsys/train.py
	torchx run -s local_cwd dist.ddp -j 1x$(NPROC) recsys/train.py $(ARGS)

# A file is one worker's, whose fixtures it makes once.
test: $(READY) ## run the tests, all but the long ones: ARGS to pytest
	pytest -n $(WORKERS) --dist loadfile -m "not slow and not cluster" $(ARGS)

test-long: $(READY) ## run the long tests: ARGS to pytest
	pytest -m slow $(ARGS)

test-faults: $(READY) ## kill runs 200 times, and hold what they end with: ARGS to tests/faults
	PYTHONPATH=.:tests python -m faults $(ARGS)

# As root, with what tests/cluster/slurm.sh names; half an hour on two busy cores.
test-cluster: $(READY) ## run the tests on a real Slurm, which it brings up: ARGS to pytest
	tests/cluster/slurm.sh up
	trap 'tests/cluster/slurm.sh down' EXIT; pytest -m cluster $(ARGS)

# On one GPU, in ten minutes at most; docs/gpu.md says what each part is.
test-gpu: $(READY) ## run all that needs a GPU, tests and benchmarks, and write their pages: ARGS to benchmarks.gpu
	python -m benchmarks.gpu $(ARGS)

# As root, with buildah and debootstrap: docs/operations.md says how long, and what it takes of the disk.
test-image: $(READY) ## build the images without an engine, and use them
	tests/cluster/image.sh

lint: $(READY) ## check style and types
	ruff check .
	ruff format --check .
	mypy

format: $(READY) ## rewrite the code in the project's style
	ruff check --fix .
	ruff format .

tensorboard: $(READY) ## show the runs under LOGDIR, on this machine only
	tensorboard --logdir "$(LOGDIR)" --host 127.0.0.1

doctor: $(READY) ## check this machine and the installed packages
	python -m recsys.doctor $(ARGS)

# Keeps the pins that still satisfy pyproject.toml; ARGS=--upgrade renews them all.
lock: ## solve requirements/*.txt again
	@tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	"$(INTERPRETER)" -m venv "$$tmp" && "$$tmp/bin/pip" install --quiet $(UV); \
	for flavour in cpu cuda; do \
		echo "solving requirements/$$flavour.txt"; \
		"$$tmp/bin/uv" pip compile --quiet --universal --python-version 3.11 --no-annotate $(ARGS) \
			--custom-compile-command 'make lock' --extra dev \
			--excludes requirements/$$flavour.exclude -o requirements/$$flavour.txt \
			pyproject.toml requirements/$$flavour.in; \
	done; \
	echo "solving requirements/serving.txt"; \
	"$$tmp/bin/uv" pip compile --quiet --universal --python-version 3.11 --no-annotate \
		--custom-compile-command 'make lock' --excludes requirements/cpu.exclude \
		-c requirements/cpu.txt -o requirements/serving.txt requirements/serving.in; \
	echo "solving requirements/dev.txt"; \
	"$$tmp/bin/uv" pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header \
		--excludes requirements/cpu.exclude -c requirements/cpu.txt -o "$$tmp/run.txt" pyproject.toml requirements/cpu.in; \
	sed -i "s/ ; python_full_version < '3.15' and sys_platform == 'linux'$$//" requirements/{cpu,cuda,serving}.txt "$$tmp/run.txt"; \
	{ echo '# The pins that development alone needs, which images leave out; by make lock.'; \
		grep -v '^#' requirements/cpu.txt | grep -vxFf "$$tmp/run.txt"; } > requirements/dev.txt
