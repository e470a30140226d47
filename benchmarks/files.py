"""Benchmark sizes of checkpoints, loading and import times."""

import copy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForImageTextToText, Blip2ForConditionalGeneration, PreTrainedModel

from benchmarks.floor import seconds
from benchmarks.forms import COMMIT, TOLERANCE, add_to_hub_cache
from benchmarks.generation import caption
from benchmarks.sides import Batch, Side
from benchmarks.training import in_turn


Load = Callable[[], PreTrainedModel]
IMPORTS = {
    "theirs": "from transformers import Blip2ForConditionalGeneration, Blip2Processor; from peft import LoraConfig",
    "ours": "from lorgnette import LorgnetteCollator, LorgnetteForConditionalGeneration, LorgnetteProcessor",
}


def name_backbones(ours: Side, theirs: Side, folder: Path) -> None:
    """Put ViT and LM into a temporary Hub cache, so that ours can be saved without them."""
    parts = {"vision": theirs.model.vision_model, "text": without_lora(theirs.model.language_model)}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        setattr(
            ours.model.config, f"{name}_backbone", add_to_hub_cache(folder / "hub", f"benchmark/{name}", folder / name)
        )
        setattr(ours.model.config, f"{name}_backbone_revision", COMMIT)
    ours.model.mark_backbones_loaded()


def without_lora(model: PreTrainedModel) -> PreTrainedModel:
    """The LM under LoRA."""
    plain = type(model)(copy.deepcopy(model.config)).to(model.dtype)
    weights = {name.replace(".base_layer.", "."): value for name, value in model.state_dict().items()}
    plain.load_state_dict({name: value for name, value in weights.items() if ".lora_" not in name})
    return plain


def merge(theirs: Side) -> None:
    """Merge LoRA into the LM's weights: `from_pretrained` would not find weights under LoRA."""
    for layer in theirs.model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    theirs.model.language_model = without_lora(theirs.model.language_model)


def checkpoint_bytes(theirs: Side, ours: Side, folder: Path) -> dict[str, int]:
    """Bytes of the weights: theirs in full, since nothing less can be reloaded, ours without the backbones."""
    theirs.model.save_pretrained(folder / "theirs")
    ours.model.save_pretrained(folder / "thin", save_format="thin")
    return {"theirs": weights_in(folder / "theirs"), "ours": weights_in(folder / "thin")}


def weights_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def saved(ours: Side, expected: dict[str, torch.Tensor], inputs: Batch, folder: Path, device: str) -> dict[str, Load]:
    """Save ours in each format; returns what loads each of them, and theirs. All are in the page cache then.

    Args:
        expected: each side's logits, which differ after training.
        folder: the one that `checkpoint_bytes` wrote.

    Raises:
        ValueError: a folder gives other logits.
    """

    def load(name: str) -> PreTrainedModel:
        kind = Blip2ForConditionalGeneration if name == "theirs" else AutoModelForImageTextToText
        return kind.from_pretrained(folder / name, cache_dir=folder / "hub", local_files_only=True).to(device)

    for name, allowed in {"theirs": TOLERANCE["merged"], **TOLERANCE}.items():
        if name not in ("theirs", "thin"):  # they exist already
            ours.model.save_pretrained(folder / name, save_format=name)
        own = expected["theirs" if name == "theirs" else "ours"]
        if name in ("theirs", "merged") and ours.model.dtype != torch.float32:  # merged weights are rounded once
            allowed = 2**-4 * own.abs().max().item()
        apart = (logits_of(load(name), inputs) - own).abs().max().item()  # and the files are in the page cache
        if not apart <= allowed:
            raise ValueError(f"the logits of {name} are apart by {apart:.2g}; allowed is {allowed}")
    return {name: partial(load, name) for name in ("theirs", *TOLERANCE)}


def first_caption(
    load: dict[str, Load], inputs: Batch, tokens: int, repeats: int, device: str
) -> dict[str, list[float]]:
    """Seconds from `from_pretrained` to the caption of one picture, for each of what `saved` returns."""
    runs = {
        name: lambda _, one=one: seconds(lambda: caption(one(), inputs, tokens), device) for name, one in load.items()
    }
    return in_turn(runs, repeats)


def logits_of(model: nn.Module, inputs: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits.float()


def import_seconds(rounds: int) -> dict[str, list[float]]:
    """Import seconds of a training script's imports, in new processes; the files are in the page cache."""

    def timed(line: str) -> list[float]:
        code = f"import time; start = time.perf_counter(); {line}; print(time.perf_counter() - start)"
        return [float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)]

    runs = {name: lambda _, line=line: timed(line) for name, line in IMPORTS.items()}
    return in_turn(runs, rounds)
