"""Loads a model's folder in a process without lorgnette, and reports the outputs.

python load_without_lorgnette.py FOLDER INPUTS.safetensors OUTPUTS.json [PREFIX_OF_RESAVED_FOLDERS]
python load_without_lorgnette.py STAGE_1_FOLDER INPUTS.safetensors OUTPUTS.safetensors RESAVED_FOLDER
"""

import importlib.abc
import importlib.machinery
import json
import os
import sys


class NoLorgnette(importlib.abc.MetaPathFinder):
    """The test environment has the package installed; here its import fails as if it had not."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "lorgnette" or fullname.startswith("lorgnette."):
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


class Without(importlib.machinery.PathFinder):
    """Finds all that is installed but the package that the environment variable `WITHOUT` names."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname.split(".")[0] == os.environ.get("WITHOUT"):
            return None
        return super().find_spec(fullname, path, target)


sys.meta_path[:] = [NoLorgnette(), *(Without if f is importlib.machinery.PathFinder else f for f in sys.meta_path)]
sys.path[:] = [entry for entry in sys.path if entry not in ("", ".")]

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    pipeline,
)


def retrieve(folder: str, inputs_file: str, outputs_file: str, resaved: str) -> None:
    """A stage-1 folder: what `forward` and `retrieve` give, and the folder saved again."""
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    images = [Image.new("RGB", (40, 30), (200, 30, 30)), Image.new("RGB", (40, 30), (0, 0, 200))]
    with torch.no_grad():
        outputs = model(**load_file(inputs_file))
    scores = model.retrieve(images, ["the cat", "a dog", "a picture"], rerank=1)
    save_file({"logits": outputs.logits_per_image, "scores": scores}, outputs_file)
    model.save_pretrained(resaved)


def main(folder: str, inputs_file: str, outputs_file: str, resaved: str | None = None) -> None:
    if outputs_file.endswith(".safetensors"):
        retrieve(folder, inputs_file, outputs_file, resaved)
        return
    trust = {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(folder, **trust)
    processor = AutoProcessor.from_pretrained(folder, **trust)
    tensors = {}
    for auto_class in (AutoModel, AutoModelForMultimodalLM, AutoModelForImageTextToText):
        model = auto_class.from_pretrained(folder, **trust).eval()
        with torch.no_grad():
            outputs = model(**load_file(inputs_file))
            if auto_class is AutoModel:  # without its head, which is in its language model
                outputs.logits = model.language_model.get_output_embeddings()(outputs.last_hidden_state)
        tensors[auto_class.__name__] = outputs.logits
    save_file(tensors, outputs_file.replace(".json", ".safetensors"))

    picture = Image.new("RGB", (40, 30), (200, 30, 30))
    settings = {"generate_kwargs": {"max_new_tokens": 5, "do_sample": False}}
    captions = pipeline("image-to-text", model=folder, **trust)
    answers = pipeline("image-text-to-text", model=folder, **trust)
    report = {
        "classes": [type(part).__name__ for part in (config, processor, model)],
        "modules": [type(part).__module__ for part in (config, processor, model)],
        "trainable": sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad),
        "caption": captions(picture, **settings),
        "answer": answers(picture, text=processor.build_prompt(), return_full_text=False, **settings),
    }
    if resaved:
        model.save_pretrained(f"{resaved}-model")
        captions.save_pretrained(f"{resaved}-captions")
        answers.save_pretrained(f"{resaved}-answers")
    with open(outputs_file, "w", encoding="utf-8") as file:
        json.dump(report, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
