"""Compare a folder bit for bit with the one of an uninterrupted run."""

import json
import re
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME


LACKS = "lacks"
_OF_TIME = re.compile(r"_runtime$|_per_second$")


def differences(folder: Path, reference: Path) -> list[str]:
    """Files that only one folder has, or that differ; checkpoints inside the folders are not compared.

    Ignores Trainer's arguments, which name the folder, and times and paths in its state.
    """
    found = []
    for name in sorted(_files(folder) | _files(reference)):
        ours, theirs = folder / name, reference / name
        if not (ours.is_file() and theirs.is_file()):
            found.append(f"{LACKS if theirs.is_file() else 'has'} {name}")
        elif name == TRAINER_STATE_NAME:
            ours, theirs = state_of(ours), state_of(theirs)
            found += [f"{name}: {key}" for key in sorted(ours | theirs) if ours.get(key) != theirs.get(key)]
        elif ours.read_bytes() != theirs.read_bytes():
            found.append(name)
    return found


def state_of(path: Path) -> dict[str, Any]:
    """Trainer's state without times, paths and the run's summary, which differ between runs."""
    state = json.loads(path.read_text(encoding="utf-8"))
    state["best_model_checkpoint"] = Path(state["best_model_checkpoint"] or "").name
    state["log_history"] = [
        {name: value for name, value in entry.items() if not _OF_TIME.search(name)}
        for entry in state["log_history"]
        if "train_runtime" not in entry
    ]
    return state


def _files(folder: Path) -> set[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    kept = (path for path in paths if not path.parts[0].startswith("checkpoint-"))
    return {path.as_posix() for path in kept} - {TRAINING_ARGS_NAME}
