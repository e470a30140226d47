"""`pipeline("image-to-text")`: pictures in, captions and answers out."""

import copy
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, StackDataset
from transformers import BatchFeature, GenerationConfig, Pipeline

from ..configuration.configuration_lorgnette import IN_PACKAGE, from_package
from .prompt_encoding import error_context


_POSITION = "lorgnette: position"  # of an image among several, for error messages


class LorgnetteImageToTextPipeline(Pipeline):
    """The `image-to-text` task as transformers had it up to version 4.

        pipe = pipeline("image-to-text", model=folder, trust_remote_code=True)
        pipe("cat.png")                            # [{"generated_text": "a cat on a mat"}]
        pipe(["cat.png", picture], prompt="What colour is it?", batch_size=2)   # a list of such lists

    The processor's `query` asks where no `prompt` does. The default is 256 new tokens at most.
    """

    _load_processor, _load_image_processor, _load_feature_extractor, _load_tokenizer = True, False, False, False
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=256)

    def __init__(self, model: Any, processor: Any = None, **kwargs: Any):
        if processor is None:
            raise ValueError("a LorgnetteProcessor is needed: pass it as processor=")
        if processor.num_query_tokens == model.config.qformer_config.num_query_tokens:
            processor = copy.copy(processor)
            processor.num_query_tokens = model.config.num_query_tokens  # which `model_kwargs` may have made fewer
        bundled = model._processor  # files that a save of the model writes
        model.adopt_processor(processor)  # first: transformers 5.17 copies what ends an answer
        model._processor = bundled
        super().__init__(model=model, processor=processor, **kwargs)

    def __call__(self, inputs: Any = None, *, images: Any = None, **kwargs: Any) -> Any:
        """Describe each image.

        Args:
            inputs, images: an image, see [`load_image`], or a list, a column, a dataset (its rows are images or have
                one under `image`) or a generator of them. A list in a list is several images in one prompt.
            kwargs: `prompt`, plain text; `generate_kwargs`; `max_new_tokens`; `timeout`, seconds for a download;
                `batch_size` and `num_workers` as all pipelines have them.

        Returns `[{"generated_text": …}]` for one image, an entry for each of `num_return_sequences`; a list of those
        for many; an iterator over them for a generator or a torch dataset. Raises a ValueError for no images, and
        what [`load_image`] does, with the image's position.
        """
        if (inputs is None) == (images is None):
            raise ValueError("no images given" if inputs is None else "images are given twice: as inputs and as images")
        images = inputs if images is None else images
        if _is_one(images):
            return super().__call__(images, **kwargs)
        if not hasattr(images, "__len__") or not hasattr(images, "__getitem__"):
            numbered = ({_POSITION: position, "item": item} for position, item in enumerate(images))
            return super().__call__(numbered, **kwargs)
        if not len(images):
            raise ValueError("images is an empty list")
        answers = super().__call__(StackDataset(**{_POSITION: range(len(images)), "item": images}), **kwargs)
        if isinstance(images, Dataset):
            return answers
        with from_package("assembly.prompt_cache", "").kept_prompts(self.model) if IN_PACKAGE else nullcontext():
            return list(answers)

    def _sanitize_parameters(self, generate_kwargs: Any = None, max_new_tokens: Any = None, **preprocess: Any) -> Any:
        preprocess = {name: value for name, value in preprocess.items() if value is not None}
        limit = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
        if limit.keys() & (generate_kwargs or {}):
            raise ValueError("max_new_tokens is given twice: by itself and in generate_kwargs")
        generate_kwargs = {**(generate_kwargs or {}), **limit}
        return preprocess, {"generate_kwargs": generate_kwargs} if generate_kwargs else {}, {}

    def preprocess(self, image: Any, prompt: str | None = None, timeout: float | None = None) -> BatchFeature:
        where = "the image"
        if isinstance(image, dict) and _POSITION in image:
            where, image = f"image {image[_POSITION]}", image["item"]
        image = image["image"] if isinstance(image, dict) and "image" in image else image
        sources = list(image) if isinstance(image, (list, tuple)) else [image]
        with error_context(where):
            images = [self.processor.load_image(source, timeout) for source in sources]
            inputs = self.processor(images=[images], queries=prompt, return_tensors="pt")
        return inputs.to(dtype=self.dtype)

    def _forward(self, model_inputs: BatchFeature, generate_kwargs: Any = None) -> dict[str, torch.Tensor]:
        settings = {"tokenizer": self.processor.tokenizer, **(generate_kwargs or {})}  # stop_strings need the tokenizer
        if hasattr(self, "_prepare_generate_kwargs"):
            settings = self._prepare_generate_kwargs(settings)
        else:  # transformers 5.17
            settings.setdefault("generation_config", self.generation_config)
        ids = self.model.generate(**model_inputs, **settings)
        ids = getattr(ids, "sequences", ids)  # of return_dict_in_generate
        rows, length = model_inputs["input_ids"].shape
        return {"answers": ids[:, length:].unflatten(0, (rows, -1))}  # (B, num_return_sequences, T)

    def postprocess(self, model_outputs: dict[str, torch.Tensor]) -> list[dict[str, str]]:
        texts = self.processor.batch_decode(model_outputs["answers"][0], skip_special_tokens=True)
        return [{"generated_text": text.strip()} for text in texts]

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save model, processor and their code into a folder that `pipeline` loads again."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


def _is_one(images: Any) -> bool:
    if isinstance(images, (np.ndarray, torch.Tensor)):
        return images.ndim != 4
    one = isinstance(images, (str, bytes, bytearray, os.PathLike, Image.Image, dict)) or hasattr(images, "read")
    return one or not (hasattr(images, "__iter__") or hasattr(images, "__getitem__"))
