"""Answers an Inference Endpoint of this repository, by the payload that `lorgnette serve` takes at `/v1/vision`:

    {"inputs": {"image_url": "https://…", "prompt": "What is this?", "adapter": "default", "use_lora": true}}

The Endpoint asks for `inputs`; without that the fields may stand by themselves. `inputs` may also be a picture alone:
what the runtime makes of a body of type `image/…`, base64, or a URL. Other fields stand in `parameters` then, or in its
`generate_kwargs`, the processor's own query is what is asked without a `prompt`, and the answer has the form of the
image-to-text task, `[{"generated_text": …}]`, which `huggingface_hub.InferenceClient.image_to_text` reads. A `question`
beside `inputs` is the prompt as well, as `InferenceClient.visual_question_answering` sends it, and reads `answer`.

`web_images.py` lies beside this file; the runtime puts their folder first on the path.

There is one adapter, called as the environment variable `ADAPTER_NAME` says, `default` otherwise. What is raised here
its caller gets as `{"error": …}`.
"""

import importlib
import io
import os
import re
from contextlib import nullcontext
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


# by name: transformers' scanner takes a plain import for a package that has to be installed
web_images = importlib.import_module("web_images")

MAX_NEW_TOKENS = 128
FETCH_SECONDS = 10.0
# field -> (type, default); None: it has to be there
FIELDS = {
    "image_url": (str, None),
    "prompt": (str, None),
    "adapter": (str, ""),
    "use_lora": (bool, True),
    "max_new_tokens": (int, MAX_NEW_TOKENS),
    "stream": (bool, False),
}
BOOLS = {"1": True, "true": True, "0": False, "false": False}
URL = re.compile(r"(?i:https?)://|data:")
PICTURE = (str, bytes, bytearray, io.BytesIO, Image.Image)  # what `inputs` is where it is a picture alone
MAX_URL = 8192  # characters, of http and https
# What may be said of how tokens are chosen: the likeliest is taken
GREEDY = {"do_sample": False, "num_beams": 1, "top_k": 1}


