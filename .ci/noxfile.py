"""Test the supported versions in separate environments: `make matrix`."""

import os
from pathlib import Path

import nox
from packaging.requirements import Requirement


ROOT = Path(__file__).resolve().parents[1]  # nox starts in this file's folder
nox.options.error_on_missing_interpreters = False  # report a missing Python as skipped
nox.options.default_venv_backend = "venv"
TORCH = os.environ.get("TORCH", "torch").split()
# the suite runs with the lowest versions of these
RANGED = ("transformers", "peft", "accelerate")
# an image of PyTorch 2.11 with CUDA 13, without this package and what it alone needs
GPU_MACHINE = ["torch==2.11.0", "transformers==5.17.0", "huggingface_hub==1.33.0", "accelerate==1.15.0", "peft"]
GPU_MACHINE += ["pandas", "pyarrow", "pytest", "matplotlib", "pillow", "httpcore", "joblib", "click", "rich"]
GPU_MACHINE += ["typer", "xxhash", "requests", "sacrebleu", "scikit-learn", "psutil", "prometheus_client"]
GPU_MACHINE += ["aiohttp", "absl-py", "annotated-doc", "h11"]
SMOKE = ["project/test_package", "trainer/test_batches", "modeling/test_generate", "assembly/test_packing"]
SMOKE += ["processing/test_pipeline_lorgnette", "modeling/test_save_reload", "trainer/test_training_invariants"]
SMOKE += ["modeling/test_modeling_headless", "modeling/test_peft_outside", "processing/test_processor_clients"]


def lowest_versions() -> list[str]:
    """`transformers==5.17` and the like: the lower bounds of pyproject.toml as pins."""
    dependencies = map(Requirement, nox.project.load_toml(ROOT / "pyproject.toml")["project"]["dependencies"])
    bounds = {one.name: bound.version for one in dependencies for bound in one.specifier if bound.operator == ">="}
    return [f"{name}=={bounds[name]}" for name in RANGED]


def install(session: nox.Session, *pins: str) -> None:
    session.chdir(ROOT)
    session.install(*TORCH, silent=True)
    session.install("--editable", ".[test]", *pins, silent=True)
    session.run("python", "-m", "pip", "list", "--format", "freeze")


@nox.session(python="3.11")
@nox.parametrize("versions", ["lowest", "newest"])
def suite(session: nox.Session, versions: str) -> None:
    """The test suite, with the lowest and with the newest versions."""
    install(session, *(lowest_versions() if versions == "lowest" else ()))
    session.run("pytest", "--numprocesses", "auto", "--maxprocesses", "4", "-m", "not slow", *session.posargs)


def run_smoke_tests(session: nox.Session) -> None:
    files = [f"tests/{name}.py" for name in SMOKE]
    session.run("pytest", "--numprocesses", "auto", "--maxprocesses", "4", "-m", "not slow", *files, *session.posargs)


@nox.session(python=["3.12", "3.13"])
def smoke(session: nox.Session) -> None:
    """Installation, import, training, generation and saving on later Pythons."""
    install(session)
    run_smoke_tests(session)


@nox.session(python="3.12")
def gpu(session: nox.Session) -> None:
    """`python -m benchmarks.gpu` on a CPU, with what a GPU machine without network has: the rest comes from wheels."""
    session.chdir(ROOT)
    session.install(*GPU_MACHINE, silent=True)
    wheels, results = (str(Path(session.create_tmp()) / name) for name in ("wheels", "results"))
    session.run("python", "-m", "benchmarks.wheels", wheels, "--python", str(session.python))
    tiny = ("--device", "cpu", "--preset", "tiny")
    session.run("python", "-m", "benchmarks.gpu", *tiny, "--wheels", wheels, "--output", results)


@nox.session(python="3.11", default=False)
def lowest(session: nox.Session) -> None:
    """Smoke tests with the lowest versions, for continuous integration; `suite` runs all tests."""
    install(session, *lowest_versions())
    run_smoke_tests(session)
