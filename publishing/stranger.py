"""Uses an exported folder as somebody who has downloaded it: without lorgnette, without the Hub.

    python -P stranger.py FOLDER PICTURE SEEN.safetensors

[`look`] is all that it shares with the process that checks it, which calls it with the model that was exported.
"""

import base64
import importlib.abc
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


MAX_NEW_TOKENS = 8


class WithoutLorgnette(importlib.abc.MetaPathFinder):
    """Makes this interpreter one in which lorgnette is not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "lorgnette":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@torch.no_grad()
def look(model: Any, processor: Any, picture: str) -> dict[str, torch.Tensor]:
    """What a model makes of a picture file and of the prompt that its processor writes.

    Returns:
        of stage 2 `logits` `(1, S, vocabulary)`, and of stage 1 `states` `(1, Q + T, D)`, what the Q-Former reads in
        picture and text.
    """
    image = processor.load_image(picture)
    if hasattr(model, "language_model"):
        inputs = processor(images=[[image]], return_tensors="pt").to(device=model.device, dtype=model.dtype)
        return {"logits": model(**inputs).logits.cpu().contiguous()}
    inputs = processor(images=image, text="a picture", return_tensors="pt").to(device=model.device, dtype=model.dtype)
    text = {name: inputs.pop(name) for name in ("input_ids", "attention_mask")}
    features = model.get_vision_features(**inputs).last_hidden_state
    states = model.qformer(
        features, encoder_attention_mask=inputs.get("pixel_attention_mask"), **text
    ).last_hidden_state
    return {"states": states.cpu().contiguous()}


def ask_endpoint(folder: str, picture: str) -> str:
    """What the folder's `handler.py` answers, loaded as the runtime of Inference Endpoints loads it."""
    spec = importlib.util.spec_from_file_location("handler.EndpointHandler", Path(folder, "handler.py"))
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, folder)  # as the runtime does
    spec.loader.exec_module(module)
    image = "data:image;base64," + base64.b64encode(Path(picture).read_bytes()).decode()
    asked = {"image_url": image, "prompt": "What?", "max_new_tokens": MAX_NEW_TOKENS}
    return module.EndpointHandler(folder)({"inputs": asked})["text"]


def main(folder: str, picture: str, seen: str) -> None:
    """Load `folder` by all the ways there are, and write what the model sees.

    Raises:
        RuntimeError: a pipeline or the Endpoint's handler does not answer as the model does, or lorgnette was imported
            after all.
    """
    sys.meta_path.insert(0, WithoutLorgnette())

    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

    trust = {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(folder, **trust)
    processor = AutoProcessor.from_pretrained(folder, **trust)
    auto_class = AutoModelForImageTextToText if hasattr(config, "text_config") else AutoModel
    model = auto_class.from_pretrained(folder, **trust).eval()
    save_file(look(model, processor, picture), seen)
    if hasattr(config, "text_config"):
        settings = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
        settings |= {"eos_token_id": processor.stop_token_ids, "pad_token_id": processor.tokenizer.pad_token_id}
        settings["return_dict_in_generate"] = False
        chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]
        tensors = {"return_tensors": "pt"}
        written = {"tokenize": True, "return_dict": True, "add_generation_prompt": True} | tensors
        asked = {
            "image-to-text": processor(images=[[processor.load_image(picture)]], **tensors),
            "image-text-to-text": processor.apply_chat_template(chat, **written),
            "endpoint": processor(images=[[processor.load_image(picture)]], queries="What?", **tensors),
        }
        known, answers = model.generation_config.eos_token_id or [], {}
        stops = {*processor.stop_token_ids, *([known] if isinstance(known, int) else known)}
        for task, inputs in asked.items():
            ends = {"eos_token_id": sorted(stops)} if task == "endpoint" else {}
            tokens = model.generate(**inputs.to(dtype=model.dtype), **settings | ends)
            answers[task] = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        del model
        said, answer = ask_endpoint(folder, picture), answers.pop("endpoint")
        if said.strip() != answer.strip():
            raise RuntimeError(f"handler.py says {said!r}, the model {answer!r}")
        for task, answer in answers.items():
            pipe = pipeline(task, model=folder, **trust)
            given = {"inputs": picture} if task == "image-to-text" else {"text": chat, "return_full_text": False}
            said = pipe(**given, generate_kwargs=settings)[0]["generated_text"]
            if said.strip() != answer.strip():
                raise RuntimeError(f"pipeline({task!r}) says {said!r}, the model {answer!r}")
            del pipe
    if "lorgnette" in sys.modules:
        raise RuntimeError("lorgnette was imported: this process proves nothing")


if __name__ == "__main__":
    main(*sys.argv[1:])
