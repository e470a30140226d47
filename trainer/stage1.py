"""Stage 1: train the Q-Former by contrast, matching and generation (BLIP-2, section 3)."""

import logging
from functools import partial

from datasets import Dataset
from transformers import Trainer, TrainingArguments

from ..modeling.modeling_retrieval import LorgnetteForImageTextRetrieval
from ..processing.processing_lorgnette import LorgnetteProcessor
from .arguments import DataArguments, Stage1Arguments
from .data import IMAGE_ID, image_id_of
from .dry_run import dry_run
from .feature_cache import is_cache, load_cache
from .learning_rates import LearningRates
from .run import check_arguments, parse, train
from .texts import picture_number


logger = logging.getLogger(__name__)


def main(argv: list[str], prog: str = "python -m lorgnette.trainer stage1") -> None:
    """Train from a recipe and the command line; see `recipes/stage1.yaml`."""
    model_args, data_args, training_args = parse(prog, Stage1Arguments, argv, __doc__, check)
    run = dry_run if data_args.dry_run else train
    matching_batch = None
    if model_args.itc_batch is not None:
        matching_batch = training_args.per_device_train_batch_size
        training_args.per_device_train_batch_size = model_args.itc_batch
    build_model = partial(build, model_args, matching_batch)
    run(build_model, data_args, training_args, partial(prepare, model_args, data_args))


def check(model_args: Stage1Arguments, data_args: DataArguments, training_args: TrainingArguments) -> None:
    """Raise ValueError for settings that contradict each other."""
    check_arguments(model_args, data_args, training_args)
    check_pairs(data_args)
    batch = training_args.per_device_train_batch_size
    if model_args.itc_batch is not None and model_args.itc_batch < batch:
        raise ValueError(
            f"itc_batch is {model_args.itc_batch}, and per_device_train_batch_size {batch}: the contrast compares at "
            "least the pictures that the other losses learn from"
        )
    if model_args.itc_batch is not None and not model_args.itc_weight:
        raise ValueError("itc_batch is for the contrast, and itc_weight is 0: no loss would see all its pictures")
    if model_args.itc_batch is not None and model_args.itm_weight and batch < 2:
        raise ValueError(f"per_device_train_batch_size is {batch}: matching finds no negatives in one picture")
    if model_args.itc_batch is not None and training_args.torch_compile:
        raise ValueError("itc_batch and torch_compile exclude each other: values of a batch decide its parts")


def prepare(model_args: Stage1Arguments, data_args: DataArguments, trainer: Trainer) -> None:
    """Configure the Trainer for stage 1; raises what [`check_negatives`] does."""
    check_negatives(data_args, trainer)
    LearningRates.use(trainer, text_learning_rate=model_args.text_learning_rate)


def check_pairs(data_args: DataArguments) -> None:
    """Raise ValueError for columns that stage 1 does not read; chats may be found when the data are loaded."""
    given = {name: getattr(data_args, name) for name in ("query_column", "messages_column")}
    if given := [f"{name} {value!r}" for name, value in given.items() if value]:
        raise ValueError(
            f"stage 1 learns from pairs of picture and text, without {' and '.join(given)}: "
            "leave out query_column and messages_column, and name the column with the texts in text_column"
        )


def check_negatives(data_args: DataArguments, trainer: Trainer) -> None:
    """Check that batches known in advance have negatives: the last of an epoch, and those of evaluation.

    Raises:
        ValueError: the data set has chats; the last batch would hold one pair; or an evaluation batch, in the rows'
            order, would hold one picture, or only one caption; with the numbers. A feature cache without `image_id`.
    """
    check_pairs(data_args)
    args, config = trainer.args, trainer.model.config
    if not (config.itc_weight or config.itm_weight):
        return
    sources = [(data_args.dataset, data_args.train_split)]
    if trainer.eval_dataset is not None and data_args.eval_fraction is None:
        sources.append((data_args.eval_dataset or data_args.dataset, data_args.eval_split or "train"))
    for source, split in sources:
        if is_cache(source) and IMAGE_ID not in load_cache(source, split).column_names:
            raise ValueError(
                f"the feature cache {source} does not say which of its rows have the same picture, as caches of "
                "earlier versions do not: write it again (lorgnette cache …)"
            )
    if isinstance(trainer.train_dataset, Dataset) and args.world_size == 1 and not args.dataloader_drop_last:
        rows, size = len(trainer.train_dataset), args.train_batch_size
        whole, left = divmod(rows, size)
        reached = args.max_steps <= 0 or args.max_steps * args.gradient_accumulation_steps > whole
        if left == 1 and reached:
            raise ValueError(
                f"the last of {rows} pairs would be a batch by itself, after {whole} of {size}: it has no negatives. "
                "Set dataloader_drop_last, or change per_device_train_batch_size"
            )
    if isinstance(trainer.eval_dataset, Dataset) and args.train_sampling_strategy != "group_by_length":
        size = args.eval_batch_size if config.itm_weight else args.eval_batch_size * args.world_size
        _check_in_order(trainer.eval_dataset, data_args, args, size)


