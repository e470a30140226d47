"""Inference Endpoints handler, with the payload of `/v1/vision` of `lorgnette serve`:

    {"inputs": {"image_url": "https://…", "prompt": "What is this?", "adapter": "default", "use_lora": true}}

Endpoints require `inputs`; direct callers may send the fields without it. `inputs` may also be a picture alone: an
`image/…` body as the runtime decodes it, base64, or a URL. Then the other fields are in `parameters` or its
`generate_kwargs`, the default `prompt` is the processor's own query, and the answer has the format of the image-to-text
task, `[{"generated_text": …}]`, which `huggingface_hub.InferenceClient.image_to_text` reads. A `question` next to
`inputs` is the prompt too: `InferenceClient.visual_question_answering` sends it, and reads `answer`.

`web_images.py` is in this file's folder, which the runtime puts first on the path.

The one adapter has the name in the environment variable `ADAPTER_NAME`, or `default`. The runtime sends exceptions to
the caller as `{"error": …}`.
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


# transformers' import scanner would require a package of this name for a plain import
web_images = importlib.import_module("web_images")

MAX_NEW_TOKENS = 128
FETCH_SECONDS = 10.0
# field -> (type, default); None: required
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
PICTURE = (str, bytes, bytearray, io.BytesIO, Image.Image)  # types of `inputs` as a picture alone
MAX_URL = 8192  # characters, of http and https
# the accepted generation settings: decoding is greedy
GREEDY = {"do_sample": False, "num_beams": 1, "top_k": 1}


class EndpointHandler:
    """The class that the Endpoints runtime instantiates and calls with each request.

    Args:
        path: the repository's folder. Its remote code runs.
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
        request = _checked(*((data["inputs"], data.get("parameters"), question) if has_inputs else (data,)))
        if request["adapter"] not in ("", self.adapter):
            raise ValueError(f"there is no adapter {request['adapter'][:100]!r}; there is {self.adapter}")
        if not request["use_lora"] and self.model.config.saved_form == "merged":
            raise ValueError("use_lora is false, but this model was saved merged: LoRA is part of the LM")
        image = self._load(request["image_url"])
        inputs = self.processor(images=[[image]], queries=request["prompt"], return_tensors="pt")
        length, limit = inputs["input_ids"].shape[1], request["max_new_tokens"]
        context = self.model.max_text_length or self.processor.tokenizer.model_max_length
        if length + limit > context:
            raise ValueError(f"{length} tokens and {limit} new ones are more than the {context} that the model reads")
        eos = self.model.generation_config.eos_token_id or []
        ends = sorted({*self.processor.stop_token_ids, *([eos] if isinstance(eos, int) else eos)})
        has_lora = self.model.config.lora_config is not None
        with self.model.disable_adapter() if has_lora and not request["use_lora"] else nullcontext():
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
            raise ValueError(str(error).partition("; it begins with ")[0]) from None  # without the file's bytes


def _question(data: dict[str, Any]) -> Any:
    """The `question` next to a picture alone; raises a ValueError for fields that would be ignored."""
    is_alone = isinstance(data["inputs"], PICTURE)
    allowed = {"inputs", "parameters", "options"} | ({"question", "image"} if is_alone else set())
    if unknown := sorted(map(str, data.keys() - allowed)):
        raise ValueError(f"there is no field {unknown[0][:100]!r} beside inputs, but {', '.join(sorted(allowed))}")
    if data.get("image") not in (None, data["inputs"]):
        raise ValueError("image is another picture than inputs")
    return data.get("question")


def _checked(inputs: Any, parameters: Any = None, question: Any = None) -> dict[str, Any]:
    """All of [`FIELDS`], checked; the prompt of a picture alone may be None. Raises a ValueError."""
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
        if kind is bool and (isinstance(value, str) or type(value) is int):  # as HTML forms send them
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
        raise ValueError("prompt is empty")
    if prompt is not None and len(prompt) > 50_000:
        raise ValueError(f"prompt has {len(prompt)} characters; 50000 are allowed")
    if checked["stream"]:
        raise ValueError("stream is true; an Endpoint sends its answer as a whole")
    if not 1 <= checked["max_new_tokens"] <= MAX_NEW_TOKENS:
        raise ValueError(f"max_new_tokens is {checked['max_new_tokens']}; it runs from 1 to {MAX_NEW_TOKENS}")
    return checked


def _decoded(picture: Any) -> str | bytes | Image.Image:
    """`inputs` as a picture alone: base64 (URL-safe and unpadded too) and files become bytes."""
    if isinstance(picture, io.BytesIO):
        return picture.getvalue()
    if not isinstance(picture, str) or URL.match(picture):
        return bytes(picture) if isinstance(picture, bytearray) else picture
    try:
        return web_images.decode_base64("".join(picture.split()))
    except ValueError as error:
        raise ValueError(f"inputs is neither an http, https or data URL nor base64: {error}") from None


def _merged(inputs: Any, parameters: Any) -> dict[str, Any]:
    """The fields of `inputs`, `parameters` and their nested objects; a field given twice is an error."""
    if not isinstance(inputs, dict):
        raise ValueError(f"an object with {', '.join(FIELDS)} is needed, not a {type(inputs).__name__}")
    groups, fields = [("parameters", {} if parameters is None else parameters)], dict(inputs)
    for where, group in groups:
        if not isinstance(group, dict):
            raise ValueError(f"{where} is a {type(group).__name__}; an object is needed")
        for name, value in group.items():
            if value is None:  # clients send null for unset fields
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
