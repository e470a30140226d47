"""Environments for third-party programs, kept between runs, and the models for them."""

import logging
import os
import subprocess
import venv
from collections.abc import Callable
from pathlib import Path

import hub_server
import pytest
import torch
from tiny import chat_tokenizer, image_processor, picture
from tiny_models import NUM_QUERY_TOKENS, QFORMER, language_model, vision_model

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteProcessor


logger = logging.getLogger("clients")
logging.getLogger("httpx").setLevel(logging.WARNING)  # not a line for each request, where messages are shown

NAMED = ("torch==", "transformers==", "peft==", "accelerate==", "pillow==", "vllm==", "lmms", "huggingface")
TORCH = os.environ.get("TORCH", "torch").split()


@pytest.fixture(scope="session")
def install(request) -> Callable[..., Path]:
    """Create an environment with these requirements, or upgrade it; returns its Python."""
    cache = Path(request.config.getoption("--cache")).resolve()

    def environment(name: str, *requirements: str, own_torch: bool = False) -> Path:
        python = cache / name / "bin" / "python"
        if not python.exists():
            venv.create(cache / name, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if not own_torch:
            subprocess.run([*pip, "--upgrade", *TORCH], check=True, stdin=subprocess.DEVNULL)
        subprocess.run([*pip, "--upgrade", *requirements], check=True, stdin=subprocess.DEVNULL)
        shown = [str(python), "-m", "pip", "list", "--format", "freeze", "--disable-pip-version-check"]
        versions = subprocess.run(shown, check=True, capture_output=True, text=True).stdout.split()
        logger.info("%s: %s", name, ", ".join(version for version in versions if version.startswith(NAMED)))
        return python

    return environment


@pytest.fixture
def run(tmp_path) -> Callable[..., str]:
    """Run an environment's Python with no Hub except a local one; returns its output."""

    def python(executable: Path, *command: object, hub: str | None = None) -> str:
        dropped = ("PYTHONPATH", "PYTHONHOME", "HF_TOKEN")
        variables = {name: value for name, value in os.environ.items() if name not in dropped}
        variables |= {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "2", "HF_HUB_DISABLE_TELEMETRY": "1"}
        variables |= {"HF_HUB_OFFLINE": "1"} if hub is None else {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0"}
        variables |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1,localhost"}
        done = subprocess.run(
            [str(executable), *map(str, command)],
            cwd=tmp_path,
            env=variables,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return python


@pytest.fixture(scope="session")
def hub():
    with hub_server.running() as server:
        yield server


@pytest.fixture(scope="session")
def folders(tmp_path_factory, hub) -> dict[str, Path]:
    """One model in each save format, and the backbones of the thin one on the Hub."""
    place, tokenizer = tmp_path_factory.mktemp("models"), chat_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    parts = {"vit": (vision_model(), image_processor()), "llama": (language_model(**ids), tokenizer)}
    commits = {}
    for name, saved in parts.items():
        for part in saved:
            part.save_pretrained(place / name)
        commits[name] = hub.add(f"them/{name}", place / name)
    backbones = (str(place / "vit"), str(place / "llama"))
    processor = LorgnetteProcessor.from_backbones(*backbones, num_query_tokens=NUM_QUERY_TOKENS)
    model = LorgnetteForConditionalGeneration.from_backbones(
        *backbones, processor=processor, lora={"r": 2}, qformer_config=QFORMER, num_query_tokens=NUM_QUERY_TOKENS
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    for part, name in (("vision", "vit"), ("text", "llama")):
        setattr(model.config, f"{part}_backbone", f"them/{name}")
        setattr(model.config, f"{part}_backbone_revision", commits[name])
    for form in ("thin", "full", "merged"):
        model.eval().save_pretrained(place / form, save_format=form)
    picture(1).save(place / "cat.jpg")
    picture(2).save(place / "dog.png")
    return {name: place / name for name in ("thin", "full", "merged", "cat.jpg", "dog.png")}


def pytest_addoption(parser) -> None:
    parser.addoption("--cache", default=".cache/clients", help="where the environments are kept")


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        item.add_marker(pytest.mark.clients)
