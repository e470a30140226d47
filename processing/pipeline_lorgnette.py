"""`pipeline("image-to-text")`: pictures in, what the model says of them out."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import BatchFeature, GenerationConfig, Pipeline

from .image_loading import naming


class LorgnetteImageToTextPipeline(Pipeline):
    """The `image-to-text` task as transformers had it up to version 4.

        pipe = pipeline("image-to-text", model=folder, trust_remote_code=True)
        pipe("cat.png")                            # [{"generated_text": "a cat on a mat"}]
        pipe(["cat.png", picture], prompt="What colour is it?", batch_size=2)   # a list of such lists

    The processor's `query` asks where no `prompt` does. Up to 256 new tokens are generated, unless the model's
    generation config or the caller says otherwise.
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=256)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.processor is None:
            raise ValueError("a LorgnetteProcessor is needed: pass it as processor=")
        self.model.check_processor(self.processor)

    def __call__(
        self, inputs: Any = None, *, images: Any = None, **kwargs: Any
    ) -> list[Any] | Iterator[list[dict[str, str]]]:
        """Say something about each image. Its arguments are those of transformers 4's `ImageToTextPipeline.__call__`.

        Args:
            inputs: one ([`load_image`] says what counts as one), or a list, a column, a dataset (its rows are images or
                have one under `image`) or a generator of them. A list in a list is several images in one prompt.
            images: the same as `inputs`, by the name that scripts of old use.
            prompt: what to ask about each, plain text.
            generate_kwargs: for `generate`. `stop_strings` need no tokenizer here; of a `return_dict_in_generate` the
                sequences are read.
            max_new_tokens: the same as in `generate_kwargs`.
            timeout: seconds for the download of an image.
            batch_size, num_workers: as all pipelines have them.

        Returns:
            `[{"generated_text": …}]` for one image, the continuation alone, an entry for each of
            `num_return_sequences`; a list of those for many; an iterator over them for a generator or a torch dataset.

        Raises:
            ValueError: no images, an image that is none (with its position); for OSError and TypeError see
                [`load_image`].
        """
        if (inputs is None) == (images is None):
            raise ValueError("no images given" if inputs is None else "images are given twice: as inputs and as images")
        images = inputs if images is None else images
        if _is_one(images):
            return super().__call__(images, **kwargs)
        if hasattr(images, "__len__") and hasattr(images, "__getitem__"):
            if not len(images):
                raise ValueError("images is an empty list")
            answers = super().__call__(_Numbered(images), **kwargs)
            return answers if isinstance(images, Dataset) else list(answers)
        if not isinstance(images, Iterable):
            raise TypeError(f"{type(images).__name__} is neither an image nor a collection of images")
        return super().__call__((_Item(*item) for item in enumerate(images)), **kwargs)

    def _sanitize_parameters(
        self,
        prompt: str | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        max_new_tokens: int | None = None,
        timeout: float | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess = {"prompt": prompt, "timeout": timeout}
        generate_kwargs = dict(generate_kwargs or {})
        if max_new_tokens is not None:
            if "max_new_tokens" in generate_kwargs:
                raise ValueError("max_new_tokens is given twice: by itself and in generate_kwargs")
            generate_kwargs["max_new_tokens"] = max_new_tokens
        forward = {"generate_kwargs": generate_kwargs} if generate_kwargs else {}
        return {name: value for name, value in preprocess.items() if value is not None}, forward, {}

    def preprocess(self, image: Any, prompt: str | None = None, timeout: float | None = None) -> BatchFeature:
        where = "the image"
        if isinstance(image, _Item):
            where, image = f"image {image.position}", image.image
        if isinstance(image, dict) and "image" in image:
            image = image["image"]
        sources = list(image) if isinstance(image, (list, tuple)) else [image]
        if not sources:
            raise ValueError(f"{where} is an empty list")
        with naming(where):
            images = [self.processor.load_image(source, timeout) for source in sources]
        features = self.processor(images=[images], queries=prompt, return_tensors="pt")
        return features.to(dtype=self.dtype)

    def _forward(
        self, model_inputs: BatchFeature, generate_kwargs: dict[str, Any] | None = None
    ) -> dict[str, torch.Tensor]:
        generate_kwargs = dict(generate_kwargs or {})
        if "generation_config" not in generate_kwargs:
            generate_kwargs = missing_tokens(self.model.generation_config, self.processor) | generate_kwargs
        if hasattr(self, "_prepare_generate_kwargs"):
            generate_kwargs = self._prepare_generate_kwargs(generate_kwargs)
        else:  # transformers 5.17
            generate_kwargs.setdefault("generation_config", self.generation_config)
        configs = (self.model.generation_config, generate_kwargs.get("generation_config"))
        if "stop_strings" in generate_kwargs or any(getattr(config, "stop_strings", None) for config in configs):
            generate_kwargs.setdefault("tokenizer", self.processor.tokenizer)
        ids = self.model.generate(**model_inputs, **generate_kwargs)
        ids = getattr(ids, "sequences", ids)  # where return_dict_in_generate asks for all there is
        rows, length = model_inputs["input_ids"].shape
        return {"answers": ids[:, length:].unflatten(0, (rows, -1))}  # (B, num_return_sequences, T)

    def postprocess(self, model_outputs: dict[str, torch.Tensor]) -> list[dict[str, str]]:
        texts = self.processor.batch_decode(model_outputs["answers"][0], skip_special_tokens=True)
        return [{"generated_text": text.strip()} for text in texts]

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save model, processor and their code into a folder that `pipeline` loads again."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


def missing_tokens(config: GenerationConfig, processor: Any) -> dict[str, Any]:
    """What a model's generation config does not know: a base LM's has no pad token and no end of a turn.

    Returns:
        `pad_token_id` and `eos_token_id` (a list) for `generate`, each only where it has to be said.
    """
    missing: dict[str, Any] = {}
    if config.pad_token_id is None:
        missing["pad_token_id"] = processor.tokenizer.pad_token_id
    known = config.eos_token_id
    known = known if isinstance(known, list) else [] if known is None else [known]
    if unknown := set(processor.stop_token_ids) - set(known):
        missing["eos_token_id"] = [*known, *sorted(unknown)]
    return missing


class _Item(NamedTuple):
    position: int
    image: Any


class _Numbered(Dataset):
    """Any collection as a torch `Dataset`, which pipelines read item by item, with positions for error messages."""

    def __init__(self, images: Any):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> _Item:
        return _Item(position, self.images[position])


def _is_one(images: Any) -> bool:
    if isinstance(images, (np.ndarray, torch.Tensor)):
        return images.ndim != 4
    return isinstance(images, (str, bytes, bytearray, os.PathLike, Image.Image, dict)) or hasattr(images, "read")
