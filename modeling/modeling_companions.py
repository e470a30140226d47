"""The processor beside a model: taken along when the model is saved, so that no saved folder is without one.

transformers saves a model and its processor apart, and a pipeline saves only parts of one. Whoever loads a model,
trains it and saves it would leave a folder that no pipeline loads.
"""

import shutil
from pathlib import Path
from typing import Any

from transformers.utils import (
    CHAT_TEMPLATE_FILE,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    cached_file,
)


_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)
# Of the two tokenizers that a processor may have, the Q-Former's lies in a folder of its own.
_PROCESSOR_FILES = (
    PROCESSOR_NAME,
    IMAGE_PROCESSOR_NAME,
    CHAT_TEMPLATE_FILE,
    *_TOKENIZER_FILES,
    *(f"qformer_tokenizer/{name}" for name in _TOKENIZER_FILES),
)


def copy_processor(name_or_path: str, revision: str | None, folder: str | Path, **hub_kwargs: Any) -> None:
    """Copy the processor's files from where a model was loaded into `folder`, unless it has a processor already.

    Args:
        name_or_path: Hub id or local folder; without a processor there, nothing is copied.
        revision: of the Hub id.
        folder: where the model is being saved.
        hub_kwargs: `cache_dir`, `token`, `local_files_only` of the load.
    """
    folder = Path(folder)
    if (folder / PROCESSOR_NAME).exists():
        return
    for name in _PROCESSOR_FILES:
        source = cached_file(
            name_or_path, name, revision=revision, _raise_exceptions_for_missing_entries=False, **hub_kwargs
        )
        if source is None and name == PROCESSOR_NAME:
            return
        if source is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, folder / name)


__all__ = ["copy_processor"]
