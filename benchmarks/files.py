"""What is on disk, and how long it takes to come from there: checkpoints, loading, imports."""

import copy
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from benchmarks.floor import seconds
from benchmarks.forms import COMMIT, TOLERANCE, stand_in
from benchmarks.generation import caption
from benchmarks.sides import Batch, Side
from benchmarks.training import in_turn


IMPORTS = {
    "theirs": "from transformers import Blip2ForConditionalGeneration, Blip2Processor; from peft import LoraConfig",
    "ours": "from lorgnette import LorgnetteCollator, LorgnetteForConditionalGeneration, LorgnetteProcessor",
}


def name_backbones(ours: Side, theirs: Side, folder: Path) -> None:
    """Put ViT and LM into a Hub cache of this run's own, so that ours can be saved without them."""
    parts = {"vision": theirs.model.vision_model, "text": without_lora(theirs.model.language_model)}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        setattr(ours.model.config, f"{name}_backbone", stand_in(folder / "hub", f"benchmark/{name}", folder / name))
        setattr(ours.model.config, f"{name}_backbone_revision", COMMIT)
    ours.model.say_backbones_are_loaded()


def without_lora(model: PreTrainedModel) -> PreTrainedModel:
    """The LM that LoRA lies over."""
    plain = type(model)(copy.deepcopy(model.config)).to(model.dtype)
    weights = {name.replace(".base_layer.", "."): value for name, value in model.state_dict().items()}
    plain.load_state_dict({name: value for name, value in weights.items() if ".lora_" not in name})
    return plain


def checkpoint_bytes(theirs: Side, ours: Side, folder: Path) -> dict[str, int]:
    """Of the weights: theirs whole, since nothing less comes back by itself, ours without its backbones."""
    theirs.model.save_pretrained(folder / "theirs")
    ours.model.save_pretrained(folder / "thin", form="thin")
    found = {"theirs": weights_in(folder / "theirs"), "ours": weights_in(folder / "thin")}
    for path in (folder / "theirs").iterdir():
        path.unlink()
    return found


def weights_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def first_caption(ours: Side, inputs: Batch, tokens: int, folder: Path, repeats: int, device: str) -> dict[str, list]:
    """Seconds from `from_pretrained` to the caption of one picture, in each form that ours is saved in.

    Raises:
        ValueError: a form gives other logits.
    """
    expected, found = logits_of(ours.model, inputs), {}
    for form, allowed in TOLERANCE.items():
        if form != "thin":  # which is there already
            ours.model.save_pretrained(folder / form, form=form)

        def load(form: str = form) -> PreTrainedModel:
            loaded = AutoModel.from_pretrained(folder / form, cache_dir=folder / "hub", local_files_only=True)
            return loaded.to(device)

        if form == "merged" and ours.model.dtype != torch.float32:  # LoRA and weight are rounded together, once
            allowed = 2**-4 * expected.abs().max().item()
        apart = (logits_of(load(), inputs) - expected).abs().max().item()  # and the files have been read once
        if not apart <= allowed:
            raise ValueError(f"the {form} form's logits are apart by {apart:.2g}; allowed is {allowed}")
        found[form] = seconds(lambda load=load: caption(load(), inputs, tokens), device, repeats)
        for path in (folder / form).glob("*.safetensors"):
            path.unlink()
    return found


def logits_of(model: nn.Module, inputs: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits.float()


def import_seconds(rounds: int) -> dict[str, list[float]]:
    """Of what a user imports to train, in processes of their own, after one of each that is not counted."""

    def timed(line: str) -> list[float]:
        code = f"import time; start = time.perf_counter(); {line}; print(time.perf_counter() - start)"
        return [float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)]

    runs = {name: lambda _, line=line: timed(line) for name, line in IMPORTS.items()}
    in_turn(runs, 1)
    return in_turn(runs, rounds)
