"""A Hub cache on disk as huggingface_hub lays it out, in which tests put repositories that nobody has to download."""

import hashlib
from pathlib import Path

import huggingface_hub.constants
import pytest


class TinyHub:
    """The cache of this process and, through the environment, of those that it starts. Nothing else can be reached."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder = folder
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
        monkeypatch.setenv("HF_HUB_CACHE", str(folder))

    def snapshot(self, repo_id: str) -> Path:
        """The folder of the first commit."""
        return next((self.folder / f"models--{repo_id.replace('/', '--')}" / "snapshots").iterdir())

    def add(self, repo_id: str, *parts) -> str:
        """Save `parts` as the repository's next commit, which `main` then is; returns the commit's hash."""
        repository = self.folder / f"models--{repo_id.replace('/', '--')}"
        commits = len(list(repository.glob("snapshots/*")))
        commit = hashlib.sha1(f"{repo_id} {commits}".encode()).hexdigest()
        for part in parts:
            part.save_pretrained(repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        return commit
