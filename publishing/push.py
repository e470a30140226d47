"""Push an exported folder to the Hub in one commit, and verify the repository."""

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

_HUB_FILE = ".gitattributes"  # the Hub's own: it marks weights as LFS files
_NO_MODEL = (_HUB_FILE, ".gitignore", "README.md", "LICENSE")
# Files that saves write and transformers loads: the commit deletes an earlier version's if the export lacks them
_SAVED_FOLDERS = ("additional_chat_templates", "lm_adapter", "qformer_tokenizer")
_SAVED = (
    *("model*.safetensors", "model*.safetensors.index.json", CONFIG_NAME, "generation_config.json"),
    *("processor_config.json", "preprocessor_config.json", "chat_template.jinja", "tokenizer*.json", "vocab.*"),
    *("special_tokens_map.json", "added_tokens.json", "merges.txt", "tokenizer.model", "spiece.model"),
    *("configuration_*.py", "modeling_*.py", "processing_*.py", "pipeline_*.py"),
)


def check_name(repo_id: str) -> None:
    """Raise HFValidationError for a name that the Hub forbids, and ValueError for one without an owner."""
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
    """Upload the files of `folder` to a repository.

    The login is `huggingface_hub`'s. One commit adds the files, and deletes an earlier version's files that
    transformers would load; other files stay. The Hub refuses the commit if somebody has pushed since the repository
    was read. A retry does not upload finished weight files again.

    [`~lorgnette.publishing.guards`] checks the folder before anything is sent.

    Args:
        private: create the repository as private.
        revision: a branch; created from `main` if it does not exist.
        replace: delete all other files of the repository, even another model's.

    Raises:
        FileNotFoundError: the folder has no card.
        ValueError: a file that must not be published, or a card without a licence; `private`, and the repository
            exists and is public; it holds something else.
        HfHubHTTPError: the Hub refuses, for example a missing login or one without rights.
        ConnectionError: the Hub cannot be reached, or the connection broke.
        RuntimeError: somebody pushed meanwhile; the Hub's files differ from the uploaded ones, with their names.
    """
    check_name(repo_id)
    check_card(Path(folder, "README.md"))
    check_folder(folder)
    with readable_hub_errors():
        return _push(Path(folder), repo_id, private, revision, replace, message)


@contextmanager
def readable_hub_errors() -> Iterator[None]:
    """Turn a broken connection and an outdated commit into errors that say what to do."""
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code == 412:
            raise RuntimeError(
                f"Somebody pushed meanwhile: check their commit, and run this again ({error})"
            ) from error
        raise
    except HTTPError as error:
        raise ConnectionError(
            f"The Hub cannot be reached, or the connection broke ({type(error).__name__}: {error}): run this again; "
            "finished files are not uploaded twice"
        ) from error


def _push(folder: Path, repo_id: str, private: bool, revision: str | None, replace: bool, message: str) -> CommitInfo:
    api = HfApi()
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        # None: the organisation's default
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        info = api.model_info(repo_id)
    if private and not info.private:
        raise ValueError(f"{repo_id} exists and is public: make it private on the Hub, or choose another name")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.model_info(repo_id, revision=revision)

    existing = {sibling.rfilename for sibling in info.siblings}
    if not replace:
        _refuse_another_model(folder, repo_id, info.sha, existing)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    deleted = [name for name in sorted(existing - {*names, _HUB_FILE}) if replace or _is_of_a_save(name)]
    if deleted:
        logger.info("%s: deletes the old files %s", repo_id, ", ".join(deleted))
    commit = api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(name, path) for name, path in zip(names, files, strict=True)),
            *(CommitOperationDelete(name) for name in deleted),
        ],
        commit_message=message,
        revision=revision,
        parent_commit=info.sha,
    )
    _read_back(api, folder, repo_id, commit.oid, existing - set(deleted))
    logger.info("%s holds %d files of this model, at %s", repo_id, len(names), commit.oid)
    return commit


def _is_of_a_save(name: str) -> bool:
    """Whether our saves write a file of this name."""
    folder, _, file = name.rpartition("/")
    return folder in _SAVED_FOLDERS or (not folder and any(fnmatch(file, pattern) for pattern in _SAVED))


def _read_back(api: HfApi, folder: Path, repo_id: str, commit: str, kept: set[str]) -> None:
    """Compare names and hashes of the files at a commit with `folder`, except for the kept old files."""
    found = api.verify_repo_checksums(repo_id, revision=commit, local_dir=folder)
    wrong = [f"{item.path}: another hash" for item in found.mismatches]
    wrong += [f"{path}: missing" for path in found.extra_paths]
    wrong += [f"{path}: not of this upload" for path in sorted(set(found.missing_paths) - kept)]
    if wrong:
        raise RuntimeError(f"{repo_id} at {commit} differs from the upload:\n" + "\n".join(wrong))


def _refuse_another_model(folder: Path, repo_id: str, commit: str, existing: set[str]) -> None:
    """Raise ValueError if the repository holds anything but an earlier version of the model in `folder`."""
    how = "choose another name, or replace it (replace=True, --replace)"
    if CONFIG_NAME not in existing:
        others = sorted(
            name for name in existing if PurePosixPath(name).stem not in _NO_MODEL and name not in _NO_MODEL
        )
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
        differences = "; ".join(f"{name} is {theirs[name]!r} there, {ours[name]!r} here" for name in differ)
        raise ValueError(f"{repo_id} holds another model ({differences}): {how}")


def _identity(config: Path) -> dict[str, object]:
    """The fields that two versions of a model share: its type and its parts."""
    # imported here: transformers imports slowly, and most repositories are new
    from ..configuration.configuration_lorgnette import LorgnetteConfig
    from ..configuration.configuration_retrieval import LorgnetteRetrievalConfig

    fields = read_json_object(config)
    identity = {"model_type": fields.get("model_type")}
    for ours in (LorgnetteConfig, LorgnetteRetrievalConfig):
        if identity["model_type"] == ours.model_type:  # through the class: GPT-2 names these fields differently
            try:
                config_object = ours.from_dict(fields)
            except ValueError as error:
                raise ValueError(f"{config} is not a valid config of this model type: {error}") from error
            for part in ("vision", "qformer", "text"):
                identity[f"{part}_backbone"] = getattr(config_object, f"{part}_backbone", None)
                for name in ("model_type", "hidden_size", "num_hidden_layers"):
                    identity[f"{part}_config.{name}"] = getattr(
                        getattr(config_object, f"{part}_config", None), name, None
                    )
    return identity
