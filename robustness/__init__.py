"""Robustness tests: killed runs, bad pictures, low precision, memory, load, and all architectures of transformers."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fixtures"))  # the tests' tiny backbones
