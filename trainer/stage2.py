"""Stage 2: between a frozen ViT and a frozen LM, Q-Former, projector and LoRA learn to put pictures into words."""

import logging
from functools import partial
from itertools import islice
from typing import Any

from transformers import PreTrainedConfig, Trainer, TrainingArguments

from ..assembly.sources import from_pretrained_arguments
from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration
from ..modeling.modeling_saving import quantizer_of, resolve_save_format
from ..processing.processing_lorgnette import LorgnetteProcessor
from .arguments import DataArguments, Stage2Arguments
from .callbacks import GenerateMetricsCallback
from .decoding import decoding_of
from .dry_run import dry_run
from .first_token import FirstTokenCallback
from .learning_rates import LearningRates
from .metrics import text_metrics
from .progress import SamplesCallback
from .run import check_arguments, parse, train
from .texts import pairs_of_rows


logger = logging.getLogger(__name__)


def main(argv: list[str], prog: str = "python -m lorgnette.trainer stage2") -> None:
    """Train from a recipe and the command line; see `recipes/stage2.yaml`."""
    model_args, data_args, training_args = parse(prog, Stage2Arguments, argv, __doc__, check)
    run = dry_run if data_args.dry_run else train
    run(partial(build, model_args), data_args, training_args, partial(prepare, model_args, data_args))


def check(model_args: Stage2Arguments, data_args: DataArguments, training_args: TrainingArguments) -> None:
    """Raise ValueError for settings that contradict each other."""
    check_arguments(model_args, data_args, training_args)
    if model_args.generate_metrics:
        text_metrics(model_args.generate_metrics)
        decoding_of(model_args.generate_decoding)
        if training_args.eval_strategy == "no":
            raise ValueError("generate_metrics are measured at each evaluation: set eval_strategy")


def prepare(model_args: Stage2Arguments, data_args: DataArguments, trainer: Trainer) -> None:
    """Configure the Trainer for stage 2."""
    rates = ("qformer_learning_rate", "projector_learning_rate")
    LearningRates.use(trainer, **{name: getattr(model_args, name) for name in rates})
    if trainer.eval_dataset is not None:
        trainer.callback_handler.callbacks.insert(0, FirstTokenCallback(trainer.model))
    columns = {"image_column": data_args.image_column, "text_column": data_args.text_name}
    columns["query_column"] = data_args.query_column
    if trainer.eval_dataset is not None and model_args.sample_answers:
        pairs = pairs_of_rows(trainer.eval_dataset, columns["text_column"], columns["query_column"])
        rows = list(islice(pairs, model_args.sample_answers))
        trainer.add_callback(SamplesCallback(trainer, rows, columns))
    if model_args.generate_metrics:
        measure_texts(model_args, columns, trainer)


def measure_texts(model_args: Stage2Arguments, columns: dict[str, Any], trainer: Trainer) -> None:
    """Measure generated texts at each evaluation."""
    names = {name: columns[name] for name in ("text_column", "query_column")}
    trainer.add_callback(
        GenerateMetricsCallback(
            trainer.processing_class,
            list(islice(pairs_of_rows(trainer.eval_dataset, **names), model_args.generate_samples)),
            metrics=model_args.generate_metrics,
            decoding=model_args.generate_decoding,
            batch_size=trainer.args.per_device_eval_batch_size,
            **columns,
            report=trainer.callback_handler.on_log,
        )
    )


def build(args: Stage2Arguments) -> tuple[LorgnetteForConditionalGeneration, LorgnetteProcessor]:
    """What is trained: see [`model_and_processor`].

    Raises:
        ValueError: the model could not be saved in any format, for example with a quantised language model of a folder.
    """
    model, processor = model_and_processor(args)
    # a model that is not quantised can be saved in full
    resolve_save_format(model, "full" if quantizer_of(model) is None else None)
    if model.config.lora_config is None:
        how = "its model was saved without" if args.model else "--lora '{}', or `lora: {}` in the recipe, adds it"
        logger.warning("The language model gets no LoRA (%s): only Q-Former and projector train.", how)
    return model, processor


def model_and_processor(
    args: Stage2Arguments, **overrides: Any
) -> tuple[LorgnetteForConditionalGeneration, LorgnetteProcessor]:
    """The model and its processor, joined from backbones or loaded from a saved lorgnette model.

    `overrides` are fields of both, for a saved one; None is left out.
    """
    prompts = {name: getattr(args, name) for name in ("system_prompt", "query") if getattr(args, name) is not None}
    if args.model is not None:
        name, keywords = from_pretrained_arguments(args.model, args.model_revision, **overrides)
        processor = LorgnetteProcessor.from_pretrained(name, **keywords, **prompts)
        model = LorgnetteForConditionalGeneration.from_pretrained(
            name, **keywords, attn_implementation=args.attn_implementation
        )
        model.check_processor(processor)
        return model, processor
    num_query_tokens = args.num_query_tokens
    if num_query_tokens is None and args.qformer is not None:  # a stage-1 model fixes it, a BERT has none
        name, keywords = from_pretrained_arguments(args.qformer, args.qformer_revision)
        num_query_tokens = PreTrainedConfig.get_config_dict(name, **keywords)[0].get("num_query_tokens")
    processor = LorgnetteProcessor.from_backbones(
        args.vision,
        args.text,
        qformer=args.qformer if args.reads_query else None,
        **({} if num_query_tokens is None else {"num_query_tokens": num_query_tokens}),
        vision_revision=args.vision_revision,
        text_revision=args.text_revision,
        qformer_revision=args.qformer_revision,
        **prompts,
    )
    model = LorgnetteForConditionalGeneration.from_backbones(
        args.vision,
        args.text,
        processor=processor,
        attn_implementation=args.attn_implementation,
        **{name: getattr(args, name) for name in args.JOINTS},
    )
    return model, processor
