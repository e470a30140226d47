"""A recipe's arguments for the model and the data; all others are `transformers.TrainingArguments`."""

import json
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar


# Defaults of `TrainingArguments` that the entry point replaces.
TRAINING_DEFAULTS = {
    # The collator needs the dataset's own columns, whatever they are called.
    "remove_unused_columns": False,
    # Trainer would otherwise keep the logits of the whole evaluation set in memory.
    "prediction_loss_only": True,
    # Trainer's own default under DDP would hide a parameter that gets no gradient.
    "ddp_find_unused_parameters": False,
    # One process would otherwise read a stream for all and join their batches, whose lengths differ.
    "accelerator_config": {"dispatch_batches": False},
}


# What people set first: `--help` of a stage lists these.
COMMON_OPTIONS = (
    *("vision", "text", "qformer", "num_query_tokens", "lora", "query", "model"),
    *("dataset", "image_column", "text_column", "messages_column", "eval_split", "eval_fraction", "skip_unreadable"),
    *("output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "qformer_learning_rate", "bf16", "eval_strategy", "resume_from_checkpoint", "report_to"),
)
# the endings of files with rows, and the loaders of `datasets` for them
BUILDERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
# names of folders, and the splits that they hold
SPLITS = dict.fromkeys(("train", "training"), "train") | {"test": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
FORMATS = ("table", "llava", "coco", "webdataset", "pairs", "saved", "folder", "hub")  # see `formats.py`


@dataclass
class VisionArguments:
    """Arguments for the ViT: its source, and which of its features to use."""

    vision: str | None = field(default=None, metadata={"help": "ViT: a Hub id or a folder."})
    vision_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of `vision`."})
    vision_feature_layer: int | None = field(
        default=None, metadata={"help": "Index into the ViT's hidden states; by default its last_hidden_state."}
    )
    vision_feature_select_strategy: str = field(
        default="full", metadata={"help": "`full`: all image tokens, CLS included; `default`: only the patches."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager, flash_attention_2 … By default transformers chooses."}
    )
    model: str | None = field(
        default=None,
        metadata={"help": "A saved model instead of backbones (for training, of this stage): a Hub id or a folder."},
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of `model`."})

    # What a stage needs unless a saved model is given; and further fields that a saved model fixes.
    NEEDED: ClassVar[tuple[str, ...]] = ("vision",)
    JOINTS: ClassVar[tuple[str, ...]] = ("vision_revision", "vision_feature_layer", "vision_feature_select_strategy")

    def __post_init__(self):
        if self.model is None:
            missing = [name for name in self.NEEDED if getattr(self, name) is None]
            if missing:
                raise ValueError(f"{' and '.join(missing)} not given: name the backbones (or `model`, a saved one)")
            if self.model_revision is not None:
                raise ValueError("model_revision is given without model")
        else:
            given = [f.name for f in fields(self) if f.name in {*self.NEEDED, *self.JOINTS}
                     and getattr(self, f.name) != f.default]  # fmt: skip
            if given:
                raise ValueError(f"model {self.model!r} is given, which fixes {', '.join(given)}: leave these out")


@dataclass
class BackboneArguments(VisionArguments):
    """Arguments of both stages for the ViT and the Q-Former."""

    qformer: str | None = field(
        default=None,
        metadata={"help": "Initial weights of the Q-Former: a BERT; in stage 2 also a stage-1 model or a BLIP-2."},
    )
    qformer_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of `qformer`."})
    qformer_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Fields of LorgnetteQFormerConfig, a mapping (JSON on the command line)."}
    )
    num_query_tokens: int | None = field(
        default=None, metadata={"help": "Visual tokens per picture. By default those of a trained `qformer`, or 32."}
    )

    JOINTS: ClassVar[tuple[str, ...]] = (*VisionArguments.JOINTS,
        "qformer", "qformer_revision", "qformer_config", "num_query_tokens")  # fmt: skip

    def __post_init__(self):
        self.qformer_config = _mapping(self.qformer_config, "qformer_config")
        super().__post_init__()


@dataclass
class Stage1Arguments(BackboneArguments):
    """The ViT, the Q-Former and the losses of stage 1; or a stage-1 model to train further."""

    itc_weight: float = field(default=1.0, metadata={"help": "Of image-text contrast in the loss; 0 leaves it out."})
    itm_weight: float = field(default=1.0, metadata={"help": "Of image-text matching; 0 leaves it out."})
    itg_weight: float = field(default=1.0, metadata={"help": "Of image-grounded generation; 0 leaves it out."})
    image_text_hidden_size: int = field(
        default=256, metadata={"help": "Width of the space in which pictures and texts are compared."}
    )
    text_pooling: str | None = field(
        default=None,
        metadata={"help": "What the contrast compares of a text: cls or mean; by default as the BERT was trained."},
    )
    itc_loss: str = field(
        default="softmax", metadata={"help": "The contrast: softmax over the batch, or sigmoid of each pair (SigLIP)."}
    )
    itc_label_smoothing: float = field(default=0.1, metadata={"help": "Of the softmax."})
    max_logit_scale: float = field(default=100.0, metadata={"help": "One over the contrast's least temperature."})
    itc_batch: int | None = field(
        default=None,
        metadata={
            "help": "Pictures that the contrast compares in a step of each process, where they are more than "
            "per_device_train_batch_size: of so many it keeps activations at a time, and the other losses learn from "
            "so many."
        },
    )

    text_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Of the Q-Former's text half, which a BERT has trained. By default the same as of all."},
    )

    NEEDED: ClassVar[tuple[str, ...]] = ("vision", "qformer")
    JOINTS: ClassVar[tuple[str, ...]] = (*BackboneArguments.JOINTS, "itc_weight", "itm_weight", "itg_weight",
        "image_text_hidden_size", "text_pooling", "itc_loss", "itc_label_smoothing", "max_logit_scale")  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        _check_above_0(self, "text_learning_rate")
        if self.text_pooling not in (None, "cls", "mean"):
            raise ValueError(f"text_pooling is {self.text_pooling!r}; it takes cls or mean")


@dataclass
class Stage2Arguments(BackboneArguments):
    """The backbones of stage 2 and their connection; or a saved model to train further."""

    text: str | None = field(default=None, metadata={"help": "Causal LM: a Hub id, a folder or a .gguf file."})
    text_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of `text`."})
    lora: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Fields of peft.LoraConfig, a mapping (JSON on the command line). {} takes peft's defaults on the "
            "LM's attention projections; by default the LM gets no LoRA."
        },
    )
    system_prompt: str | None = field(default=None, metadata={"help": "Saved with the processor."})
    query: str | None = field(
        default=None, metadata={"help": "The default prompt of every picture. Saved with the processor."}
    )
    qformer_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Of the Q-Former; lower than learning_rate if stage 1 trained it. By default the same."},
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the projector. By default the same as of all."}
    )
    generate_metrics: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Generate texts at each evaluation and measure them: cider, bleu, rouge_l, exact_match, "
            "vqa_accuracy. Their figures can be metric_for_best_model, eval_cider for one."
        },
    )
    generate_samples: int = field(
        default=100, metadata={"help": "Number of rows for generate_metrics, the first of the evaluation data."}
    )
    sample_answers: int = field(
        default=5,
        metadata={
            "help": "Evaluation rows whose answers are shown at each evaluation, and kept in output_dir/samples.md; 0 "
            "for none."
        },
    )
    generate_decoding: str = field(
        default="greedy", metadata={"help": "How they are decoded: greedy, caption or short_answer."}
    )

    NEEDED: ClassVar[tuple[str, ...]] = ("vision", "text")
    JOINTS: ClassVar[tuple[str, ...]] = (*BackboneArguments.JOINTS, "text_revision", "lora")

    def __post_init__(self):
        self.lora = _mapping(self.lora, "lora")
        super().__post_init__()
        if self.reads_query and self.model is None and self.qformer is None:
            raise ValueError("qformer_config.use_qformer_text_input needs qformer: the text's tokenizer is its own")
        _check_above_0(self, "qformer_learning_rate", "projector_learning_rate")
        if self.generate_samples < 1:
            raise ValueError(f"generate_samples is {self.generate_samples}; it has to be at least 1")

    @property
    def reads_query(self) -> bool:
        """Whether the Q-Former also reads the query, as InstructBLIP's does."""
        return bool((self.qformer_config or {}).get("use_qformer_text_input"))


