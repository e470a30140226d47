"""A trained folder to a clean one that holds what others need and nothing else, tried as they will use it."""

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
from ..inspection.drawing import drawn
from ..modeling.modeling_base import LorgnettePreTrainedModel
from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration
from ..modeling.modeling_retrieval import LorgnetteForImageTextRetrieval
from ..processing.processing_lorgnette import LorgnetteProcessor
from .json_object import read_json_object
from .stranger import look


logger = logging.getLogger(__name__)

_CLASSES = {
    LorgnetteConfig.model_type: LorgnetteForConditionalGeneration,
    LorgnetteRetrievalConfig.model_type: LorgnetteForImageTextRetrieval,
}


def load(source: str | Path) -> tuple[LorgnettePreTrainedModel, LorgnetteProcessor]:
    """A saved model of either stage, in eval mode and the dtype it was saved in, and its processor.

    Raises:
        FileNotFoundError: no such folder, no model in it, no processor beside the model.
        ValueError: a model of another kind, a file that is broken, a processor that does not fit.
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
        raise ValueError(f"{source} holds a model of type {kind!r}; what is uploaded here is {' or '.join(_CLASSES)}")
    if not (source / PROCESSOR_NAME).is_file():
        raise FileNotFoundError(f"{source} holds no {PROCESSOR_NAME}: save the processor beside the model")
    for weights in source.glob("*.safetensors"):
        try:
            with safe_open(weights, framework="np"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{weights} is no whole safetensors file ({error})") from error
    processor = LorgnetteProcessor.from_pretrained(source)
    model = _CLASSES[kind].from_pretrained(source).eval()
    model.check_processor(processor)
    return model, processor


@contextmanager
def appearing_whole(folder: str | Path) -> Iterator[Path]:
    """A folder to make and to fill; it becomes `folder` when the block ends, and goes if that is with an error.

    What a process left that was killed meanwhile goes when the same folder is begun again.

    Raises:
        FileExistsError: `folder` is there and not empty.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty: an export would be mixed with what is there")
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
    """See to it that an exported folder gives strangers what the model gives here.

    A process in which lorgnette cannot be imported and no Hub is reached loads it with `AutoConfig`, `AutoProcessor`,
    `AutoModel` and, in stage 2, both pipelines, on a picture file. It works in a folder beside this one, which goes.

    Args:
        picture: a file; a drawn one by default.
        exact: whether all numbers have to be equal, as they are unless weights were merged. Then they may differ by the
            square root of the dtype's epsilon, of the largest.

    Raises:
        RuntimeError: the folder does not load there, or gives something else; with the cause and the numbers.
    """
    # beside the export: what a kill leaves of both goes together, see `appearing_whole`
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=Path(folder).resolve().parent) as scratch:
        here, seen = Path(scratch), Path(scratch) / "seen.safetensors"
        picture = draw(here / "picture.png") if picture is None else Path(picture).resolve(strict=True)
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_THEIRS}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(here / "modules")}
        stranger = [sys.executable, "-P", str(Path(__file__).with_name("stranger.py"))]
        try:
            with Console(stderr=True).status("the model itself is asked") as status:
                expected = look(model, processor, str(picture))
                status.update("a process without lorgnette tries the export")
                finished = subprocess.run(
                    [*stranger, str(Path(folder).resolve()), str(picture), str(seen)],
                    cwd=here,
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=_PATIENCE,
                )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"The export was not loaded and tried within {_PATIENCE} seconds") from error
        if finished.returncode != 0:
            raise RuntimeError(f"The export does not work where lorgnette is not installed:\n{finished.stderr[-3000:]}")
        found = load_file(seen)
    for name, wanted in expected.items():
        tolerance = 0.0 if exact else torch.finfo(wanted.dtype).eps ** 0.5 * wanted.abs().max().item()
        difference = (found[name] - wanted).abs().max().item()
        if not difference <= tolerance:
            raise RuntimeError(
                f"The export's {name} differ from the model's by up to {difference:.3g} (allowed: {tolerance:.3g})"
            )
    logger.info("a stranger gets the same %s", " and ".join(expected))


def draw(path: Path) -> Path:
    """[`drawn`] as a PNG file."""
    drawn().save(path)
    return path


_PATIENCE = 3600  # seconds; a large model on a CPU takes its time
# A login, and where Python would find this checkout
_NOT_THEIRS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "PYTHONPATH")
