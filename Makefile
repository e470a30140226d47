# make demo   real backbones, real pictures, trained and captioned by a stranger, in about ten minutes on two CPU cores
# make test   the test suite
#
# Each works on a fresh clone: the virtual environment in $(VENV) is made first.

PYTHON ?= python3
# The torch requirement. Without CUDA on Linux, the CPU build saves gigabytes; see the README for the line.
TORCH ?= torch==2.13.0
VENV ?= .venv
# Where the demo's downloads are kept
CACHE ?= .cache
# Hub ids or folders in place of the demo's backbones
VISION ?=
TEXT ?=
QFORMER ?=
# Further options of `python -m lorgnette.trainer stage2` for the demo, or of pytest for the tests
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --progress-bar on

.PHONY: demo test test-gpu lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	@$(PYTHON) examples/demo/prerequisites.py --npm
	$(BIN)/python -m examples.demo --cache "$(CACHE)" $(if $(VISION),--vision "$(VISION)") $(if $(TEXT),--text "$(TEXT)") \
		$(if $(QFORMER),--qformer "$(QFORMER)") $(ARGS)
