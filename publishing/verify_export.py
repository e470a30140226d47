"""Load and run an exported folder in a process without lorgnette and without the Hub.

    python -P verify_export.py FOLDER PICTURE OUTPUTS.safetensors

The process that exported the model calls [`reference_outputs`] too, with its own model, and compares.
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
    """Makes imports of lorgnette fail in this interpreter."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "lorgnette":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@torch.no_grad()
def reference_outputs(model: Any, processor: Any, picture: str) -> dict[str, torch.Tensor]:
    """Run a model on a picture file and the processor's default prompt.

    Returns:
        stage 2: `logits` `(1, S, vocabulary)`; stage 1: `states` `(1, Q + T, D)`, the Q-Former's outputs.
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
    """The answer of the folder's `handler.py`, loaded as the Inference Endpoints runtime loads it."""
    spec = importlib.util.spec_from_file_location("handler.EndpointHandler", Path(folder, "handler.py"))
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, folder)  # as the runtime does
    spec.loader.exec_module(module)
    image = "data:image;base64," + base64.b64encode(Path(picture).read_bytes()).decode()
    fields = {"image_url": image, "prompt": "What?", "max_new_tokens": MAX_NEW_TOKENS}
    return module.EndpointHandler(folder)({"inputs": fields})["text"]


def main(folder: str, picture: str, outputs: str) -> None:
    """Load `folder` with every Auto class, both pipelines and the handler, and write the model's outputs.

    Raises:
        RuntimeError: a pipeline or the Endpoint's handler and the model answer differently; lorgnette was imported.
    """
    sys.meta_path.insert(0, WithoutLorgnette())

    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

    trust = {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(folder, **trust)
    processor = AutoProcessor.from_pretrained(folder, **trust)
    auto_class = AutoModelForImageTextToText if hasattr(config, "text_config") else AutoModel
    model = auto_class.from_pretrained(folder, **trust).eval()
    save_file(reference_outputs(model, processor, picture), outputs)
    if hasattr(config, "text_config"):
        settings = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
        settings |= {"eos_token_id": processor.stop_token_ids, "pad_token_id": processor.tokenizer.pad_token_id}
        settings["return_dict_in_generate"] = False
        chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]
        tensors = {"return_tensors": "pt"}
        template = {"tokenize": True, "return_dict": True, "add_generation_prompt": True} | tensors
        prompts = {
            "image-to-text": processor(images=[[processor.load_image(picture)]], **tensors),
            "image-text-to-text": processor.apply_chat_template(chat, **template),
            "endpoint": processor(images=[[processor.load_image(picture)]], queries="What?", **tensors),
        }
        eos, answers = model.generation_config.eos_token_id or [], {}
        stops = {*processor.stop_token_ids, *([eos] if isinstance(eos, int) else eos)}
        for task, inputs in prompts.items():
            ends = {"eos_token_id": sorted(stops)} if task == "endpoint" else {}
            tokens = model.generate(**inputs.to(dtype=model.dtype), **settings | ends)
            answers[task] = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        del model
        text, answer = ask_endpoint(folder, picture), answers.pop("endpoint")
        if text.strip() != answer.strip():
            raise RuntimeError(f"handler.py answers {text!r}, the model {answer!r}")
        for task, answer in answers.items():
            pipe = pipeline(task, model=folder, **trust)
            call = {"inputs": picture} if task == "image-to-text" else {"text": chat, "return_full_text": False}
            text = pipe(**call, generate_kwargs=settings)[0]["generated_text"]
            if text.strip() != answer.strip():
                raise RuntimeError(f"pipeline({task!r}) answers {text!r}, the model {answer!r}")
            del pipe
    if "lorgnette" in sys.modules:
        raise RuntimeError("lorgnette was imported: this process proves nothing")


if __name__ == "__main__":
    main(*sys.argv[1:])