class EndpointHandler:
    """What the Endpoint's runtime makes of the repository's folder, and calls with each request.

    Args:
        path: the folder. The code in it is run: it is the repository that the Endpoint was made of.
    """

    def __init__(self, path: str = ""):
        trust = {"trust_remote_code": True}
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        self.processor = AutoProcessor.from_pretrained(path, **trust)
        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype="auto", **trust).eval().to(device)
        self.adapter = os.environ.get("ADAPTER_NAME", "default")

    def __call__(self, data: dict[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
        """Answer one question about one picture, greedily.

        Returns:
            `text`, `usage` (`prompt_tokens`, `completion_tokens`, `total_tokens`), `adapter` and `finish_reason`, which
            is `stop` or, where the limit of tokens ended the answer, `length`. Of a picture alone: a list of one such
            object, whose text is called `generated_text`, and with a `question` `answer` too.

        Raises:
            ValueError: a field that is missing, unknown, given twice or of another type, another adapter, no picture,
                more tokens than the language model reads, `use_lora: false` of a model that was saved merged.
            OSError: a picture that cannot be fetched, or lies in a private network.
        """
        has_inputs = isinstance(data, dict) and "inputs" in data
        question = _question(data) if has_inputs else None
        asked = _checked(*((data["inputs"], data.get("parameters"), question) if has_inputs else (data,)))
        if asked["adapter"] not in ("", self.adapter):
            raise ValueError(f"there is no adapter {asked['adapter'][:100]!r}; there is {self.adapter}")
        if not asked["use_lora"] and self.model.config.saved_form == "merged":
            raise ValueError("use_lora is false, but this model was saved merged: LoRA is part of the LM")
        image = self._load(asked["image_url"])
        inputs = self.processor(images=[[image]], queries=asked["prompt"], return_tensors="pt")
        length, limit = inputs["input_ids"].shape[1], asked["max_new_tokens"]
        context = self.model.max_text_length or self.processor.tokenizer.model_max_length
        if length + limit > context:
            raise ValueError(f"{length} tokens and {limit} new ones are more than the {context} that the model reads")
        known = self.model.generation_config.eos_token_id or []
        ends = sorted({*self.processor.stop_token_ids, *([known] if isinstance(known, int) else known)})
        has_lora = self.model.config.lora_config is not None
        with self.model.disable_adapter() if has_lora and not asked["use_lora"] else nullcontext():
            ids = self.model.generate(
                **inputs.to(device=self.model.device, dtype=self.model.dtype),
                do_sample=False,
                num_beams=1,
                max_new_tokens=limit,
                return_dict_in_generate=False,
                eos_token_id=ends,
                pad_token_id=self.processor.tokenizer.pad_token_id,
            )
        new = ids[0, length:].tolist()
        ended = new[-1] in ends
        count = len(new) - ended
        text = self.processor.decode(new, skip_special_tokens=True).strip()
        answer = {
            "usage": {"prompt_tokens": length, "completion_tokens": count, "total_tokens": length + count},
            "adapter": self.adapter,
            "finish_reason": "stop" if ended else "length",
        }
        is_alone = has_inputs and isinstance(data["inputs"], PICTURE)
        if not is_alone:
            return {"text": text, **answer}
        return [{"generated_text": text, **answer, **({} if question is None else {"answer": text})}]

    def _load(self, picture: str | bytes | Image.Image) -> Image.Image:
        try:
            source = web_images.read_web_image(picture, FETCH_SECONDS) if isinstance(picture, str) else picture
            return self.processor.load_image(source)
        except ValueError as error:
            raise ValueError(str(error).partition("; it begins with ")[0]) from None  # the file is not quoted


def _question(data: dict[str, Any]) -> Any:
    """What is asked beside a picture alone; a ValueError for what else beside `inputs` would be passed over."""
    is_alone = isinstance(data["inputs"], PICTURE)
    known = {"inputs", "parameters", "options"} | ({"question", "image"} if is_alone else set())
    if unknown := sorted(map(str, data.keys() - known)):
        raise ValueError(f"there is no field {unknown[0][:100]!r} beside inputs; there are {', '.join(sorted(known))}")
    if data.get("image") not in (None, data["inputs"]):
        raise ValueError("image is another picture than inputs")
    return data.get("question")


def _checked(inputs: Any, parameters: Any = None, question: Any = None) -> dict[str, Any]:
    """All of [`FIELDS`], the prompt of a picture alone None where it is not given; or a ValueError."""
    is_alone = isinstance(inputs, PICTURE)
    if is_alone:
        inputs = {"image_url": _decoded(inputs)} | ({} if question is None else {"prompt": question})
    fields = _merged(inputs, parameters)
    checked = {}
    for name, (kind, default) in FIELDS.items():
        value = fields.get(name)
        value = default if value is None else value
        if value is None and not (name == "prompt" and is_alone):
            raise ValueError(f"{name} is missing")
        if kind is bool and (isinstance(value, str) or type(value) is int):  # as forms have them
            value = BOOLS.get(str(value).lower(), value)
        if kind is int and isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value):
            value = int(value)
        is_picture = name == "image_url" and isinstance(value, (bytes, Image.Image))
        if type(value) is not kind and value is not None and not is_picture:
            raise ValueError(f"{name} is a {type(value).__name__}; a {kind.__name__} is needed")
        checked[name] = value
    url, prompt = checked["image_url"], checked["prompt"]
    if isinstance(url, str) and not URL.match(url):
        raise ValueError("image_url begins with http://, https:// or data:, and this one does not")
    if isinstance(url, str) and len(url) > MAX_URL and not url.startswith("data:"):
        raise ValueError(f"image_url has {len(url)} characters; {MAX_URL} are allowed")
    if prompt is not None and not prompt.strip():
        raise ValueError("prompt has no words in it")
    if prompt is not None and len(prompt) > 50_000:
        raise ValueError(f"prompt has {len(prompt)} characters; 50000 are allowed")
    if checked["stream"]:
        raise ValueError("stream is true; an Endpoint sends its answer as a whole")
    if not 1 <= checked["max_new_tokens"] <= MAX_NEW_TOKENS:
        raise ValueError(f"max_new_tokens is {checked['max_new_tokens']}; it runs from 1 to {MAX_NEW_TOKENS}")
    return checked


def _decoded(picture: Any) -> str | bytes | Image.Image:
    """`inputs` that are a picture alone: bare base64, URL-safe or without its padding too, and files become bytes."""
    if isinstance(picture, io.BytesIO):
        return picture.getvalue()
    if not isinstance(picture, str) or URL.match(picture):
        return bytes(picture) if isinstance(picture, bytearray) else picture
    try:
        return web_images.decode_base64("".join(picture.split()))
    except ValueError as error:
        raise ValueError(f"inputs is neither an http, https or data URL nor base64: {error}") from None


def _merged(inputs: Any, parameters: Any) -> dict[str, Any]:
    """The fields of `inputs`, `parameters` and what is nested in these, each given once."""
    if not isinstance(inputs, dict):
        raise ValueError(f"an object with {', '.join(FIELDS)} is needed, not a {type(inputs).__name__}")
    groups, fields = [("parameters", {} if parameters is None else parameters)], dict(inputs)
    for where, group in groups:
        if not isinstance(group, dict):
            raise ValueError(f"{where} is a {type(group).__name__}; an object is needed")
        for name, value in group.items():
            if value is None:  # as clients send what nobody chose
                continue
            if name in ("generate_kwargs", "generation_parameters") and where == "parameters":
                groups.append((name, value))
            elif name in GREEDY:
                if value != GREEDY[name]:
                    raise ValueError(f"{name} may be {GREEDY[name]} alone: the likeliest token is always taken here")
            elif name in fields:
                raise ValueError(f"{name} is given twice")
            else:
                fields[name] = value
    if unknown := sorted(map(str, fields.keys() - FIELDS.keys())):
        raise ValueError(f"there is no field {unknown[0][:100]!r}; there are {', '.join(FIELDS)}")
    return fields
