# I'm Fine (아임파인). Plain `make` lists the targets; each of them sets itself up first.

PYTHON ?=       # a Python >= 3.11 to build .venv with; empty: the first one found that runs
TORCH_INDEX ?=  # package index for torch alone, such as the CPU index shown on pytorch.org; empty: pip's own
DATA ?= data
TOUR ?= 1
export PYTHON TORCH_INDEX DATA TOUR

# Tests mostly wait for what they started, so several files run at once.
PYTEST = .venv/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo web web-check lint test test-long test-all soak bench-generate bench-train bench-image bench-link bench-relay clean

help:
	@echo "make demo      relay + gpu on this machine; fine-tunes a small Llama before your eyes (TOUR=0: only serve)"
	@echo "make test      lint, types, unit and end-to-end tests"
	@echo "make test-all  and the long ones"
	@echo "make soak      ten minutes of callers that come, leave and err; memory must stay flat"
	@echo "make bench-generate text generation, side by side with transformers serve"
	@echo "make bench-train fine-tuning, side by side with Hugging Face Trainer and peft"
	@echo "make bench-image pictures, side by side with diffusers' pipeline"
	@echo "make bench-link what dial-out adds to a request, against HTTP on loopback"
	@echo "make bench-relay what the relay costs, side by side with nginx and the LiteLLM proxy"
	@echo "make web       only build the page, into web/dist"
	@echo "make lint      ruff and mypy only"
	@echo "make setup     only make .venv, with what demo and tests need"
	@echo "make clean     remove .venv and caches; $(DATA)/ with your jobs and models stays"
	@echo "Settings: PYTHON=/path/to/python3.13  TORCH_INDEX=URL (torch only)  DATA=folder"

setup:
	@sh setup.sh dev

demo:
	@sh setup.sh
	@sh web/build.sh || echo "  The page was not built; everything else works without it."
	@.venv/bin/python -m demo

web:
	@sh web/build.sh

web-check: setup
	@sh web/build.sh check

lint: setup
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy

test: lint web-check
	$(PYTEST) -m "not long"

test-long: setup
	$(PYTEST) -m long || test $$? -eq 5  # 5: none was collected

test-all: test test-long

soak: setup
	SOAK_S=600 .venv/bin/python -m pytest -s -m long tests/gpu_service/test_soak.py

bench-generate: setup
	.venv/bin/python -m bench.generate

bench-train: setup
	.venv/bin/python -m bench.train

bench-image: setup
	.venv/bin/python -m bench.image

bench-link: setup
	.venv/bin/python -m bench.link

bench-relay: setup
	.venv/bin/python -m bench.relay

clean:
	rm -rf .venv web/node_modules web/dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
