"""Write a recipe of stage 2 that fits a data set and this machine's memory, with the reason for each line."""

import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from ..assembly.sources import model_type_of
from .arguments import SourceArguments
from .columns import Contents, contents_of
from .messages import set_up_logging
from .recipe import parse_recipe


# least GB of memory, ViT, LM, rows that go through the model at once
_ON_GPU = (
    (40, "google/siglip2-so400m-patch14-384", "HuggingFaceTB/SmolLM2-1.7B-Instruct", 8),
    (16, "google/siglip2-base-patch16-224", "HuggingFaceTB/SmolLM2-360M-Instruct", 16),
    (8, "google/siglip2-base-patch16-224", "HuggingFaceTB/SmolLM2-135M-Instruct", 16),
    (0, "google/vit-base-patch16-224", "HuggingFaceTB/SmolLM2-135M-Instruct", 8),
)
_ON_CPU = (
    (32, "google/siglip2-base-patch16-224", "HuggingFaceTB/SmolLM2-360M-Instruct", 8),
    (8, "google/siglip2-base-patch16-224", "HuggingFaceTB/SmolLM2-135M-Instruct", 8),
    (0, "google/vit-base-patch16-224", "HuggingFaceTB/SmolLM2-135M-Instruct", 4),
)
QFORMER = "google-bert/bert-base-uncased"
FEWEST_TO_SPLIT, FEWEST_HELD_OUT, MOST_HELD_OUT, SHARE_HELD_OUT = 20, 8, 500, 0.05
LARGEST_BATCH, STEPS, MOST_EPOCHS = 32, 1000, 10
FEW_PICTURES = 5000
_VALIDATION = ("validation", "valid", "val", "dev")
_YAML_WORDS = ("null", "true", "false", "yes", "no", "on", "off", "y", "n", "~")


@dataclass
class InitArguments(SourceArguments):
    """The data set, and what the recipe should not choose itself."""

    text_column: list[str] | str | None = field(
        default=None, metadata={"help": "Column with the text, or a JSON list of several; recognised without it."}
    )
    vision: str | None = field(default=None, metadata={"help": "ViT; without it chosen by the memory."})
    text: str | None = field(default=None, metadata={"help": "Causal LM; without it chosen by the memory."})
    qformer: str | None = field(default=QFORMER, metadata={"help": "The Q-Former's initial weights; null: random."})
    output: str = field(default="recipe.yaml", metadata={"help": "The file to write."})
    force: bool = field(default=False, metadata={"help": "Overwrite an existing file."})

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.text_column, str) and self.text_column.startswith("["):
            self.text_column = json.loads(self.text_column)


def main(argv: list[str], prog: str = "python -m lorgnette.trainer init") -> None:
    """Write the recipe, and print the commands that come next."""
    (args,) = parse_recipe((InitArguments,), argv, prog=prog, description=__doc__)
    write(args)


def write(args: InitArguments) -> None:
    """Write `args.output`.

    Raises:
        FileExistsError: it exists, and `force` is not set.
        FileNotFoundError, ValueError: see [`~lorgnette.trainer.columns.contents_of`].
    """
    path = Path(args.output)
    if path.exists() and not args.force:
        raise FileExistsError(f"{path} exists: choose another --output, or overwrite it with --force")
    set_up_logging(True)
    contents = contents_of(args, args.text_column)
    folder = f"out/{_name(args.dataset)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(recipe(args, contents, folder), encoding="utf-8")
    rows = contents.splits[contents.train_split]
    columns = contents.messages_column or contents.text_column
    columns = columns if isinstance(columns, str) else ", ".join(columns)
    pictures = contents.image_column or "in the chats"
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(f"{args.dataset}: {contents.format}, {rows} rows; pictures: {pictures}; texts: {columns}")
    console.print(f"{path} is a starting point; its comments say why each value was chosen. Next:\n")
    console.print(f"  lorgnette check stage2 --config {_shell(str(path))}")
    console.print(f"  lorgnette train stage2 --config {_shell(str(path))}")
    console.print(f"  lorgnette caption {_shell(folder)} {_shell(contents.picture or 'picture.jpg')}")


