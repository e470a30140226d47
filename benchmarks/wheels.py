"""Wheels that a GPU machine without pip and network lacks: `make gpu-wheels` downloads them into `.wheels`.

    python -m benchmarks.wheels [FOLDER] [--python 3.12]

Such a machine has Python 3.12, torch, transformers, accelerate, peft, pandas, pyarrow and pytest.
"""

import subprocess
import sys
import zipfile
from argparse import ArgumentParser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


WHEELS = Path(".wheels")
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")
# with all that they need and such a machine has not
NAMES = (
    *("datasets", "evaluate", "dill", "multiprocess", "nltk"),
    *("fastapi", "starlette", "uvicorn", "pydantic==2.12.5", "pydantic-core==2.41.5", "annotated-types"),
    *("typing-inspection", "httpx2", "httpcore2", "opentelemetry-api", "truststore"),
)
BUILT = ("rouge_score>=0.1.2",)  # plain Python, whose newest version the registry has as a source alone
MOST_BYTES = 60_000_000


def download(folder: Path, python: str = PYTHON) -> int:
    """Fill the folder; returns its bytes. Raises ValueError above `MOST_BYTES`."""
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    binary = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms]
    subprocess.run([*pip, "download", "--quiet", "--no-deps", *binary, "--dest", str(folder), *NAMES], check=True)
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), *BUILT], check=True)
    size = sum(file.stat().st_size for file in folder.glob("*.whl"))
    if size > MOST_BYTES:
        raise ValueError(f"{folder} has {size / 1e6:.0f} MB of wheels; at most {MOST_BYTES / 1e6:.0f} MB can travel")
    return size


def unpack_missing(wheels: Path, folder: Path) -> list[Path]:
    """Unpack the wheels of distributions that Python lacks; the folder, if there were any, to be put on its path."""
    for wheel in sorted(wheels.glob("*.whl")):
        name, *_ = wheel.name.split("-")
        try:
            version(name)
        except PackageNotFoundError:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
    return [folder] if folder.exists() else []


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python -m benchmarks.wheels", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=WHEELS)
    parser.add_argument("--python", default=PYTHON, help="the version there")
    args = parser.parse_args(argv)
    folder, size = args.folder, download(args.folder, args.python)
    sys.stdout.write(f"{folder}: {len(list(folder.glob('*.whl')))} wheels, {size / 1e6:.0f} MB\n")


if __name__ == "__main__":
    main(sys.argv[1:])
