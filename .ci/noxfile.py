"""The supported range, in environments of their own: `make matrix`."""

import os
from pathlib import Path

import nox
from packaging.requirements import Requirement


ROOT = Path(__file__).resolve().parents[1]  # nox starts where this file is
nox.options.error_on_missing_interpreters = False  # a Python that this machine lacks is reported as skipped
nox.options.default_venv_backend = "venv"
TORCH = os.environ.get("TORCH", "torch").split()
# those whose lowest versions the whole suite runs with; the others' bounds are theirs
RANGED = ("transformers", "peft", "accelerate")
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
    """The test suite, with the lowest versions of what lorgnette is built on and with the newest."""
    install(session, *(lowest_versions() if versions == "lowest" else ()))
    session.run("pytest", "--numprocesses", "auto", "--maxprocesses", "4", "-m", "not slow", *session.posargs)


def run_smoke_tests(session: nox.Session) -> None:
    files = [f"tests/{name}.py" for name in SMOKE]
    session.run("pytest", "--numprocesses", "auto", "--maxprocesses", "4", "-m", "not slow", *files, *session.posargs)


@nox.session(python=["3.12", "3.13"])
def smoke(session: nox.Session) -> None:
    """Whether it installs, imports, trains, generates and is saved on later Pythons."""
    install(session)
    run_smoke_tests(session)


@nox.session(python="3.11", default=False)
def lowest(session: nox.Session) -> None:
    """The same with the lowest versions, which `suite` runs in full: for continuous integration."""
    install(session, *lowest_versions())
    run_smoke_tests(session)