def memory_of_this_machine() -> tuple[float, bool]:
    """GB of memory to train in, and whether it is a GPU's; 0 where it is not known."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / 1e9, True
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return 0.0, False
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(total, int(text) if text.isdigit() else total) / 1e9, False


@dataclass
class Plan:
    """Numbers that follow from the number of rows.

    Attributes:
        held_out: rows for evaluation, 0 for none.
        rows: of training, each a picture with its texts.
        batch, at_once: rows in a step, and of these in the model at the same time.
        steps: an epoch.
    """

    held_out: int
    rows: int
    batch: int
    at_once: int
    steps: int
    epochs: int


def plan(rows: int, texts: float, at_once: int, hold_out: bool = True) -> Plan:
    """Divide `rows` pictures with so many `texts` each into batches that they fill, at least four an epoch."""
    held_out = 0
    if hold_out and rows >= FEWEST_TO_SPLIT:
        held_out = min(max(FEWEST_HELD_OUT, round(rows * SHARE_HELD_OUT)), MOST_HELD_OUT)
    rows = max(rows - held_out, 1)
    batch = min(2 ** max(int(math.log2(rows)) - 2, 1), 2 ** int(math.log2(max(LARGEST_BATCH / texts, 1))), rows)
    at_once = min(
        max(2 ** int(math.log2(2 * at_once / (1 + texts))), 1), batch
    )  # a picture costs about as much as a text
    steps = math.ceil(math.ceil(rows / at_once) / (batch // at_once))
    epochs = 1 if steps > 5 * STEPS else min(max(math.ceil(STEPS / steps), 2), MOST_EPOCHS)
    return Plan(held_out, rows, batch, at_once, steps, epochs)


def recipe(args: InitArguments, contents: Contents, output_dir: str) -> str:
    """The recipe's text."""
    memory, on_gpu = memory_of_this_machine()
    _, vision, text, at_once = next(row for row in (_ON_GPU if on_gpu else _ON_CPU) if memory >= row[0])
    rows = contents.splits[contents.train_split]
    validation = next((name for name in _VALIDATION if name in contents.splits and name != contents.train_split), None)
    numbers = plan(rows, contents.texts, at_once, hold_out=validation is None)
    where = f"{memory:.0f} GB of {'GPU memory' if on_gpu else 'memory, no CUDA GPU'}" if memory else "unknown memory"
    lines: list[tuple[str, str]] = [
        ("", "--- backbones: Hub ids or folders. `lorgnette check` measures the memory that training takes"),
        (f"vision: {_yaml(args.vision or vision)}", "given" if args.vision else f"chosen for {where}; frozen"),
        (f"text: {_yaml(args.text or text)}", "given" if args.text else "the LM, chosen likewise; frozen, with LoRA"),
    ]
    if args.qformer is not None:
        lines.append((f"qformer: {_yaml(args.qformer)}", "the Q-Former's initial weights; without it random ones"))
    lines += [
        ("num_query_tokens: 32", "visual tokens a picture, as in BLIP-2"),
        ("lora: {r: 16, lora_alpha: 32, lora_dropout: 0.05}", "without LoRA the LM keeps its own style of writing"),
    ]
    if not _has_learned(args.qformer):
        pooled = "queries begin and end with pooled features: it helps with few pictures"
        lines.insert(-1, ("qformer_config: {use_pooled_features: true}", pooled))
    if contents.messages_column is None and contents.query_column is None:
        lines.append(("query: Describe the picture.", "the prompt of each picture, saved with the model"))
    lines += [("", ""), *_data_lines(args, contents, numbers, validation)]
    lines += [("", ""), *_training_lines(numbers, rows, output_dir, numbers.held_out > 0 or validation is not None)]
    width = min(max(len(line) for line, comment in lines if comment), 60)
    written = [f"{line:<{width}}  # {comment}" if line and comment else line or f"# {comment}".rstrip(" #")
               for line, comment in lines]  # fmt: skip
    head = [
        f"# Stage 2 for {args.dataset}: {contents.format}, {rows} rows. All values are starting points.",
        "#",
        f"#   lorgnette check stage2 --config {_shell(args.output)}   # reads all rows and times two steps",
        f"#   lorgnette train stage2 --config {_shell(args.output)}",
        "#",
        "# Any line can be overridden by an option of the same name.",
    ]
    if rows < FEW_PICTURES:
        head += [
            f"# {rows} pictures are few for a new Q-Former: it may learn how the texts are written, and little of",
            "# what the pictures show. A trained model is another start: `model: …` in place of vision, text, qformer,",
            "# num_query_tokens, qformer_config and lora.",
        ]
    return "\n".join([*head, "", *written]) + "\n"


