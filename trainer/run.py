"""Training of both stages with the stock Trainer: checks, data, and the run."""

import logging
import sys
from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments, enable_full_determinism, set_seed
from transformers.utils import logging as transformers_logging

from ..assembly.checkpoint_names import accept_names_in_files
from ..processing.processing_lorgnette import LorgnetteProcessor
from .arguments import COMMON_OPTIONS, TRAINING_DEFAULTS, BackboneArguments, DataArguments, Stage1Arguments
from .checkpoints import check_backbones, checkpoint_to_resume, train_from
from .collator import LorgnetteCollator
from .data import load_pairs
from .feature_cache import check_cache, is_cache
from .formats import readable_stream
from .hub import CleanPush, push_card
from .local_backbones import local_sources, named_in_checkpoints
from .messages import set_up_logging
from .nan_guard import nan_guard
from .precision import default_mixed_precision, has_bf16_hardware
from .process import warn_of_missing_processes
from .progress import LastLogCallback, StepFiguresCallback, print_figures, summarise
from .provenance import write_held_out, write_training_data
from .recipe import parse_recipe
from .row_seeds import RowSeeds
from .unreadable import leave_out_unreadable


logger = logging.getLogger(__name__)


def parse(
    prog: str,
    model_arguments: type,
    argv: list[str],
    description: str | None,
    check: Callable[..., None],
) -> tuple:
    """The stage's model arguments, [`DataArguments`] and `TrainingArguments`, from a recipe and the command line."""
    return parse_recipe(
        (model_arguments, DataArguments, TrainingArguments),
        argv,
        prog=prog,
        description=description or "",
        defaults=TRAINING_DEFAULTS
        | {
            # Without an accelerator Trainer refuses bf16 unless use_cpu is set.
            "use_cpu": not torch.accelerator.is_available(),
            "bf16": default_mixed_precision() == "bf16",
            "disable_tqdm": not sys.stderr.isatty(),  # in a file the lines of figures are enough
        },
        check=check,
        common=COMMON_OPTIONS,
    )


def train(
    build: Callable[[], tuple[PreTrainedModel, LorgnetteProcessor]],
    data_args: DataArguments,
    training_args: TrainingArguments,
    prepare: Callable[[Trainer], None] | None = None,
) -> Trainer:
    """Build the model, train it with the stock Trainer and save model and processor into `output_dir`.

    Args:
        build: makes the model and its processor; called after the data are loaded and the seed is set.
        data_args, training_args: from [`parse`].
        prepare: configures the Trainer before training.

    Raises:
        FileExistsError: `output_dir` holds an earlier run and `resume_from_checkpoint` is not set.
        FileNotFoundError: no checkpoint to resume from, see [`~lorgnette.trainer.checkpoints.checkpoint_to_resume`].
        FloatingPointError: a loss is not finite, see [`~lorgnette.trainer.nan_guard.nan_guard`].
        ValueError: the data do not match the arguments, see [`~lorgnette.trainer.data.load_pairs`]; they do not fill
            a batch and `dataloader_drop_last` is set; a feature cache or the checkpoint belongs to other backbones.
    """
    checkpoint = checkpoint_to_resume(training_args)
    parts = load_parts(build, data_args, training_args)
    sources = local_sources(parts.model)
    if checkpoint is not None:
        check_backbones(checkpoint, parts.model, sources)
    if data_args.skip_unreadable:
        parts.splits = leave_out_unreadable(
            parts.splits,
            data_args.image_column,
            parts.processor.load_image,
            training_args.output_dir,
            data_args.text_name,
            training_args.dataloader_num_workers,
        )
    trainer = make_trainer(parts, data_args, training_args, prepare)
    if trainer.is_world_process_zero():  # before training, since a killed run leaves checkpoints
        rows = parts.splits["train"]
        count = len(rows) if isinstance(rows, Dataset) else None
        write_training_data(training_args.output_dir, data_args, data_args.train_split, count)
        if parts.held_out is not None:
            write_held_out(training_args.output_dir, data_args, parts.held_out)
    named = named_in_checkpoints(parts.model, sources, training_args)
    with named, nan_guard(trainer), readable_stream(data_args, data_args.eval_dataset):
        train_from(trainer, checkpoint)
    trainer.save_model()
    trainer.save_state()
    summarise(trainer)
    if training_args.push_to_hub:  # save_model has pushed
        push_card(trainer)
    return trainer


@dataclass
class Parts:
    """What a Trainer is made of."""

    model: PreTrainedModel
    processor: LorgnetteProcessor
    splits: dict[str, Any]  # `train`, and `eval` if there is evaluation
    row_seeds: RowSeeds | None
    held_out: Dataset | None  # the rows of `eval_fraction`, with or without evaluation


