"""Answers an Inference Endpoint of this repository, by the payload that `lorgnette serve` takes at `/v1/vision`:

    {"inputs": {"image_url": "https://…", "prompt": "What is this?", "adapter": "default", "use_lora": true}}

The Endpoint asks for `inputs`; without that the fields may stand by themselves. There is one adapter, called as the
environment variable `ADAPTER_NAME` says, `default` otherwise. What is raised here its caller gets as `{"error": …}`.
"""

import os
from contextlib import nullcontext
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor


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

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """Answer one question about one picture, greedily.

        Returns:
            `text`, `usage` (`prompt_tokens`, `completion_tokens`, `total_tokens`), `adapter` and `finish_reason`, which
            is `stop` or, where the limit of tokens ended the answer, `length`.

        Raises:
            ValueError: a field that is missing, unknown or of another type, another adapter, a file that is no picture,
                more tokens than the language model reads, `use_lora: false` of a model that was saved merged.
            OSError: a picture that cannot be fetched, or lies in a private network.
        """
        if isinstance(data, dict) and "inputs" in data and data.get("parameters"):
            raise ValueError("parameters are not read here: max_new_tokens and the others stand in inputs")
        asked = _checked(data.get("inputs", data) if isinstance(data, dict) else data)
        if asked["adapter"] not in ("", self.adapter):
            raise ValueError(f"there is no adapter {asked['adapter'][:100]!r}; there is {self.adapter}")
        if not asked["use_lora"] and self.model.config.saved_form == "merged":
            raise ValueError("use_lora is false, but this model was saved merged: LoRA is part of the LM")
        image = self.processor.load_web_image(asked["image_url"], FETCH_SECONDS)
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
        return {
            "text": self.processor.decode(new, skip_special_tokens=True).strip(),
            "usage": {"prompt_tokens": length, "completion_tokens": count, "total_tokens": length + count},
            "adapter": self.adapter,
            "finish_reason": "stop" if ended else "length",
        }


def _checked(fields: Any) -> dict[str, Any]:
    """All of [`FIELDS`], or a ValueError."""
    if not isinstance(fields, dict):
        raise ValueError(f"an object with {', '.join(FIELDS)} is needed, not a {type(fields).__name__}")
    if unknown := sorted(map(str, fields.keys() - FIELDS.keys())):
        raise ValueError(f"there is no field {unknown[0][:100]!r}; there are {', '.join(FIELDS)}")
    checked = {}
    for name, (kind, default) in FIELDS.items():
        value = fields.get(name)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"{name} is missing")
        if type(value) is not kind:
            raise ValueError(f"{name} is a {type(value).__name__}; a {kind.__name__} is needed")
        checked[name] = value
    if not checked["prompt"].strip():
        raise ValueError("prompt has no words in it")
    if len(checked["prompt"]) > 50_000:
        raise ValueError(f"prompt has {len(checked['prompt'])} characters; 50000 are allowed")
    if checked["stream"]:
        raise ValueError("stream is true; an Endpoint sends its answer as a whole")
    if not 1 <= checked["max_new_tokens"] <= MAX_NEW_TOKENS:
        raise ValueError(f"max_new_tokens is {checked['max_new_tokens']}; it runs from 1 to {MAX_NEW_TOKENS}")
    return checked
