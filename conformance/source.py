"""transformers' common tests, from the source distribution of the installed version.

The distribution lacks some modules that these tests import; stubs replace them.
"""

import os
import re
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

from examples.sources.registry import check_sha256, scratch_directory


PACKAGE = "transformers_tests"  # package name for the distribution's `tests`
# for the tested versions; pip checks any other with the index's hash
SHA256 = {
    "5.17.0": "a153be279169b55b92d8000bf4af294aed684503d091cca7804da2dd8a9de000",
    "5.24.0": "906cb8c3cb2123575e263962586a4d21a979ce97feeb95fe6aaf66fe6ae88bf3",
    "5.23.0": "19d647a4d5d903a7c644ca5cde2d86efc3dde7d8c687ae7988806ff2205efa71",
}
MISSING = {
    "__init__.py": "",
    "../fetch_hub_objects_for_ci.py": "def url_to_local_path(url, **_):\n    return url\n",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": (
        "config_common_kwargs = {'return_dict': False, 'output_hidden_states': True, 'output_attentions': True, "
        "'dtype': 'float16', 'chunk_size_feed_forward': 5, 'problem_type': 'regression'}\n"
    ),
}


def common_tests(cache: Path) -> Path:
    """The folder in `cache` with the tests as the package `transformers_tests`; downloads them once.

    Raises ValueError for a file with another hash than the pinned one, subprocess.CalledProcessError if pip fails.
    """
    wanted = version("transformers")
    target = cache / f"transformers-{wanted}-tests"
    if not target.exists():
        with scratch_directory(target) as folder:
            pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download", "--no-deps"]
            pip += ["--no-binary=:all:", "--no-build-isolation", "--dest", str(folder), f"transformers=={wanted}"]
            subprocess.run(pip, check=True, stdin=subprocess.DEVNULL)
            (archive,) = folder.glob("transformers-*.tar.gz")
            if wanted in SHA256:
                check_sha256(archive, SHA256[wanted])
            _unpack(archive, folder / "whole" / PACKAGE)
            os.replace(folder / "whole", target)
    return target


def _unpack(archive: Path, package: Path) -> None:
    """Write the Python files of the distribution's `tests`, and stubs, into `package`."""
    with tarfile.open(archive) as members:
        for member in members:
            inside = re.fullmatch(r"[^/]+/tests/(.+\.py)", member.name)
            if inside and member.isfile():
                path = package / inside[1]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(members.extractfile(member).read())
    for name, text in MISSING.items():
        path = package / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
