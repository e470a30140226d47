"""Check the prerequisites of `make demo`, and print a line for each missing one. Runs on any Python 3."""

# ruff: noqa: UP031, UP036 (it runs on unsupported Pythons too)

import importlib.util
import shutil
import sys


def missing(need_npm):
    """Return a message for each missing prerequisite."""
    messages = []
    if sys.version_info < (3, 11):
        version = sys.version.split()[0]
        messages.append("Python 3.11 or newer (this is %s); name one with PYTHON=python3.12" % version)
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        messages.append("Python's venv module (on Debian and Ubuntu: apt install python3-venv)")
    if need_npm and shutil.which("npm") is None:
        messages.append("npm, from whose registry the demo's photographs come (it is part of Node.js)")
    return messages


if __name__ == "__main__":
    found = missing(need_npm="--npm" in sys.argv[1:])
    for message in found:
        sys.stderr.write("missing: %s\n" % message)
    sys.exit(1 if found else 0)
