# make demo     from a fresh clone to printed answers
# make test     from a fresh clone to a green test run
# make help     everything else

PYTHON     ?= python3
VENV       ?= .venv
CHECKPOINT ?= checkpoints/tiny
ENGINE     ?= engines/diffusiongemma
TARGET     ?= auto
DTYPE      ?= auto
DEVICE     ?= auto
BENCH      ?=

BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install engine built serve demo test test-gpu lint bench clean
.DEFAULT_GOAL := help

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10
	@echo
	@echo "Variables: CHECKPOINT=$(CHECKPOINT) ENGINE=$(ENGINE) TARGET=$(TARGET) DTYPE=$(DTYPE) DEVICE=$(DEVICE) PYTHON=$(PYTHON)"

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

install: $(INSTALLED) ## Create the virtual environment with everything in it

engine: $(INSTALLED) ## Build ENGINE from CHECKPOINT (TARGET=auto|tensorrt|inductor, DTYPE=auto|float32|bfloat16, DEVICE=auto|cpu|cuda)
	$(BIN)/python -m builder build "$(CHECKPOINT)" "$(ENGINE)" --target $(TARGET) --dtype $(DTYPE) --device $(DEVICE)

built: $(INSTALLED)
	@test -f "$(ENGINE)/manifest.json" || $(MAKE) --no-print-directory engine

serve: built ## Build ENGINE if it is not there and serve it with Triton Inference Server until Ctrl-C
	$(BIN)/python -m backend serve --engine "$(ENGINE)"

demo: built ## Build ENGINE if it is not there, serve it, ask a few questions, stop
	$(BIN)/python examples/demo.py "$(ENGINE)"

test: $(INSTALLED) ## Run the tests
	$(BIN)/python -m pytest

test-gpu: $(INSTALLED) ## Prove what needs an H100 or H200 (and, for plans, pip install '.[tensorrt]'); see docs/tensorrt.md
	$(BIN)/python -m pytest -rs tests/test_tensorrt_ptx_gpu.py tests/test_tensorrt_gpu.py tests/test_attention_cuda.py \
		tests/test_feed_forward_cuda.py tests/test_extras_cuda.py tests/test_captured_loop_cuda.py tests/test_sampling_devices.py \
		tests/test_weight_loading.py

lint: $(INSTALLED) ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: built ## Measure everything against transformers, ten minutes (BENCH="--quick", BENCH=--log: docs/benchmarks.md)
	$(BIN)/python benchmarks/run.py --checkpoint "$(CHECKPOINT)" --engine "$(ENGINE)" $(BENCH)

clean: ## Remove what was built; the virtual environment stays
	rm -rf engines build *.egg-info .pytest_cache .ruff_cache
