# make demo    real backbones, real photographs, training, and a stranger who captions: about ten minutes on two CPU cores
# make test    the test suite; make lint: the linter
#
# Both work in a fresh clone: the virtual environment is made first.

PYTHON ?= python3
# The one place that says which torch is installed. It goes to pip as it stands: without CUDA on Linux, the README has a
# line for here that takes the smaller CPU build.
TORCH ?= torch==2.13.0
VENV ?= .venv
# Where the demo keeps its downloads
CACHE ?= .cache
# Hub ids or folders in place of the demo's backbones
VISION ?=
TEXT ?=
QFORMER ?=
# Further options: for `make demo` those of `lorgnette.trainer stage2`, for `make test` those of pytest
ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip --disable-pip-version-check --quiet install

.PHONY: demo test test-gpu lint clean

demo: prerequisites-demo $(VENV)/demo.stamp
	$(BIN)/python -m examples.demo --cache "$(CACHE)" $(if $(VISION),--vision "$(VISION)") \
		$(if $(TEXT),--text "$(TEXT)") $(if $(QFORMER),--qformer "$(QFORMER)") $(ARGS)

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest $(ARGS)

# CUDA tests alone; they are skipped, with the reason, where there is no GPU
test-gpu: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf "$(VENV)" out

.PHONY: prerequisites prerequisites-demo
prerequisites:
	@$(PYTHON) examples/demo/prerequisites.py
prerequisites-demo:
	@$(PYTHON) examples/demo/prerequisites.py --npm

# The environment is made once; a changed pyproject.toml installs again into it.
$(VENV)/torch.stamp: | prerequisites
	$(PYTHON) -m venv "$(VENV)"
	$(INSTALL) $(TORCH)
	touch $@

$(VENV)/%.stamp: $(VENV)/torch.stamp pyproject.toml
	$(INSTALL) --editable ".[$*]"
	touch $@
