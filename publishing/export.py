"""Export a trained model to a clean folder, and verify it in a process without lorgnette."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME

from ..configuration.configuration_lorgnette import LorgnetteConfig
from ..configuration.configuration_retrieval import LorgnetteRetrievalConfig
from ..inspection.drawing import sample_picture
from ..modeling.modeling_base import LorgnettePreTrainedModel
from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration
from ..modeling.modeling_retrieval import LorgnetteForImageTextRetrieval
from ..processing.processing_lorgnette import LorgnetteProcessor
from .json_object import read_json_object
from .verify_export import reference_outputs


logger = logging.getLogger(__name__)

_CLASSES = {
    LorgnetteConfig.model_type: LorgnetteForConditionalGeneration,
    LorgnetteRetrievalConfig.model_type: LorgnetteForImageTextRetrieval,
}


def load(source: str | Path) -> tuple[LorgnettePreTrainedModel, LorgnetteProcessor]:
    """A saved model of either stage, in eval mode and the dtype it was saved in, and its processor.

    Raises:
        FileNotFoundError: no such folder, no model in it, no processor beside the model.
        ValueError: a model of another type, a broken file, a processor that does not fit.
    """
    source = Path(source)
    if not source.is_dir():
        raise FileNotFoundError(f"There is no folder {source}")
    if not (source / CONFIG_NAME).is_file():
        checkpoints = sorted(path.name for path in source.glob("checkpoint-*"))
        hint = f": name one of its checkpoints ({', '.join(checkpoints)})" if checkpoints else ""
        raise FileNotFoundError(f"{source} holds no model (no {CONFIG_NAME}){hint}")
    kind = read_json_object(source / CONFIG_NAME).get("model_type")
    if kind not in _CLASSES:
        raise ValueError(f"{source} holds a model of type {kind!r}; supported: {' or '.join(_CLASSES)}")
    if not (source / PROCESSOR_NAME).is_file():
        raise FileNotFoundError(f"{source} holds no {PROCESSOR_NAME}: save the processor beside the model")
    for weights in source.glob("*.safetensors"):
        try:
            with safe_open(weights, framework="np"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{weights} is not a complete safetensors file ({error})") from error
    processor = LorgnetteProcessor.from_pretrained(source)
    model = _CLASSES[kind].from_pretrained(source).eval()
    model.check_processor(processor)
    return model, processor


@contextmanager
def new_directory(folder: str | Path) -> Iterator[Path]:
    """Yield a scratch folder; it is renamed to `folder` when the block ends, and deleted on an error.

    A later call for the same folder deletes what a killed process left.

    Raises:
        FileExistsError: `folder` exists and is not empty.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty: an export would mix with its files")
    scratch = folder.with_name(f".unfinished-{folder.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch / folder.name
        if folder.exists():
            folder.rmdir()
        (scratch / folder.name).rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check(
    model: LorgnettePreTrainedModel,
    processor: LorgnetteProcessor,
    folder: str | Path,
    picture: str | Path | None = None,
    *,
    exact: bool = True,
) -> None:
    """Check that an exported folder gives the model's outputs in a process without lorgnette.

    The process cannot import lorgnette or reach the Hub. It loads the folder with `AutoConfig`, `AutoProcessor`,
    `AutoModel` and, in stage 2, both pipelines, on a picture file, in a temporary folder beside the export.

    Args:
        picture: a file; a drawn one by default.
        exact: whether all numbers must be equal. Merged weights may differ: relative to the largest number, by the
            square root of the dtype's epsilon.

    Raises:
        RuntimeError: the folder does not load there, or its outputs differ; with the cause and the numbers.
    """
    # beside the export: `new_directory` deletes both after a kill
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=Path(folder).resolve().parent) as scratch:
        here, outputs = Path(scratch), Path(scratch) / "outputs.safetensors"
        picture = draw(here / "picture.png") if picture is None else Path(picture).resolve(strict=True)
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(here / "modules")}
        command = [sys.executable, "-P", str(Path(__file__).with_name("verify_export.py"))]
        try:
            with Console(stderr=True).status("the model runs here") as status:
                expected = reference_outputs(model, processor, str(picture))
                status.update("a process without lorgnette tries the export")
                finished = subprocess.run(
                    [*command, str(Path(folder).resolve()), str(picture), str(outputs)],
                    cwd=here,
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=TIMEOUT_S,
                )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"The export was not loaded and checked within {TIMEOUT_S} seconds") from error
        if finished.returncode != 0:
            raise RuntimeError(f"The export does not work where lorgnette is not installed:\n{finished.stderr[-3000:]}")
        found = load_file(outputs)
    for name, wanted in expected.items():
        tolerance = 0.0 if exact else torch.finfo(wanted.dtype).eps ** 0.5 * wanted.abs().max().item()
        difference = (found[name] - wanted).abs().max().item()
        if not difference <= tolerance:
            raise RuntimeError(
                f"The export's {name} differ from the model's by up to {difference:.3g} (allowed: {tolerance:.3g})"
            )
    logger.info("a process without lorgnette gets the same %s", " and ".join(expected))


def draw(path: Path) -> Path:
    """[`sample_picture`] as a PNG file."""
    sample_picture().save(path)
    return path


TIMEOUT_S = 3600  # a large model on a CPU is slow
# the login, and the path to this checkout
_NOT_INHERITED = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "PYTHONPATH")
