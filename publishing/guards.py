"""What must not be published: states of training, pickles, secrets, paths of this machine, a card without a licence."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, get_token
from huggingface_hub.constants import CONFIG_NAME
from safetensors import SafetensorError, safe_open


# All that a saved model, its processor, its code and its card consist of
_KINDS = (".safetensors", ".json", ".py", ".jinja", ".txt", ".model", ".md")
_BINARY = (".safetensors", ".model")
_OF_TRAINING = re.compile(r"(optimizer|scheduler|scaler|rng_state|training_args|trainer_state|events\.out)")
# The forms that well-known services give their secrets
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
_PICKLED = (b"\x80", b"PK")  # how pickles and torch's archives of them begin
# A folder of some user; the second writes its backslashes as JSON does, or not
_PATHS = (r"(?<![\w.])/(home|Users)/[\w.-]+/[\w.-]", r"\b[A-Za-z]:\\{1,2}Users\\{1,2}[\w.-]+")
# A whole string that is a path of some machine: /mnt/models/vit, D:\models, ~/models, file:///models
_IS_PATH = re.compile(r"/[^/\s]+(/[^/\n]+)+/?|[A-Za-z]:[\\/][\w.].*|~[\w.-]*/.*|file:\S+")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")  # where any string may be a token


def check_folder(folder: str | Path, private_paths: tuple[str | Path, ...] = ()) -> list[str]:
    """See to it that an exported folder may be shown to anybody.

    Args:
        private_paths: folders of this machine that no text may name, besides the home and the working one.

    Returns:
        the relative paths of its files, sorted.

    Raises:
        ValueError: names each file that may not be published, and why.
    """
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    refused = [f"{path.relative_to(folder)}: {why}" for path in files for why in _objections(path, folder)]
    names = [path.relative_to(folder).as_posix() for path in files]
    if not refused:
        known = {str(Path(path).resolve()) for path in (*private_paths, folder, Path.home(), Path.cwd())}
        refused = [f"{path.relative_to(folder)}: {why}" for path in files for why in _betrayed(path, known)]
    if CONFIG_NAME not in names:
        refused.append(f"no {CONFIG_NAME}")
    if refused:
        raise ValueError(f"{folder} cannot be published:\n" + "\n".join(refused))
    return names


def check_card(card: str | Path) -> None:
    """See to it that a card can stand on the Hub.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it says no licence.
    """
    if not Path(card).is_file():
        raise FileNotFoundError(f"There is no card {card}")
    if ModelCard.load(Path(card)).data.license in (None, "", "unknown"):
        raise ValueError(f"{card} names no licence")


def _objections(path: Path, folder: Path) -> Iterator[str]:
    """Why a file may not be there, whatever its text says."""
    if path.is_symlink() or not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        yield "a link, or no file: what is published lies in the folder itself"
    elif _OF_TRAINING.match(path.name):
        yield "a state of training, which nobody needs for using the model"
    elif path.suffix not in _KINDS or any(part.startswith(".") for part in path.relative_to(folder).parts):
        yield f"not of a model, which consists of {', '.join(_KINDS)} files (pickles can run code)"
    elif path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="np"):
                pass
        except SafetensorError as error:
            yield f"no safetensors file ({error})"
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
            yield f"no text ({error})"
        except json.JSONDecodeError as error:
            yield f"no JSON ({error})"


def _betrayed(path: Path, private_paths: set[str]) -> Iterator[str]:
    """What a file tells that it should not."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        yield from _betrayed_by_text("\n".join(metadata.values()), private_paths)
        yield from _paths_among(metadata)
    elif path.suffix not in _BINARY:
        text = path.read_text(encoding="utf-8")
        yield from _betrayed_by_text(text, private_paths)
        if path.suffix == ".json" and path.name not in _VOCABULARIES:
            yield from _paths_among(json.loads(text))


def _paths_among(value: Any) -> Iterator[str]:
    """The strings among JSON values that are paths."""
    if isinstance(value, str) and _IS_PATH.fullmatch(value):
        yield f"a path of this machine: {value}"
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _paths_among(item)


def _betrayed_by_text(text: str, private_paths: set[str]) -> Iterator[str]:
    """What a text tells that it should not; a secret is named by its kind and line alone."""
    patterns = dict(_SECRETS)
    if token := get_token():
        patterns["the token of this login"] = re.escape(token)
    for kind, pattern in patterns.items():
        if found := re.search(pattern, text):
            yield f"{kind}, in line {_line(text, found)}"
    spelled = {form for path in private_paths if path != "/" for form in (path, path.replace("\\", "\\\\"))}
    own = [_pattern_of(path) for path in spelled]  # as JSON writes them, too
    for pattern in (*_PATHS, *own):
        if found := re.search(pattern, text):
            yield f"a path of this machine, in line {_line(text, found)}: {found.group()}…"


def _pattern_of(path: str) -> str:
    """What finds a folder, or what lies in it; of one like /root only the latter, for it may stand in a vocabulary."""
    if len(Path(path).parts) > 2:
        return rf"(?<![\w.]){re.escape(path)}(?![\w.-])"
    return rf"(?<![\w./]){re.escape(path)}[/\\]+[\w.-]"


def _line(text: str, found: re.Match) -> int:
    return text.count("\n", 0, found.start()) + 1
