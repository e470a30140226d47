"""A script as TRL's users write it: no lorgnette, stock trainers, a folder with `trust_remote_code`.

python trl_script.py FOLDER KIND OUTPUTS.json
"""

import json
import sys

import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer


WORDS = ["a cat", "a red car", "the dog", "a bird"]
SETTINGS = {
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "report_to": [],
    "use_cpu": True,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "trust_remote_code": True,
    "bf16": False,
    "gradient_checkpointing": False,
}


def say(role: str, content: str) -> list[dict]:
    return [{"role": role, "content": content}]


def rows(kind: str) -> Dataset:
    pictures = [Image.new("RGB", (40, 30), (60 * number, 200 - 60 * number, 30)) for number in range(len(WORDS))]
    made = []
    for picture, words in zip(pictures, WORDS, strict=True):
        row = {"images": [picture], "prompt": say("user", "What?")}
        row |= {
            "sft": {"completion": say("assistant", words)},
            "messages": {"messages": say("user", "What?") + say("assistant", words)},
            "dpo": {"chosen": say("assistant", words), "rejected": say("assistant", "no")},
            "grpo": {},
        }[kind]
        if kind == "messages":
            del row["prompt"]
        made.append(row)
    return Dataset.from_list(made)


def main(folder: str, kind: str, outputs: str) -> None:
    before = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    common = {"train_dataset": rows(kind), "processing_class": processor}
    if kind in ("sft", "messages"):
        trainer = SFTTrainer(folder, args=SFTConfig("run", max_length=None, **SETTINGS), **common)
    elif kind == "dpo":
        trainer = DPOTrainer(folder, args=DPOConfig("run", max_length=None, **SETTINGS), **common)
    else:
        arguments = GRPOConfig("run", num_generations=2, max_completion_length=4, **SETTINGS)
        trainer = GRPOTrainer(
            folder, args=arguments, reward_funcs=lambda completions, **_: [float(n) for n in range(len(completions))],
            **common,
        )  # fmt: skip
    batch = None
    if kind in ("sft", "messages"):
        batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    trainer.save_model("saved")
    trained, kept = dict(trainer.model.named_parameters()), dict(before.named_parameters())
    report = {
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "changed": [name for name, value in trained.items() if not torch.equal(value, kept[name])],
        "trainable": [name for name, value in before.named_parameters() if value.requires_grad],
    }
    if batch is not None:  # what the first loss has to be, by a plain forward of the model as it was
        labels = batch["labels"]
        words = labels.masked_fill(labels == processor.image_token_id, -100)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            logits = before.eval()(**inputs).logits[:, :-1].flatten(0, 1)
        total = torch.nn.functional.cross_entropy(logits, words[:, 1:].flatten(), reduction="sum")
        report |= {"summed": total.item()}  # a row's first token is nothing's next
        report |= {name: int((ids[:, 1:] != -100).sum()) for name, ids in (("labels", labels), ("words", words))}
    with open(outputs, "w", encoding="utf-8") as file:
        json.dump(report, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
