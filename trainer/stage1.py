"""Stage 1: by contrast, matching and generation the Q-Former learns to see what words can say (BLIP-2, section 3)."""

from functools import partial

from transformers import TrainingArguments

from ..modeling.modeling_retrieval import LorgnetteForImageTextRetrieval
from ..processing.processing_lorgnette import LorgnetteProcessor
from .arguments import DataArguments, Stage1Arguments
from .run import check_arguments, parse, train


def main(argv: list[str]) -> None:
    """Train as a recipe and the command line say; see `recipes/stage1.yaml`."""
    model_args, data_args, training_args = parse("stage1", Stage1Arguments, argv, __doc__, check)
    train(partial(build, model_args), data_args, training_args)


def check(model_args: Stage1Arguments, data_args: DataArguments, training_args: TrainingArguments) -> None:
    """Raise ValueError for settings that contradict each other."""
    check_arguments(model_args, data_args, training_args)
    if data_args.query_column or data_args.messages_column:
        raise ValueError("stage 1 learns from pairs of picture and text: leave out query_column and messages_column")


def build(args: Stage1Arguments) -> tuple[LorgnetteForImageTextRetrieval, LorgnetteProcessor]:
    """The model and its processor, joined from backbones or loaded from a saved stage-1 model."""
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
