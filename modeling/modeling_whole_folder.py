"""A folder that is saved into again is either what it was or what it is to be, also where the disk is full half way."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import CONFIG_NAME


_UNFINISHED = ".unfinished"
_WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json", "lm_adapter/adapter_*")


@contextmanager
def written_whole(folder: str | Path) -> Iterator[Path]:
    """A place to write into; when the block ends without an error its files go into `folder`.

    Files of the same names are replaced, weights of an older save go, and whatever else is there stays, but for what a
    save left that was killed.
    """
    unfinished = Path(folder, _UNFINISHED)  # inside: on the same disk, whatever is mounted
    folder = unfinished.parent
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        files = [path.relative_to(unfinished) for path in unfinished.rglob("*") if path.is_file()]
        # A process that is killed between two of these steps leaves a folder that is no model, since it has no config:
        # better than old weights under a new config, or the reverse, which load as a model that nobody saved.
        files.sort(key=lambda file: str(file) == CONFIG_NAME)
        (folder / CONFIG_NAME).unlink(missing_ok=True)
        # transformers would read older shards in place of the new ones, and peft a LoRA that is no longer the model's
        for stale in {path for pattern in _WEIGHTS for path in folder.glob(pattern)}:
            if stale.relative_to(folder) not in files:
                stale.unlink()
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(unfinished / file, folder / file)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


__all__ = ["written_whole"]
