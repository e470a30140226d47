"""An exported folder to a repository on the Hub: in one commit, on top of what was looked at, and read back."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.constants import CONFIG_NAME
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from .guards import check_card, check_folder
from .json_object import read_json_object


logger = logging.getLogger(__name__)

_OURS_TO_KEEP = ".gitattributes"  # the Hub's own, by which weights are large files
_NO_MODEL = (_OURS_TO_KEEP, ".gitignore", "README.md", "LICENSE")
# What our saves write and transformers loads: where the export lacks it, that of an earlier version must not stay
_SAVED_FOLDERS = ("additional_chat_templates", "lm_adapter", "qformer_tokenizer")
_SAVED = (
    *("model*.safetensors", "model*.safetensors.index.json", CONFIG_NAME, "generation_config.json"),
    *("processor_config.json", "preprocessor_config.json", "chat_template.jinja", "tokenizer*.json", "vocab.*"),
    *("special_tokens_map.json", "added_tokens.json", "merges.txt", "tokenizer.model", "spiece.model"),
    *("configuration_*.py", "modeling_*.py", "processing_*.py", "pipeline_*.py"),
)


def check_name(repo_id: str) -> None:
    """Raises HFValidationError for a name that the Hub forbids, and ValueError where it names no owner."""
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"repo_id is {repo_id!r}: name the owner as well, me/{repo_id}")


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    replace: bool = False,
    message: str = "Upload model",
) -> CommitInfo:
    """Make a repository hold what `folder` holds.

    The login is `huggingface_hub`'s own. One commit adds the files, and deletes those of an earlier version that
    transformers would load; other files stay. It is refused by the Hub if somebody has pushed since the repository was
    looked at. Weights that a broken upload has brought there are not sent again.

    Nothing is sent of a folder that [`~lorgnette.publishing.guards`] finds something in that is not for everybody.

    Args:
        private: make the repository private, if it is made.
        revision: a branch; made of `main` where there is none.
        replace: whether the repository may hold another model, or something else. Nothing of that stays.

    Raises:
        FileNotFoundError: the folder has no card.
        ValueError: a file that must not be published, or a card without a licence; `private`, and the repository is
            there and public; it holds something else.
        HfHubHTTPError: what the Hub refuses, a login that is missing or has no rights among it.
        ConnectionError: the Hub cannot be reached, or not to the end.
        RuntimeError: somebody pushed meanwhile; what can be read from the Hub is not what was sent, with each file.
    """
    check_name(repo_id)
    check_card(Path(folder, "README.md"))
    check_folder(folder)
    with told_plainly():
        return _push(Path(folder), repo_id, private, revision, replace, message)


@contextmanager
def told_plainly() -> Iterator[None]:
    """Within the block a broken connection and a commit that came too late are errors that say what to do."""
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code == 412:
            raise RuntimeError(
                f"Somebody pushed meanwhile: look at what they did, and run it again ({error})"
            ) from error
        raise
    except HTTPError as error:
        raise ConnectionError(
            f"The Hub cannot be reached, or not to the end ({type(error).__name__}: {error}): run it again, nothing is "
            "sent twice"
        ) from error


def _push(folder: Path, repo_id: str, private: bool, revision: str | None, replace: bool, message: str) -> CommitInfo:
    api = HfApi()
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        # None: an organisation may have a rule of its own
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        info = api.model_info(repo_id)
    if private and not info.private:
        raise ValueError(f"{repo_id} is there already, and public: make it private on the Hub, or choose another name")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.model_info(repo_id, revision=revision)

    there = {sibling.rfilename for sibling in info.siblings}
    if not replace:
        _refuse_another_model(folder, repo_id, info.sha, there)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    goes = [name for name in sorted(there - {*names, _OURS_TO_KEEP}) if replace or _is_of_a_save(name)]
    if goes:
        logger.info("%s: of what was there goes %s", repo_id, ", ".join(goes))
    commit = api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(name, path) for name, path in zip(names, files, strict=True)),
            *(CommitOperationDelete(name) for name in goes),
        ],
        commit_message=message,
        revision=revision,
        parent_commit=info.sha,
    )
    _read_back(api, folder, repo_id, commit.oid, there - set(goes))
    logger.info("%s holds %d files of this model, at %s", repo_id, len(names), commit.oid)
    return commit


def _is_of_a_save(name: str) -> bool:
    """Whether a file of a repository is one that our saves write."""
    folder, _, file = name.rpartition("/")
    return folder in _SAVED_FOLDERS or (not folder and any(fnmatch(file, pattern) for pattern in _SAVED))


def _read_back(api: HfApi, folder: Path, repo_id: str, commit: str, kept: set[str]) -> None:
    """Compare names and hashes of the files at a commit with those in `folder`, but for those that were there."""
    found = api.verify_repo_checksums(repo_id, revision=commit, local_dir=folder)
    wrong = [f"{item.path}: another hash" for item in found.mismatches]
    wrong += [f"{path}: not there" for path in found.extra_paths]
    wrong += [f"{path}: not of this upload" for path in sorted(set(found.missing_paths) - kept)]
    if wrong:
        raise RuntimeError(f"{repo_id} at {commit} does not hold what was sent:\n" + "\n".join(wrong))


def _refuse_another_model(folder: Path, repo_id: str, commit: str, there: set[str]) -> None:
    """Raises ValueError where a repository holds something that the model in `folder` is no new version of."""
    how = "choose another name, or say that it is to be replaced (replace=True, --replace)"
    if CONFIG_NAME not in there:
        others = sorted(name for name in there if PurePosixPath(name).stem not in _NO_MODEL and name not in _NO_MODEL)
        if others:
            shown = ", ".join(others[:5]) + (", …" if len(others) > 5 else "")
            count = f"{len(others)} file{'s' if len(others) > 1 else ''}"
            raise ValueError(f"{repo_id} holds {count}, and no model of this kind ({shown}): {how}")
        return
    theirs = _identity(Path(hf_hub_download(repo_id, CONFIG_NAME, revision=commit)))
    ours = _identity(folder / CONFIG_NAME)
    names = ours if ours["model_type"] == theirs["model_type"] else ("model_type",)
    differ = [name for name in names if ours[name] != theirs[name]]
    if differ:
        told = "; ".join(f"{name} is {theirs[name]!r} there, {ours[name]!r} here" for name in differ)
        raise ValueError(f"{repo_id} holds another model ({told}): {how}")


def _identity(config: Path) -> dict[str, object]:
    """What two versions of a model have in common: the kind, and the parts that it is made of."""
    # here, since they bring transformers along, and most repositories are new
    from ..configuration.configuration_lorgnette import LorgnetteConfig
    from ..configuration.configuration_retrieval import LorgnetteRetrievalConfig

    fields = read_json_object(config)
    told = {"model_type": fields.get("model_type")}
    for ours in (LorgnetteConfig, LorgnetteRetrievalConfig):
        if told["model_type"] == ours.model_type:  # as its class reads it: GPT-2 has other names for the same fields
            try:
                whole = ours.from_dict(fields)
            except ValueError as error:
                raise ValueError(f"{config} is no config of a model of this kind: {error}") from error
            for part in ("vision", "qformer", "text"):
                told[f"{part}_backbone"] = getattr(whole, f"{part}_backbone", None)
                for name in ("model_type", "hidden_size", "num_hidden_layers"):
                    told[f"{part}_config.{name}"] = getattr(getattr(whole, f"{part}_config", None), name, None)
    return told
