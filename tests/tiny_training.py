"""Backbones and pictures on disk, as a user has them, small enough to train on in a test, in several processes too."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import tiny
import tiny_models
from transformers import Trainer, TrainingArguments

from lorgnette import LorgnetteCollator, LorgnetteForConditionalGeneration, LorgnetteProcessor
from lorgnette.trainer.process import end_process_group


CAPTIONS = ["a cat", "a red car on the road", "the dog", "What is this? The bird, the cat and the dog."] * 3


def write_backbones(folder: Path) -> tuple[str, str]:
    """A ViT and a Llama with its tokenizer, each in a folder of its own."""
    tokenizer = tiny.chat_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for part in (tiny_models.vision_model(), tiny.image_processor()):
        part.save_pretrained(folder / "vit")
    for part in (tiny_models.language_model(vocab_size=len(tokenizer), **ids), tokenizer):
        part.save_pretrained(folder / "llama")
    return str(folder / "vit"), str(folder / "llama")


def pairs(count: int = len(CAPTIONS)) -> list[dict]:
    """Rows of noise and captions of unequal length, with their numbers."""
    return [{"index": n, "image": tiny.picture(n), "text": CAPTIONS[n]} for n in range(count)]


def write_pairs(folder: Path) -> Path:
    """The same rows as an imagefolder, columns `image` and `text`; PNG keeps every pixel."""
    folder.mkdir()
    with open(folder / "metadata.jsonl", "w") as metadata:
        for row in pairs():
            row["image"].save(folder / f"{row['index']}.png")
            metadata.write(json.dumps({"file_name": f"{row['index']}.png", "text": row["text"]}) + "\n")
    return folder


def joined(
    backbones: tuple[str, str], dropout: float = 0.1
) -> tuple[LorgnetteForConditionalGeneration, LorgnetteProcessor]:
    """A model with LoRA, and its processor."""
    processor = LorgnetteProcessor.from_backbones(*backbones, num_query_tokens=tiny_models.NUM_QUERY_TOKENS)
    model = LorgnetteForConditionalGeneration.from_backbones(
        *backbones,
        processor=processor,
        num_query_tokens=tiny_models.NUM_QUERY_TOKENS,
        qformer_config=tiny_models.QFORMER | {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout},
        lora={"r": 2, "lora_dropout": dropout},
    )
    return model, processor


def trainer(
    model: LorgnetteForConditionalGeneration, processor: LorgnetteProcessor, output_dir: Path, **arguments
) -> Trainer:
    """The stock Trainer on [`pairs`], two steps on the CPU unless told otherwise."""
    rows = arguments.pop("rows", pairs())
    defaults = {
        "use_cpu": True,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "prediction_loss_only": True,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(str(output_dir), **(defaults | arguments)),
        train_dataset=rows,
        eval_dataset=pairs(4),
        data_collator=LorgnetteCollator(processor),
        processing_class=processor,
    )


def run_process(main: Callable[[Path], None]) -> None:
    """One of torchrun's: `main` with the folder of the command line, and the end of the process group."""
    main(Path(sys.argv[1]))
    end_process_group()  # DDP went with `main`