def _data_lines(
    args: InitArguments, contents: Contents, numbers: Plan, validation: str | None
) -> list[tuple[str, str]]:
    rows = contents.splits[contents.train_split]
    lines = [
        ("", "--- data"),
        (f"dataset: {_yaml(args.dataset)}", f"read as {contents.format}; `format: …` overrules it"),
    ]
    for name in ("format", "image_root", "dataset_config", "dataset_revision"):
        if getattr(args, name) is not None:
            lines.append((f"{name}: {_yaml(getattr(args, name))}", "given"))
    if contents.image_column is not None:
        lines.append((f"image_column: {_yaml(contents.image_column)}", f"of {', '.join(contents.columns)}"))
    if contents.messages_column is not None:
        lines.append((f"messages_column: {_yaml(contents.messages_column)}", "chats; training is on the last answer"))
    else:
        texts = f"{contents.texts:.3g} texts a picture, learned together" if contents.texts > 1 else "its text"
        lines.append((f"text_column: {_yaml(contents.text_column)}", texts))
    if contents.query_column is not None:
        lines.append((f"query_column: {_yaml(contents.query_column)}", "each row's own prompt"))
    if contents.train_split != "train":
        lines.append((f"train_split: {_yaml(contents.train_split)}", "there is no split called train"))
    if validation is not None:
        lines.append((f"eval_split: {validation}", f"{contents.splits[validation]} rows"))
    elif numbers.held_out:
        share = math.floor(numbers.held_out / rows * 1e6) / 1e6
        lines.append((f"eval_fraction: {share:.6f}".rstrip("0"), f"{numbers.held_out} of {rows} rows are held out"))
    else:
        lines.append(("", f"eval_fraction: 0.2   # {rows} rows are too few to hold some out"))
    if args.skip_unreadable:
        lines.append(("skip_unreadable: true", "given"))
    else:
        lines.append(("", "skip_unreadable: true   # leave out broken pictures and empty texts"))
    return lines


def _training_lines(numbers: Plan, rows: int, output_dir: str, evaluates: bool) -> list[tuple[str, str]]:
    total = numbers.epochs * numbers.steps
    few = rows < FEW_PICTURES
    rate = ("5e-4", "as for 3,000 photographs without stage 1 (docs/quality.md)") if few else ("1e-4", "as in BLIP-2")
    accumulation, warmup = numbers.batch // numbers.at_once, "0.1" if total < 300 else "0.05"
    workers = min(4, max((os.cpu_count() or 1) - 1, 0)) if rows >= 500 else 0
    lines = [
        ("", "--- training: any of transformers.TrainingArguments"),
        (f"output_dir: {_yaml(output_dir)}", "the model, checkpoints and check.json"),
        (f"num_train_epochs: {numbers.epochs}", f"{numbers.steps} steps an epoch, {total} in all; the aim is {STEPS}, "
         f"in at most {MOST_EPOCHS} epochs"),
        (f"per_device_train_batch_size: {numbers.at_once}", "pictures in the model at once; fewer if memory runs out"),
        (f"gradient_accumulation_steps: {accumulation}", f"{numbers.batch} of {numbers.rows} rows a step"),
        ("dataloader_drop_last: false", "no row is left out of an epoch"),
        (f"learning_rate: {rate[0]}", rate[1]),
        ("lr_scheduler_type: cosine", "falls to 0 at the end"),
        (f"warmup_steps: {warmup}", f"a share of the {total} steps"),
        ("weight_decay: 0.05", "as in BLIP-2"),
        (f"dataloader_num_workers: {workers}", "processes that read pictures" if workers else
         "processes that read pictures: so few rows need none"),
        (f"logging_steps: {max(total // 50, 1)}", "about 50 lines in all"),
    ]  # fmt: skip
    if evaluates:
        lines += [
            (f"per_device_eval_batch_size: {numbers.at_once}", ""),
            ("eval_strategy: steps", ""),
            ("eval_steps: 0.1", "ten times in all; the loss on rows that are held out"),
            ("save_strategy: steps", ""),
            ("save_steps: 0.1", "a checkpoint after each evaluation"),
            ("save_total_limit: 2", "the best and the last"),
            ("load_best_model_at_end: true", "pictures learned by heart make the last one worse"),
        ]
    else:
        lines += [("eval_strategy: no", ""), ("save_strategy: no", "the model is saved at the end")]
    return [*lines, ("report_to: none", "tensorboard, wandb … if installed")]


def _has_learned(qformer: str | None) -> bool:
    """Whether `qformer` is a folder with a trained Q-Former, whose config is fixed, and no BERT."""
    if qformer is None or not Path(qformer).expanduser().is_dir():
        return False
    return (model_type_of(qformer) or "").startswith(("lorgnette", "blip_2", "instructblip"))


def _yaml(value: str | list[str]) -> str:
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    plain = re.fullmatch(r"[A-Za-z_./~][\w./~-]*", value) and value.lower() not in _YAML_WORDS
    return (
        value
        if plain and not re.fullmatch(r"\.?(\d.*|nan|inf)", value.lower())
        else json.dumps(value, ensure_ascii=False)
    )


def _shell(value: str) -> str:
    return value if re.fullmatch(r"[\w./~@:+-]+", value) else f'"{value}"'


def _name(source: str) -> str:
    """The data set's name as the name of a folder."""
    path = Path(source).expanduser().resolve() if Path(source).exists() else Path(source)
    return re.sub(r"[^\w.-]+", "-", path.stem if path.is_file() else path.name).strip("-.") or "stage2"