def load_parts(
    build: Callable[[], tuple[PreTrainedModel, LorgnetteProcessor]],
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> Parts:
    """Set the seed, load the data and build the model; the arguments and errors are those of [`train`]."""
    _log_setup(training_args)
    # before building the model: the Q-Former and LoRA have random initial weights
    (enable_full_determinism if training_args.full_determinism else set_seed)(training_args.seed)

    evaluate = training_args.eval_strategy != "no"
    if data_args.has_eval and not evaluate:
        logger.warning("Evaluation data are set, but eval_strategy is `no`: there will be no evaluation.")
    with training_args.main_process_first(desc="loading the dataset"):
        seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
        row_seeds = None
        if data_args.augment or data_args.num_texts is not None or data_args.elastic_queries:
            columns = [name for name in (data_args.text_name, data_args.query_column) if name is not None]
            row_seeds = RowSeeds(seed, augment=data_args.augment, texts=data_args.num_texts, columns=columns)
            row_seeds.draws = False  # until the rows are checked
        grouped = training_args.train_sampling_strategy == "group_by_length"
        train_dataset, eval_dataset = load_pairs(
            data_args,
            evaluate=evaluate,
            seed=seed,
            row_seeds=row_seeds,
            length_column=training_args.length_column_name if grouped else None,
        )
    model, processor = build()
    model.config.elastic_queries = data_args.elastic_queries  # saved: whether the model may be used with fewer
    if data_args.elastic_queries and not data_args.dry_run:  # which measures the largest steps
        row_seeds.queries = processor.num_query_tokens
    accept_names_in_files(model)
    for source in filter(None, (data_args.dataset, data_args.eval_dataset)):
        if is_cache(source):
            check_cache(source, model, processor.image_processor)
    splits = {"train": train_dataset} | ({"eval": eval_dataset} if evaluate else {})
    held_out = None if data_args.eval_fraction is None else eval_dataset
    return Parts(model, processor, splits, row_seeds, held_out)


def make_collator(parts: Parts, data_args: DataArguments) -> LorgnetteCollator:
    """The collator of training."""
    return LorgnetteCollator(
        parts.processor,
        image_column=data_args.image_column,
        text_column=data_args.text_name,
        query_column=data_args.query_column,
        max_length=data_args.max_length or parts.model.max_text_length,
        pack_to=data_args.pack_to,
        pad_to_multiple_of=data_args.pad_to_multiple_of,
    )


def make_trainer(
    parts: Parts,
    data_args: DataArguments,
    training_args: TrainingArguments,
    prepare: Callable[[Trainer], None] | None = None,
) -> Trainer:
    """The stock Trainer; the arguments and errors are those of [`train`]."""
    train_dataset, eval_dataset = parts.splits["train"], parts.splits.get("eval")
    if parts.row_seeds is not None:
        parts.row_seeds.draws = True
    _check_whole_batches(training_args, train_dataset, eval_dataset)
    _log_sizes(parts.model)
    trainer = Trainer(
        model=parts.model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=make_collator(parts, data_args),
        processing_class=parts.processor,  # saved with every checkpoint
        callbacks=[CleanPush(), *([parts.row_seeds] if parts.row_seeds is not None else [])],
    )
    # ahead of callbacks that print, and of trackers: these read what ours add to the logs
    trainer.callback_handler.callbacks[:0] = [LastLogCallback(), StepFiguresCallback()]
    print_figures(trainer)
    if prepare is not None:
        prepare(trainer)
    return trainer


def check_arguments(model_args: BackboneArguments, data_args: DataArguments, training_args: TrainingArguments) -> None:
    """Raise ValueError for settings that contradict each other."""
    if training_args.remove_unused_columns:
        raise ValueError("remove_unused_columns has to stay false: true drops the columns that hold pictures and text")
    if training_args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor is {training_args.label_smoothing_factor}, and has to stay 0 in a recipe: Trainer "
            "would smooth over the logits of all positions, several times as large as those of the answers; stage 1 "
            "has no labels"
        )
    if training_args.eval_strategy != "no" and not data_args.has_eval:
        raise ValueError(
            f"eval_strategy is {training_args.eval_strategy.value}, but no evaluation data are named: "
            "set eval_split, eval_dataset or eval_fraction"
        )
    if data_args.elastic_queries and isinstance(model_args, Stage1Arguments):
        raise ValueError("elastic_queries is for stage 2: stage 1 learns with all queries")
    if data_args.elastic_queries and training_args.torch_compile:
        raise ValueError(
            "elastic_queries and torch_compile exclude each other: each number of queries would compile anew"
        )
    if data_args.streaming and training_args.max_steps <= 0:
        raise ValueError("streaming needs max_steps: the length of a stream is not known")


def _check_whole_batches(args: TrainingArguments, train_dataset: Any, eval_dataset: Any) -> None:
    """Refuse data that `dataloader_drop_last` would drop entirely: Trainer would save an untrained model."""
    if not args.dataloader_drop_last:
        return
    batches = {"train": (args.train_batch_size, train_dataset), "eval": (args.eval_batch_size, eval_dataset)}
    names, too_few = {"train": "training", "eval": "evaluation"}, []
    for kind, (size, rows) in batches.items():
        if isinstance(rows, Sized) and len(rows) < size * args.world_size:
            too_few.append(
                f"the {len(rows)} rows of the {names[kind]} data do not fill one batch of {size} on {args.world_size} "
                f"process(es): lower per_device_{kind}_batch_size"
            )
    if too_few:
        raise ValueError(f"dataloader_drop_last drops incomplete batches, and {'; '.join(too_few)}")


def _log_setup(args: TrainingArguments) -> None:
    set_up_logging(args.should_log)
    warn_of_missing_processes()
    transformers_logging.set_verbosity(args.get_process_log_level())
    if args.device.type == "cpu" and args.should_log:
        slow = " It has no units for bf16 (AMX): --bf16 false may be much faster."
        logger.warning(
            f"There is no GPU: training runs on the CPU, in {'bf16' if args.bf16 else 'fp32'}."
            f"{slow if args.bf16 and not has_bf16_hardware(args.device) else ''}"
        )


def _log_sizes(model: torch.nn.Module) -> None:
    sizes = []
    for name, part in model.named_children():
        parameters = list(part.parameters())
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        sizes.append(f"{name} {trainable:,} of {sum(p.numel() for p in parameters):,}")
    logger.info("parameters that train: %s", "; ".join(sizes))
