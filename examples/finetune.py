"""Join a ViT and a language model, train captioning with the stock Trainer, and save the result."""

from dataclasses import dataclass, field

from datasets import Image, load_dataset
from transformers import HfArgumentParser, Trainer, TrainingArguments

from lorgnette import LorgnetteCollator, LorgnetteForConditionalGeneration, LorgnetteProcessor


@dataclass
class Options:
    vision: str = "google/siglip2-base-patch16-224"
    text: str = "HuggingFaceTB/SmolLM2-360M-Instruct"
    qformer: str = "google-bert/bert-base-uncased"  # initial weights of the Q-Former
    dataset: str = "jxie/flickr8k"
    text_columns: list[str] = field(default_factory=lambda: [f"caption_{n}" for n in range(5)])  # of one picture
    output_dir: str = "out/finetune"
    max_steps: int = 1000
    bf16: bool = False


(options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
processor = LorgnetteProcessor.from_backbones(options.vision, options.text)
model = LorgnetteForConditionalGeneration.from_backbones(
    options.vision, options.text, qformer=options.qformer, processor=processor, lora={"r": 16}
)
rows = load_dataset(options.dataset, split="train")
rows = rows.cast_column("image", Image(decode=False))  # the processor decodes
rows = rows.add_column("index", list(range(len(rows))))  # errors then name the row
texts = zip(*(rows[column] for column in options.text_columns), strict=True)
rows = rows.add_column("texts", list(map(list, texts)))  # all texts of a picture are learned together

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        options.output_dir,
        max_steps=options.max_steps,
        bf16=options.bf16,
        per_device_train_batch_size=8,
        learning_rate=1e-4,
        remove_unused_columns=False,  # the collator reads the dataset's columns
    ),
    train_dataset=rows,
    data_collator=LorgnetteCollator(processor, text_column="texts"),
    processing_class=processor,
)
trainer.train()
trainer.save_model()  # model and processor
