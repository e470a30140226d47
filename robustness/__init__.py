"""What goes wrong on purpose: bad pictures, numbers and memory over many steps."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the tiny backbones are those of the tests
