# make demo     from a fresh clone to printed answers
# make test     from a fresh clone to a green test run
# make help     everything else

PYTHON     ?= $(firstword $(wildcard $(BIN)/python) python3)
VENV       ?= .venv
BENCH      ?=

# What the command line or the environment says of ENGINE. Whether an engine that is there is such a one, the builder knows.
# Who passes variables on passes empty ones, too: these say nothing.
ASKED := $(strip $(foreach each,CHECKPOINT TARGET DTYPE DEVICE EXPERT_WEIGHTS,$(if $($(each)),$(each))))

override CHECKPOINT     := $(or $(CHECKPOINT),checkpoints/tiny)
override ENGINE         := $(or $(ENGINE),engines/diffusiongemma)
override TARGET         := $(or $(TARGET),auto)
override DTYPE          := $(or $(DTYPE),auto)
override DEVICE         := $(or $(DEVICE),auto)
override EXPERT_WEIGHTS := $(or $(EXPERT_WEIGHTS),auto)

BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed

$(foreach each,VENV PYTHON,$(if $(filter-out 1,$(words $($(each)))),$(error \
	$(each): got "$($(each))", expected one path without spaces, which make takes for several; choose another)))

# pip would look at this only after it has downloaded PyTorch.
REQUIRED := $(shell sed -n 's/^requires-python = "\(.*\)"/\1/p' pyproject.toml)
CHECK_PYTHON = import sys; \
	least, beyond = [tuple(map(int, each.strip("<>=").split("."))) for each in "$(REQUIRED)".split(",")]; \
	version = "%d.%d.%d" % sys.version_info[:3]; \
	sys.exit(None if least <= sys.version_info < beyond else \
	"error: PYTHON: $(PYTHON) is Python %s, expected $(REQUIRED); name another: make PYTHON=python3.11" % version)

# venv leaves the Python of an environment that is there as it was, unless it clears it.
ifneq ($(shell ($(PYTHON) -V) 2>/dev/null),$(shell ($(BIN)/python -V) 2>/dev/null))
.PHONY: $(INSTALLED)
CLEAR := $(if $(wildcard $(VENV)/pyvenv.cfg),--clear)
endif

.PHONY: help install engine built serve demo test test-gpu lint bench clean
.DEFAULT_GOAL := help

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10
	@echo
	@echo "Variables: CHECKPOINT=$(CHECKPOINT) ENGINE=$(ENGINE) TARGET=$(TARGET) DTYPE=$(DTYPE) DEVICE=$(DEVICE) EXPERT_WEIGHTS=$(EXPERT_WEIGHTS) PYTHON=$(PYTHON)"

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c '$(CHECK_PYTHON)'
	$(PYTHON) -m venv $(CLEAR) $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]'
	touch $@

install: $(INSTALLED) ## Create the virtual environment with everything in it

engine: $(INSTALLED) ## Build ENGINE from CHECKPOINT (TARGET=auto|tensorrt|inductor, DTYPE=auto|float32|bfloat16, DEVICE=auto|cpu|cuda, EXPERT_WEIGHTS=auto|plain|packed|int4)
	$(BIN)/python -m builder build "$(CHECKPOINT)" "$(ENGINE)" --target $(TARGET) --dtype $(DTYPE) --device $(DEVICE) \
		--expert-weights $(EXPERT_WEIGHTS)

# A manifest can be there without programs: `python -m builder manifest` writes such.
built: $(INSTALLED)
	@test -z "$(ASKED)" && ls "$(ENGINE)"/manifest.json "$(ENGINE)"/denoise.* >/dev/null 2>&1 \
		|| $(MAKE) --no-print-directory engine

serve: built ## Build ENGINE if need be and serve it with Triton Inference Server until Ctrl-C
	$(BIN)/python -m backend serve --engine "$(ENGINE)"

demo: built ## Build ENGINE if need be, serve it, ask a few questions, stop
	$(BIN)/python examples/demo.py "$(ENGINE)"

# In two processes, file by file in the order of tests/conftest.py.
test: $(INSTALLED) ## Run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Every file with a test that is skipped where there is no GPU.
test-gpu: $(INSTALLED) ## Prove what needs an H100 or H200 (and, for plans, pip install '.[tensorrt]'); see docs/tensorrt.md
	$(BIN)/python -m pytest -rs $$(grep -l 'not torch.cuda.is_available()' tests/test_*.py)

lint: $(INSTALLED) ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: built ## Measure everything against transformers, ten minutes (BENCH="--quick", BENCH=--log: docs/benchmarks.md)
	$(BIN)/python benchmarks/run.py --checkpoint "$(CHECKPOINT)" --engine "$(ENGINE)" $(BENCH)

clean: ## Remove what was built; the virtual environment stays
	rm -rf engines build *.egg-info .pytest_cache .ruff_cache
