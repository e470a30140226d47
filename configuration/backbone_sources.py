"""How a model is named: a Hub id, a local folder, or a GGUF file, which transformers wants as folder and name."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase


def from_pretrained_arguments(source: str | Path, revision: str | None = None) -> tuple[str, dict[str, Any]]:
    """What any `from_pretrained` is to be called with for `source`: the first argument, and keywords.

    Raises:
        FileNotFoundError: a `.gguf` file that is not there, or what can only be a path and is not there either.
    """
    path = Path(source)
    if path.suffix != ".gguf":
        # transformers would say of a mistyped path that it is no Hub id
        is_path = isinstance(source, Path) or str(source).startswith((".", "~")) or path.is_absolute()
        if (is_path or str(source).count("/") > 1) and not path.is_dir():
            raise FileNotFoundError(f"There is no folder {source}")
        return str(source), {"revision": revision}
    if not path.is_file():
        raise FileNotFoundError(f"There is no GGUF file {path}")
    return str(path.parent), {"gguf_file": path.name}


def load_tokenizer(
    source: str | Path | PreTrainedTokenizerBase | None, revision: str | None = None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model that is named; one that is loaded already, or None, is passed on."""
    if not isinstance(source, (str, Path)):
        return source
    name, keywords = from_pretrained_arguments(source, revision)
    return AutoTokenizer.from_pretrained(name, **keywords)


__all__ = ["from_pretrained_arguments", "load_tokenizer"]