@dataclass
class SourceArguments:
    """The source of the pictures."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "A Hub dataset id; a .csv, .tsv, .jsonl, .json (LLaVA's and COCO's too), .parquet, .arrow or .tar "
            "file; a folder: imagefolder, pictures with .txt files, .tar files, feature cache, or what `save_to_disk` "
            "wrote. Paths of pictures are relative to the file's folder."
        },
    )
    format: str | None = field(
        default=None,
        metadata={
            "help": "How to read `dataset`, in place of what its files say: table, llava, coco, webdataset, pairs, "
            "saved, folder or hub."
        },
    )
    image_root: str | None = field(
        default=None, metadata={"help": "Folder that relative paths of pictures start from, if not the file's own."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."})
    image_column: str = field(default="image", metadata={"help": "Column with the picture (or a path or URL of it)."})
    skip_unreadable: bool = field(
        default=False,
        metadata={
            "help": "Read all rows first, and leave out those with unreadable pictures or empty texts; "
            "output_dir/unreadable.json lists them. Otherwise such a row is an error. A cache of features is made of "
            "pictures alone: training on it leaves out the empty texts."
        },
    )

    def __post_init__(self):
        if self.dataset is None:
            raise ValueError("dataset not given: name a Hub dataset, a folder or a file")
        if self.format not in (None, *FORMATS):
            raise ValueError(f"format is {self.format!r}; it takes {', '.join(FORMATS)}")


@dataclass
class RowArguments(SourceArguments):
    """How rows are read, and the columns of their texts."""

    streaming: bool = field(
        default=False,
        metadata={"help": "Stream the rows instead of downloading them; training then needs max_steps."},
    )
    text_column: list[str] | str | None = field(
        default="text",
        metadata={
            "help": "Column with the text, a list of texts or a class label; or several columns with a text each (a "
            "JSON list on the command line). A row is a picture with all its texts."
        },
    )
    query_column: str | None = field(
        default=None, metadata={"help": "Column with each row's query, in place of `query`."}
    )
    messages_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with chats, in place of text_column and query_column; training is on the last answer. "
            "Pictures are in the messages' parts, or in image_column. Found by itself if it is called messages or "
            "conversations, no column with text is named and none is called text."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.text_column, str) and self.text_column.startswith("["):
            self.text_column = json.loads(self.text_column)
        if not isinstance(self.text_column, str | None):
            if not self.text_column:
                raise ValueError("text_column is an empty list")
            if "text" in (self.image_column, self.query_column):
                raise ValueError("several text columns become one, `text`: rename the other column of that name")
        if self.text_column is None:  # as `text_column: null` over a recipe that names one
            self.text_column = RowArguments.text_column
        if self.skip_unreadable and self.streaming:
            raise ValueError("skip_unreadable reads all pictures first, which cannot be done with a stream")
        if self.messages_column is not None:
            given = [f.name for f in fields(self) if f.name in ("text_column", "query_column")
                     and getattr(self, f.name) != f.default]  # fmt: skip
            if given:
                raise ValueError(
                    f"messages_column {self.messages_column!r} is given: its chats hold the texts, leave out "
                    f"{' and '.join(given)}"
                )
        columns = [self.image_column, *self.text_columns]
        if len(set(columns)) < len(columns):
            raise ValueError(f"several columns have the same name: {', '.join(columns)}")

    @property
    def text_columns(self) -> list[str]:
        """The columns with text in the data set: chats, or texts and queries."""
        if self.messages_column is not None:
            return [self.messages_column]
        texts = [self.text_column] if isinstance(self.text_column, str) else self.text_column
        return [*texts, *([self.query_column] if self.query_column else [])]

    @property
    def text_name(self) -> str:
        """The column with text in loaded rows: several columns become one, `text`."""
        if self.messages_column is not None:
            return "messages"
        return self.text_column if isinstance(self.text_column, str) else "text"


@dataclass
class DataArguments(RowArguments):
    """The data for training and evaluation."""

    shuffle_buffer_size: int = field(
        default=1000, metadata={"help": "Size of the shuffle buffer of a streamed training set; 0 keeps its order."}
    )
    train_split: str = field(
        default="train",
        metadata={
            "help": "Slices such as train[:1000] work for files and folders that datasets loads, and on the Hub."
        },
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "A separate evaluation data set, in any of the same formats."}
    )
    eval_split: str | None = field(
        default=None, metadata={"help": "Split for evaluation; of `eval_dataset`, if given, by default train."}
    )
    eval_fraction: float | None = field(
        default=None, metadata={"help": "Hold out this share of the training split, drawn with `data_seed`/`seed`."}
    )
    texts_per_image: str = field(
        default="all",
        metadata={
            "help": "How many of a picture's texts a step learns: `all`, or a number, drawn anew in each epoch "
            "(evaluation takes the first ones)."
        },
    )
    augment: bool = field(
        default=False, metadata={"help": "Crop and mirror training pictures at random, as BLIP-2 does."}
    )
    elastic_queries: bool = field(
        default=False,
        metadata={
            "help": "In stage 2, each batch is learned with the first m queries alone, m drawn anew: the model can "
            "then be used with any num_query_tokens up to its own."
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Maximum tokens of an example, the picture's included; a longer one is an error."},
    )
    pack_to: int | None = field(
        default=None,
        metadata={
            "help": "In stage 2, pack several examples of a batch into rows of so many tokens, in place of padding; "
            "attention stays within each example."
        },
    )
    pad_to_multiple_of: int | None = field(
        default=None,
        metadata={"help": "Pad batches to a multiple of it, so that torch_compile sees few lengths, for example 64."},
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Train nothing: read all rows, show a batch and time two steps, as `lorgnette check` does. "
            "output_dir/check.json lists the rows that training would stop at."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        given = str(self.texts_per_image)
        if given != "all" and (not given.isdecimal() or int(given) < 1):
            raise ValueError(f"texts_per_image is {given!r}; it is `all`, or a number from 1")
        if self.dry_run and self.streaming:
            raise ValueError("dry_run reads all rows, which cannot be done with a stream: leave out streaming")
        if self.eval_fraction is not None:
            if not 0 < self.eval_fraction < 1:
                raise ValueError(f"eval_fraction is {self.eval_fraction}; it has to be between 0 and 1")
            if self.eval_split or self.eval_dataset:
                raise ValueError("eval_fraction holds out training rows: leave out eval_split and eval_dataset, or it")
            if self.streaming:
                raise ValueError("eval_fraction cannot split a stream: name an eval_split or an eval_dataset")

    @property
    def num_texts(self) -> int | None:
        """`texts_per_image`; None for all."""
        return None if self.texts_per_image == "all" else int(self.texts_per_image)

    @property
    def has_eval(self) -> bool:
        """Whether evaluation data are set."""
        return bool(self.eval_split or self.eval_dataset or self.eval_fraction)


def _check_above_0(arguments: Any, *names: str) -> None:
    for name in names:
        if (value := getattr(arguments, name)) is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value}; it has to be above 0")


def _mapping(value: dict | str | None, name: str) -> dict | None:
    """Parse a mapping from the command line's JSON."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is neither a mapping nor JSON: {value!r} ({error})") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{name} has to be a mapping, not {value!r}")
    return parsed