def _check_in_order(rows: Dataset, data_args: DataArguments, args: TrainingArguments, size: int) -> None:
    """Check batches of `size` rows: of all processes or, for matching, which needs negatives in each, of one."""
    columns = rows.with_format(None)
    texts, numbers = columns[data_args.text_name][:], columns["index"][:]
    pictures = _image_ids(columns, data_args.image_column)
    # an incomplete last batch is dropped, or filled up with several processes
    smallest = size if args.dataloader_drop_last or args.world_size > 1 else 1
    for start in range(0, len(texts) - smallest + 1, size):
        captions: dict[int, set[str]] = {}  # of each picture
        for picture, text in zip(pictures[start : start + size], texts[start : start + size], strict=True):
            captions.setdefault(picture, set()).update(text if isinstance(text, list) else [text])
        if all(each == captions[pictures[start]] for each in captions.values()):
            what = "one picture" if len(captions) == 1 else "one caption"
            raise ValueError(
                f"evaluation reads its rows in order, and a batch of it, {min(size, len(texts) - start)} from row "
                f"{numbers[start]} on, has {what} alone: there are no negatives. Shuffle the rows, or change "
                "per_device_eval_batch_size"
            )


def _image_ids(rows: Dataset, image_column: str) -> list[int]:
    """The pictures' numbers; those inside a file are different ones, and are not read."""
    if IMAGE_ID in rows.column_names:
        return [picture_number(value) for value in rows[IMAGE_ID][:]]
    first = rows[0][image_column]
    if isinstance(first, dict) and first.get("bytes") is not None:
        return rows["index"][:]
    return [image_id_of(row[image_column], row["index"]) for row in rows.select_columns([image_column, "index"])]


def build(
    args: Stage1Arguments, matching_batch: int | None = None
) -> tuple[LorgnetteForImageTextRetrieval, LorgnetteProcessor]:
    """The model and its processor, joined or loaded; see [`LorgnetteRetrievalConfig`] for `matching_batch`."""
    model, processor = _model_and_processor(args)
    model.config.matching_batch = matching_batch
    if matching_batch is not None:
        logger.info(
            f"A step reads {args.itc_batch} pictures in each process: the contrast compares all of them; matching and "
            f"generation learn from the first {matching_batch}."
        )
    return model, processor


def _model_and_processor(args: Stage1Arguments) -> tuple[LorgnetteForImageTextRetrieval, LorgnetteProcessor]:
    """Joined from backbones or loaded from a saved stage-1 model."""
    if args.model is not None:
        processor = LorgnetteProcessor.from_pretrained(args.model, revision=args.model_revision)
        model = LorgnetteForImageTextRetrieval.from_pretrained(
            args.model, revision=args.model_revision, attn_implementation=args.attn_implementation
        )
        model.check_processor(processor)
        return model, processor
    processor = LorgnetteProcessor.from_backbones(
        args.vision,
        None,
        qformer=args.qformer,
        vision_revision=args.vision_revision,
        qformer_revision=args.qformer_revision,
        **({} if args.num_query_tokens is None else {"num_query_tokens": args.num_query_tokens}),
    )
    model = LorgnetteForImageTextRetrieval.from_backbones(
        args.vision,
        processor=processor,
        attn_implementation=args.attn_implementation,
        **{name: getattr(args, name) for name in args.JOINTS},
    )
    return model, processor
