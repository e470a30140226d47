# make demo   real backbones and photographs, training, and captions without lorgnette: about ten minutes on two CPU cores
# make quality-cifar, quality-emoji, quality-scenes, …   one row of examples/quality each; into results/quality and docs/quality.md
# make test-fast   the core of every part, which tests/fast.txt names: under a minute on two CPU cores
# make test   the test suite without the slow tests; make test-all: with them; make lint: the linter
# make bench   transformers' BLIP-2 and ours on the same weights, alternately: the table of results/benchmarks
# make gpu   everything that needs a GPU, in eight minutes: results/gpu; make gpu-wheels: what a GPU machine without network lacks
# make growth   speed and memory over batch, image tokens, captions, their length, and rows in the cache: plots beside it;
#               no measurement starts after an hour; needs 31 GB in the temporary folder, or in ARGS="--scratch FOLDER"
# make conformance   transformers' own common tests, on our classes and on BLIP-2
# make robustness   commands that are killed at random moments and restarted, bad pictures, bf16 beside fp32, memory
# make compatibility   tests every LM and every ViT of the installed transformers, tiny, in all steps: docs/compatibility.md
# make load   64 callers of a worker on this machine: right answers, memory, requests a second; three minutes
# make docs   the pages of docs/ and the reference, from docstrings, into site/; a dead link is an error
# make clients   vLLM's inspection, lmms-eval, and README's "Use" section, each in its own environment: gigabytes;
#               with the newest torch, or TORCH=
# make matrix   the tests with the lowest and the newest transformers, peft and accelerate, and a smoke test on later Pythons
#
# All work in a fresh clone: they create the virtual environment first.

PYTHON ?= python3
# The torch to install: arguments of pip, options included (see docs/training.md).
TORCH ?= torch==2.13.0
VENV ?= .venv
# Where the demo keeps its downloads, and its results
CACHE ?= .cache
OUTPUT ?= out/demo
# Hub ids or folders instead of the demo's backbones
VISION ?=
TEXT ?=
QFORMER ?=
# Further options: for `make demo` those of `lorgnette.trainer stage2`, for `make test` and `make test-all` those of pytest
ARGS ?=

# Waiting threads sleep instead of spinning: a little slower on an idle machine, much faster on a shared one
export OMP_WAIT_POLICY ?= PASSIVE
# glibc's allocator uses large pages and keeps memory (other allocators ignore this): page faults are expensive in many
# virtual machines
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: demo bench gpu gpu-wheels growth test-fast test test-all test-gpu clients conformance robustness compatibility load matrix lint docs
.PHONY: prerequisites prerequisites-demo

demo: prerequisites-demo $(VENV)/installed
	$(BIN)/python -m examples.demo --cache "$(CACHE)" --output "$(OUTPUT)" $(if $(VISION),--vision "$(VISION)") \
		$(if $(TEXT),--text "$(TEXT)") $(if $(QFORMER),--qformer "$(QFORMER)") $(ARGS)

# any row of examples/quality/rows.py: quality-cifar, quality-emoji-no-lora …
quality-%: prerequisites-demo $(VENV)/installed
	$(BIN)/python -m examples.quality $* --cache "$(CACHE)" $(ARGS)
	$(BIN)/python -m examples.quality.table

# a file on one worker: what its tests share is made once
test-fast: $(VENV)/installed
	$(BIN)/python -m pytest @tests/fast.txt --numprocesses auto --maxprocesses 4 --dist loadfile -m "not slow" $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 -m "not slow" $(ARGS)

test-all: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 $(ARGS)

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.run $(ARGS)

# python -m benchmarks.gpu where this package cannot be installed
gpu: $(VENV)/installed
	$(BIN)/python -m benchmarks.gpu $(ARGS)

gpu-wheels: $(VENV)/installed
	$(BIN)/python -m benchmarks.wheels

growth: $(VENV)/installed
	$(BIN)/python -m benchmarks.growth $(ARGS)

conformance: $(VENV)/installed
	$(BIN)/python -m conformance --cache "$(CACHE)" $(ARGS)

robustness: $(VENV)/installed
	$(BIN)/python -m robustness
	$(BIN)/python -m robustness.hostile --cache "$(CACHE)"
	$(BIN)/python -m robustness.numbers
	GLIBC_TUNABLES= $(BIN)/python -m robustness.memory # small pages: one of 2 MiB is larger than the growth to detect

compatibility: $(VENV)/installed
	$(BIN)/python -m robustness.compatibility $(ARGS)

load: $(VENV)/installed
	$(BIN)/python -m robustness.load $(ARGS)

clients: $(VENV)/installed
	TORCH="$(if $(filter file,$(origin TORCH)),torch,$(TORCH))" $(BIN)/python -m pytest clients --cache "$(abspath $(CACHE))/clients" --log-cli-level INFO $(ARGS)

matrix: $(VENV)/installed
	TORCH="$(TORCH)" $(BIN)/nox --noxfile .ci/noxfile.py --envdir "$(abspath $(CACHE))/matrix" $(ARGS)

# only the tests that need CUDA; skipped, with the reason, without it
test-gpu: $(VENV)/installed
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

prerequisites prerequisites-demo:
	@command -v "$(PYTHON)" >/dev/null || { echo "missing: $(PYTHON), a Python 3.11 or newer; name one with PYTHON=" >&2; exit 1; }
	@"$(PYTHON)" examples/demo/prerequisites.py $(if $(filter %-demo,$@),--npm)

# created once; a changed pyproject.toml installs again
$(VENV)/installed: pyproject.toml | prerequisites
	"$(PYTHON)" -m venv "$(VENV)"
	@echo "installing into $(VENV): takes some minutes the first time"
	$(PIP) install $(TORCH)
	$(PIP) install --editable ".[dev]"
	touch $@
