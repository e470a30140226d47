"""Sources of a model: a Hub id, a local folder, or a GGUF file, which transformers takes as folder and file name."""

import os
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from .local_paths import is_path, what_is_there


QFORMER_TOKENIZER = "qformer_tokenizer"  # the folder in a processor's that holds the second tokenizer


def from_pretrained_arguments(
    source: str | Path, revision: str | None = None, **overrides: Any
) -> tuple[str, dict[str, Any]]:
    """The first argument and the keywords of `from_pretrained` for `source`.

    `overrides` are fields of its config; None is left out.

    Raises:
        FileNotFoundError: a `.gguf` file or a path that does not exist.
    """
    source = os.path.expanduser(source)
    path = Path(source)
    if path.suffix != ".gguf":
        # for a mistyped path, transformers' error would be about Hub ids
        if is_path(source) and not path.is_dir():
            raise FileNotFoundError(f"There is no folder {source} ({what_is_there(source)})")
        given = {name: value for name, value in overrides.items() if value is not None}
        return str(source), {"revision": revision} | given
    if not path.is_file():
        raise FileNotFoundError(f"There is no GGUF file {path} ({what_is_there(path)})")
    return str(path.parent), {"gguf_file": path.name}


def model_type_of(source: str | Path, revision: str | None = None) -> str | None:
    """The `model_type` in the config of a Hub id or a folder; raises what [`from_pretrained_arguments`] does."""
    name, keywords = from_pretrained_arguments(source, revision)
    return PreTrainedConfig.get_config_dict(name, **keywords)[0].get("model_type")


def load_part(auto_class: Any, what: str, name: str | Path, **keywords: Any) -> Any:
    """Load a folder or Hub repository with an Auto class and transformers' own code, without a prompt on stdin.

    Raises:
        ValueError: it has remote code, which a saved model would not carry.
    """
    try:
        return auto_class.from_pretrained(name, trust_remote_code=False, **keywords)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"The {what} of {name} has code of its own, which a saved model would not bring along: give one whose "
            "class is transformers' own, made of the same files. trust_remote_code does not help"
        ) from None


def load_tokenizer(
    source: str | Path | PreTrainedTokenizerBase | None, revision: str | None = None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a named model; a loaded one, or None, is returned unchanged."""
    if not isinstance(source, (str, Path)):
        return source
    name, keywords = from_pretrained_arguments(source, revision)
    return load_part(AutoTokenizer, "tokenizer", name, **keywords)


def load_qformer_tokenizer(
    source: str | Path | PreTrainedTokenizerBase | None, revision: str | None = None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the Q-Former's text: a BERT's, or a stage-1 model's, which lies in a folder of its own."""
    if isinstance(source, (str, Path)):
        name, keywords = from_pretrained_arguments(source, revision)
        inside = f"{QFORMER_TOKENIZER}/tokenizer_config.json"
        if cached_file(name, inside, _raise_exceptions_for_missing_entries=False, **keywords) is not None:
            return load_part(AutoTokenizer, "tokenizer", name, subfolder=QFORMER_TOKENIZER, **keywords)
    return load_tokenizer(source, revision)
