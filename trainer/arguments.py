"""What a recipe can say about the model and the data; everything else is `transformers.TrainingArguments`."""

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


@dataclass
class VisionArguments:
    """What every command says of the ViT: where it comes from, and which of its features are meant."""

    vision: str | None = field(default=None, metadata={"help": "ViT: a Hub id or a folder."})
    vision_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of `vision`."})
    vision_feature_layer: int | None = field(
        default=None, metadata={"help": "Index into the ViT's hidden states; left out, its last_hidden_state."}
    )
    vision_feature_select_strategy: str = field(
        default="full", metadata={"help": "`full`: all image tokens, CLS included; `default`: the patches alone."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager, flash_attention_2 … Left out, transformers chooses."}
    )
    model: str | None = field(
        default=None,
        metadata={
            "help": "A saved model (to train: of this stage) to take in place of backbones: a Hub id or a folder."
        },
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of `model`."})

    # What a stage cannot do without, unless a saved model is given; and all that such a model has settled.
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
                raise ValueError(f"model {self.model!r} is given: it has settled {', '.join(given)}, leave that out")


@dataclass
class BackboneArguments(VisionArguments):
    """What both stages say of the model: the ViT, the Q-Former and where they come from."""

    qformer: str | None = field(
        default=None,
        metadata={"help": "What the Q-Former starts from: a BERT-shaped checkpoint, or in stage 2 a stage-1 model."},
    )
    qformer_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of `qformer`."})
    qformer_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Fields of LorgnetteQFormerConfig, a mapping (JSON on the command line)."}
    )
    num_query_tokens: int | None = field(
        default=None, metadata={"help": "Soft image tokens per picture. Left out, those of a stage-1 `qformer`, or 32."}
    )

    JOINTS: ClassVar[tuple[str, ...]] = (*VisionArguments.JOINTS,
        "qformer", "qformer_revision", "qformer_config", "num_query_tokens")  # fmt: skip

    def __post_init__(self):
        self.qformer_config = _mapping(self.qformer_config, "qformer_config")
        super().__post_init__()


@dataclass
class Stage1Arguments(BackboneArguments):
    """Which ViT and which Q-Former stage 1 aligns, and by which losses; or which stage-1 model goes on training."""

    itc_weight: float = field(default=1.0, metadata={"help": "Of image-text contrast in the loss; 0 leaves it out."})
    itm_weight: float = field(default=1.0, metadata={"help": "Of image-text matching; 0 leaves it out."})
    itg_weight: float = field(default=1.0, metadata={"help": "Of image-grounded generation; 0 leaves it out."})
    image_text_hidden_size: int = field(
        default=256, metadata={"help": "Width of the space in which pictures and texts are compared."}
    )

    NEEDED: ClassVar[tuple[str, ...]] = ("vision", "qformer")
    JOINTS: ClassVar[tuple[str, ...]] = (*BackboneArguments.JOINTS, "itc_weight", "itm_weight", "itg_weight",
        "image_text_hidden_size")  # fmt: skip


@dataclass
class Stage2Arguments(BackboneArguments):
    """Which backbones stage 2 joins, and how; or which saved lorgnette model goes on training."""

    text: str | None = field(default=None, metadata={"help": "Causal LM: a Hub id, a folder or a .gguf file."})
    text_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of `text`."})
    lora: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Fields of peft.LoraConfig, a mapping (JSON on the command line). {} takes peft's defaults on the "
            "LM's attention projections; left out, the LM gets no LoRA."
        },
    )
    system_prompt: str | None = field(default=None, metadata={"help": "Saved with the processor."})
    query: str | None = field(
        default=None, metadata={"help": "What the model is asked of every picture. Saved with the processor."}
    )
    qformer_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Of the Q-Former, lower than learning_rate where stage 1 taught it. Left out, the same."},
    )
    generate_metrics: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Also generate texts at each evaluation and measure them: cider, bleu, rouge_l, exact_match, "
            "vqa_accuracy. Their figures can be metric_for_best_model, eval_cider for one."
        },
    )
    generate_samples: int = field(
        default=100, metadata={"help": "Rows that generate_metrics take, the first of the evaluation data."}
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
        if self.qformer_learning_rate is not None and self.qformer_learning_rate <= 0:
            raise ValueError(f"qformer_learning_rate is {self.qformer_learning_rate}; it has to be above 0")
        if self.generate_samples < 1:
            raise ValueError(f"generate_samples is {self.generate_samples}; it has to be at least 1")

    @property
    def reads_query(self) -> bool:
        """Whether the Q-Former reads the query as well, as InstructBLIP's does."""
        return bool((self.qformer_config or {}).get("use_qformer_text_input"))


@dataclass
class SourceArguments:
    """Where the pictures come from."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "A Hub dataset id; a folder (imagefolder, feature cache, or what `save_to_disk` wrote); a .jsonl, "
            ".json, .parquet or .arrow file, in which image paths are relative to the file's folder."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."})
    image_column: str = field(default="image", metadata={"help": "Column with the picture (or a path or URL of it)."})
    skip_unreadable: bool = field(
        default=False,
        metadata={
            "help": "Read all pictures first, and leave out the rows whose cannot be read: output_dir/unreadable.json "
            "lists them. Otherwise such a row is an error."
        },
    )

    def __post_init__(self):
        if self.dataset is None:
            raise ValueError("dataset not given: name a Hub dataset, a folder or a file")


@dataclass
class RowArguments(SourceArguments):
    """How rows are read, and which columns hold their words."""

    streaming: bool = field(
        default=False, metadata={"help": "Read as it goes, nothing downloaded first. Training then needs max_steps."}
    )
    text_column: str = field(default="text", metadata={"help": "Column with the text (or a class label)."})
    query_column: str | None = field(
        default=None, metadata={"help": "Column with what is asked of each picture, in place of the one `query`."}
    )
    messages_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with chats, in place of text_column and query_column: the last answer is learnt. Pictures "
            "are in the messages' parts, or in image_column."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.skip_unreadable and self.streaming:
            raise ValueError("skip_unreadable reads all pictures first, which cannot be done with a stream")
        if self.messages_column is not None:
            given = [f.name for f in fields(self) if f.name in ("text_column", "query_column")
                     and getattr(self, f.name) != f.default]  # fmt: skip
            if given:
                raise ValueError(
                    f"messages_column {self.messages_column!r} is given: its chats hold the words, leave out "
                    f"{' and '.join(given)}"
                )
        columns = [self.image_column, *self.word_columns]
        if len(set(columns)) < len(columns):
            raise ValueError(f"columns for different things have the same name: {', '.join(columns)}")

    @property
    def word_columns(self) -> list[str]:
        """The columns that words come from: chats, or texts and what is asked."""
        if self.messages_column is not None:
            return [self.messages_column]
        return [self.text_column, *([self.query_column] if self.query_column else [])]


@dataclass
class DataArguments(RowArguments):
    """What is trained and evaluated on."""

    shuffle_buffer_size: int = field(
        default=1000, metadata={"help": "Rows that a streamed training set is shuffled among; 0 keeps its order."}
    )
    train_split: str = field(
        default="train",
        metadata={"help": "Slices such as train[:1000] work but in streams, caches and what save_to_disk wrote."},
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Evaluation data that lie elsewhere than `dataset`, in any of the same forms."}
    )
    eval_split: str | None = field(
        default=None, metadata={"help": "Split for evaluation (of `eval_dataset` where that is given: default train)."}
    )
    eval_fraction: float | None = field(
        default=None, metadata={"help": "Hold out this share of the training split, drawn with `data_seed`/`seed`."}
    )
    augment: bool = field(
        default=False, metadata={"help": "Crop and mirror training pictures at random, as BLIP-2 does."}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Tokens an example may take, the picture's included; a longer one is an error, not cut."},
    )
    pack_to: int | None = field(
        default=None,
        metadata={
            "help": "In stage 2, put several examples of a batch side by side in rows of so many tokens, in place of "
            "padding; the model keeps them apart."
        },
    )
    pad_to_multiple_of: int | None = field(
        default=None,
        metadata={"help": "Make batches as wide as a multiple of it: few widths, for torch_compile. 64 is one."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.eval_fraction is not None:
            if not 0 < self.eval_fraction < 1:
                raise ValueError(f"eval_fraction is {self.eval_fraction}; it has to lie between 0 and 1")
            if self.eval_split or self.eval_dataset:
                raise ValueError("eval_fraction holds out training rows: leave out eval_split and eval_dataset, or it")
            if self.streaming:
                raise ValueError("eval_fraction cannot split a stream: name an eval_split or an eval_dataset")

    @property
    def has_eval(self) -> bool:
        """Whether evaluation data were named."""
        return bool(self.eval_split or self.eval_dataset or self.eval_fraction)


def _mapping(value: dict | str | None, name: str) -> dict | None:
    """JSON, as the command line writes a mapping, to a dict."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is neither a mapping nor JSON: {value!r} ({error})") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{name} has to be a mapping, not {value!r}")
    return parsed
