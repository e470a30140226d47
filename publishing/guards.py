"""What must not be published: states of training, pickles, secrets, paths of this machine, a card without a licence."""

import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import ModelCard, get_token
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME


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
# A folder of some user; the second writes its backslashes as JSON does, or not
_PATHS = (r"(?<![\w.])/(home|Users)/[\w.-]+/[\w.-]", r"\b[A-Za-z]:\\{1,2}Users\\{1,2}[\w.-]+")


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
        texts = {path: path.read_text(encoding="utf-8") for path in files if path.suffix not in _BINARY}
        refused = [f"{path.relative_to(folder)}: {why}" for path in texts for why in _betrayed(texts[path], known)]
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
    if not ModelCard.load(Path(card)).data.license:
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
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            yield f"no safetensors file ({error})"
    elif path.suffix not in _BINARY:
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            yield f"no text ({error})"


def _betrayed(text: str, private_paths: set[str]) -> Iterator[str]:
    """What a text tells that it should not; a secret is named by its kind and line alone."""
    patterns = dict(_SECRETS)
    if token := get_token():
        patterns["the token of this login"] = re.escape(token)
    for kind, pattern in patterns.items():
        if found := re.search(pattern, text):
            yield f"{kind}, in line {_line(text, found)}"
    # as JSON writes it, too; what follows keeps a root's home from being found in every vocabulary
    spelled = {form for path in private_paths if path != "/" for form in (path, path.replace("\\", "\\\\"))}
    own = [rf"(?<![\w./]){re.escape(form)}[/\\]+[\w.-]" for form in spelled]
    for pattern in (*_PATHS, *own):
        if found := re.search(pattern, text):
            yield f"a path of this machine, in line {_line(text, found)}: {found.group()}…"


def _line(text: str, found: re.Match) -> int:
    return text.count("\n", 0, found.start()) + 1
