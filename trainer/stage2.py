"""Stage 2: between a frozen ViT and a frozen LM, Q-Former, projector and LoRA learn to put pictures into words."""

from functools import partial

from transformers import AutoConfig

from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration
from ..processing.processing_lorgnette import LorgnetteProcessor
from .arguments import Stage2Arguments
from .run import parse, train


def main(argv: list[str]) -> None:
    """Train as a recipe and the command line say; see `recipes/stage2.yaml`."""
    model_args, data_args, training_args = parse("stage2", Stage2Arguments, argv, __doc__)
    train(partial(build, model_args), data_args, training_args)


def build(args: Stage2Arguments) -> tuple[LorgnetteForConditionalGeneration, LorgnetteProcessor]:
    """The model and its processor, joined from backbones or loaded from a saved lorgnette model."""
    prompts = {name: getattr(args, name) for name in ("system_prompt", "query") if getattr(args, name) is not None}
    if args.model is not None:
        processor = LorgnetteProcessor.from_pretrained(args.model, revision=args.model_revision, **prompts)
        model = LorgnetteForConditionalGeneration.from_pretrained(
            args.model, revision=args.model_revision, attn_implementation=args.attn_implementation
        )
        model.check_processor(processor)
        return model, processor
    num_query_tokens = args.num_query_tokens
    if num_query_tokens is None and args.qformer is not None:  # a stage-1 model has settled it, a BERT knows of none
        config = AutoConfig.from_pretrained(args.qformer, revision=args.qformer_revision)
        num_query_tokens = getattr(config, "num_query_tokens", None)
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
