"""An exported folder to a repository on the Hub: in one commit, on top of what was looked at, and read back."""

import json
import logging
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id


logger = logging.getLogger(__name__)

_CONFIG = "config.json"
_OURS_TO_KEEP = ".gitattributes"  # the Hub's own, by which weights are large files
# What transformers may load: where the export lacks such a file, that of an earlier version must not stay
_LOADED = (".safetensors", ".bin", ".json", ".py", ".jinja", ".txt", ".model")
_NO_MODEL = (_OURS_TO_KEEP, ".gitignore", "README.md", "LICENSE")


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

    Args:
        private: make the repository private, if it is made.
        revision: a branch; made of `main` where there is none.
        replace: whether the repository may hold another model, or something else. Nothing of that stays.

    Raises:
        ValueError: `private`, and the repository is there and public; it holds something else.
        HfHubHTTPError: what the Hub refuses, a login that is missing or has no rights among it.
        RuntimeError: what can be read from the Hub is not what was sent; names each file.
    """
    check_name(repo_id)
    folder, api = Path(folder), HfApi()
    try:
        public = not api.model_info(repo_id).private
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private, exist_ok=True)
        public = not private
    if private and public:
        raise ValueError(f"{repo_id} is there already, and public: make it private on the Hub, or choose another name")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)

    info = api.model_info(repo_id, revision=revision)
    there = {sibling.rfilename for sibling in info.siblings}
    if not replace:
        _refuse_another_model(folder, repo_id, info.sha, there)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    goes = [name for name in sorted(there - {*names, _OURS_TO_KEEP}) if replace or name.endswith(_LOADED)]
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
    if _CONFIG not in there:
        others = sorted(name for name in there if PurePosixPath(name).stem not in _NO_MODEL and name not in _NO_MODEL)
        if others:
            shown = ", ".join(others[:5]) + (", …" if len(others) > 5 else "")
            raise ValueError(f"{repo_id} holds {len(others)} files, and no model of this kind ({shown}): {how}")
        return
    theirs = _identity(Path(hf_hub_download(repo_id, _CONFIG, revision=commit)))
    ours = _identity(folder / _CONFIG)
    differ = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if differ:
        told = "; ".join(f"{name} is {theirs.get(name)!r} there, {ours.get(name)!r} here" for name in differ)
        raise ValueError(f"{repo_id} holds another model ({told}): {how}")


def _identity(config: Path) -> dict[str, object]:
    """What two versions of a model have in common: the kind, and the parts that it is made of."""
    fields = json.loads(config.read_text(encoding="utf-8"))
    told = {"model_type": fields.get("model_type")}
    for part in ("vision", "qformer", "text"):
        told[f"{part}_backbone"] = fields.get(f"{part}_backbone")
        for name in ("model_type", "hidden_size", "num_hidden_layers"):
            told[f"{part}_config.{name}"] = (fields.get(f"{part}_config") or {}).get(name)
    return told
