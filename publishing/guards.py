"""Refuse to publish training states, pickles, secrets, paths of this machine, and a card without a licence."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, get_token
from huggingface_hub.constants import CONFIG_NAME
from safetensors import SafetensorError, safe_open

from ..assembly.card_metadata import NO_LICENSE


# the file types of a saved model, its processor, its code and its card
_KINDS = (".safetensors", ".json", ".py", ".jinja", ".txt", ".model", ".md")
_BINARY = (".safetensors", ".model")
_OF_TRAINING = re.compile(r"(optimizer|scheduler|scaler|rng_state|training_args|trainer_state|events\.out)")
# the formats of well-known services' secrets
_SECRETS = {
    "a Hugging Face token": r"\b(hf|api_org)_[A-Za-z0-9]{30,}",
    "a GitHub token": r"\b(gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{40,})",
    "an AWS key": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "a Google key": r"\bAIza[0-9A-Za-z_-]{35}\b",
    "an OpenAI or Anthropic key": r"\bsk-(ant-|proj-)?[A-Za-z0-9_-]{32,}",
    "a Slack token": r"\bxox[abprs]-[0-9A-Za-z-]{20,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in a URL": r"\b[a-z][a-z0-9+.-]*://[^\s/:@]+:[^\s/:@]{3,}@",
}
_PICKLED = (b"\x80", b"PK")  # the first bytes of pickles and of torch's archives
# A folder of some user; the second writes its backslashes as JSON does, or not
_PATHS = (r"(?<![\w.])/(home|Users)/[\w.-]+/[\w.-]", r"\b[A-Za-z]:\\{1,2}Users\\{1,2}[\w.-]+")
# A whole string that is a path of some machine: /mnt/models/vit, D:\models, ~/models, file:///models
_IS_PATH = re.compile(r"/[^/\s]+(/[^/\n]+)+/?|[A-Za-z]:[\\/][\w.].*|~[\w.-]*/.*|file:\S+")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")  # where any string may be a token


def check_folder(folder: str | Path, private_paths: tuple[str | Path, ...] = ()) -> list[str]:
    """Check that an exported folder can be published.

    Args:
        private_paths: folders of this machine that no file may mention, besides the home and the working directory.

    Returns:
        the relative paths of its files, sorted.

    Raises:
        ValueError: with each refused file and the reason.
    """
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    refused = [f"{path.relative_to(folder)}: {why}" for path in files for why in _refusals(path, folder)]
    names = [path.relative_to(folder).as_posix() for path in files]
    if not refused:
        private = {str(Path(path).resolve()) for path in (*private_paths, folder, Path.home(), Path.cwd())}
        refused = [f"{path.relative_to(folder)}: {why}" for path in files for why in _leaks(path, private)]
    if CONFIG_NAME not in names:
        refused.append(f"no {CONFIG_NAME}")
    if refused:
        raise ValueError(f"{folder} cannot be published:\n" + "\n".join(refused))
    return names


def check_card(card: str | Path) -> None:
    """Check that a card names a licence.

    Raises:
        FileNotFoundError: the card does not exist.
        ValueError: it names no licence.
    """
    if not Path(card).is_file():
        raise FileNotFoundError(f"There is no card {card}")
    if ModelCard.load(Path(card)).data.license in NO_LICENSE:
        raise ValueError(f"{card} names no licence")


def _refusals(path: Path, folder: Path) -> Iterator[str]:
    """Reasons to refuse a file by its type."""
    if path.is_symlink() or not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        yield "a link, or not a regular file: the folder has to hold the files themselves"
    elif _OF_TRAINING.match(path.name):
        yield "a training state, which using the model does not need"
    elif path.suffix not in _KINDS or any(part.startswith(".") for part in path.relative_to(folder).parts):
        yield f"not part of a model: {', '.join(_KINDS)} files are (pickles can run code)"
    elif path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="np"):
                pass
        except SafetensorError as error:
            yield f"not a safetensors file ({error})"
    elif path.suffix == ".model":
        with path.open("rb") as file:
            if file.read(2).startswith(_PICKLED):
                yield "a pickle, which can run code"
    else:
        try:
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".json":
                json.loads(text)
        except UnicodeDecodeError as error:
            yield f"not UTF-8 text ({error})"
        except json.JSONDecodeError as error:
            yield f"not JSON ({error})"


def _leaks(path: Path, private_paths: set[str]) -> Iterator[str]:
    """Secrets and private paths in a file."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        yield from _text_leaks("\n".join(metadata.values()), private_paths)
        yield from _paths_among(metadata)
    elif path.suffix not in _BINARY:
        text = path.read_text(encoding="utf-8")
        yield from _text_leaks(text, private_paths)
        if path.suffix == ".json" and path.name not in _VOCABULARIES:
            yield from _paths_among(json.loads(text))


def _paths_among(value: Any) -> Iterator[str]:
    """The path strings among JSON values."""
    if isinstance(value, str) and _IS_PATH.fullmatch(value):
        yield f"a path of this machine: {value}"
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _paths_among(item)


def _text_leaks(text: str, private_paths: set[str]) -> Iterator[str]:
    """Secrets and private paths in a text; for a secret, only its kind and line."""
    patterns = dict(_SECRETS)
    if token := get_token():
        patterns["the token of this login"] = re.escape(token)
    for kind, pattern in patterns.items():
        if found := re.search(pattern, text):
            yield f"{kind}, in line {_line(text, found)}"
    spelled = {form for path in private_paths if path != "/" for form in (path, path.replace("\\", "\\\\"))}
    own = [_pattern_of(path) for path in spelled]  # with JSON's escaping too
    for pattern in (*_PATHS, *own):
        if found := re.search(pattern, text):
            yield f"a path of this machine, in line {_line(text, found)}: {found.group()}…"


def _pattern_of(path: str) -> str:
    """A pattern for a folder or a path in it; for /root only for a path in it, since a vocabulary may hold /root."""
    if len(Path(path).parts) > 2:
        return rf"(?<![\w.]){re.escape(path)}(?![\w.-])"
    return rf"(?<![\w./]){re.escape(path)}[/\\]+[\w.-]"


def _line(text: str, found: re.Match) -> int:
    return text.count("\n", 0, found.start()) + 1
