"""Run commands once: a step with the same command and recipe is reused."""

import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path


class Steps:
    """Runs `python` commands, each with its own `--output_dir` in the folder `work`.

    `done` holds each step's command and seconds, from its actual run.
    """

    def __init__(self, work: Path):
        self.work, self.done = work, {}

    def run(self, name: str, command: Sequence[str]) -> Path:
        """The folder with what `python COMMAND --output_dir FOLDER` wrote.

        The folder's name is a digest of the command and the text of its `--config`, so that rows share steps, and a
        changed step changes its successors. An interrupted step starts again. Raises subprocess.CalledProcessError if
        the command fails.
        """
        recipes = [Path(value).read_text() for option, value in pairwise(command) if option == "--config"]
        folder = self.work / f"{name}-{digest(command, recipes)}"
        record = folder.with_suffix(".json")
        line = shlex.join(["python", *command, "--output_dir", str(folder)])
        if record.exists():
            say(f"=== {name}: done before, in {folder}")
        else:
            say(f"=== {name}: {line}")
            shutil.rmtree(folder, ignore_errors=True)
            start = time.monotonic()
            subprocess.run([sys.executable, *command, "--output_dir", str(folder)], check=True)
            seconds = round(time.monotonic() - start, 1)
            record.write_text(json.dumps({"command": line, "seconds": seconds}, indent=2), encoding="utf-8")
        self.done[name] = json.loads(record.read_text(encoding="utf-8"))
        return folder


def digest(command: Sequence[str], recipes: Sequence[str]) -> str:
    """A digest of a command and the texts of its recipes, in eight letters."""
    return hashlib.sha256(json.dumps([*command, *recipes]).encode()).hexdigest()[:8]


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
