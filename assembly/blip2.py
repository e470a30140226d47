"""`from_blip2` of both stages: convert BLIP-2 models of transformers.

The parts have the same shapes there (`transformers/models/blip_2/modeling_blip_2.py`), and nearly the same names:

    query_tokens (1, Q, D)  ─▶ qformer.query_tokens.weight (Q, D)
    embeddings              ─▶ qformer.embeddings
    language_projection     ─▶ projector
    vision_projection, text_projection, itm_head, vision_model, language_model: as they are
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..configuration.configuration_lorgnette import LorgnetteConfig, LorgnetteQFormerConfig
from ..configuration.configuration_retrieval import LorgnetteRetrievalConfig
from ..modeling.modeling_loading import parse_dtype
from .backbones import Backbone, cast_parameters, from_source, load_language_model, next_free_token_id
from .lora_targets import resolve_lora_config
from .sources import from_pretrained_arguments, load_qformer_tokenizer


logger = logging.get_logger(__name__)


def convert_generation(
    cls: type[PreTrainedModel],
    source: str | Path | PreTrainedModel,
    *,
    processor: Any = None,
    lora: Any = None,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Convert a `transformers.Blip2ForConditionalGeneration`: ViT, Q-Former, projection and causal LM.

    The logits are BLIP-2's, and so is what `generate` says. The parts of a loaded model are used, not copied. As
    after `from_pretrained` the model is in eval mode.

    Args:
        source: Hub id, local folder or loaded model.
        processor: the [`LorgnetteProcessor`] to be used, as in [`from_backbones`]; its `from_blip2` makes one that
            writes BLIP-2's prompts.
        lora: LoRA to go into the LM, as in [`from_backbones`]; BLIP-2 has none.
        revision: branch, tag or commit on the Hub.
        dtype: of all parts, the Q-Former too, which BLIP-2 keeps in float32. By default float32, of a loaded model
            and with `"auto"` its LM's.
        attn_implementation: `"eager"`, `"sdpa"`, `"flash_attention_2"`; transformers chooses by default.

    Raises:
        ValueError: an encoder-decoder LM (FlanT5), a model that is no BLIP-2, weights that it lacks, a processor
            that does not fit.
        OSError: there is no such model.
    """
    blip2 = _load(source, "Blip2ForConditionalGeneration", revision, dtype, attn_implementation)
    theirs, text = blip2.model.config, load_language_model(blip2.model.language_model, None, None, None).model
    width = text.get_input_embeddings().embedding_dim
    if blip2.model.language_projection.out_features != width:
        raise ValueError(
            f"language_projection gives vectors of {blip2.model.language_projection.out_features}; the LM's "
            f"token embeddings have {width}"
        )
    if processor is not None:
        image_token_id = processor.image_token_id
    elif theirs.image_token_index is not None:
        image_token_id = theirs.image_token_index
    else:
        image_token_id = next_free_token_id(source, revision, text.config.vocab_size)
    config = LorgnetteConfig(
        **_shared_fields(blip2, use_qformer_text_input=False),
        text_config=text.config,
        image_token_id=image_token_id,
        lora_config=resolve_lora_config(lora, text) if lora is not None else None,
        attn_implementation=attn_implementation,
    )
    model = cls(config, vision_model=blip2.model.vision_model, language_model=text)
    _take_qformer(model, blip2.model)
    model.projector.load_state_dict(blip2.model.language_projection.state_dict())
    cast_parameters(model, text.dtype if dtype in (None, "auto") else parse_dtype(dtype))
    if processor is not None:
        model.adopt_processor(processor)
    return model.eval()


def convert_retrieval(
    cls: type[PreTrainedModel],
    source: str | Path | PreTrainedModel,
    *,
    processor: Any = None,
    itc_weight: float = 1.0,
    itm_weight: float = 1.0,
    itg_weight: float = 1.0,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Convert a `transformers.Blip2ForImageTextRetrieval`: ViT, Q-Former with its text half, and heads.

    Cosines and matching logits are BLIP-2's. What transformers' checkpoints lack starts fresh, which is logged: the
    temperature of ITC, the head of ITG, and `[DEC]` where the tokenizer has none.

    Args:
        source: Hub id, local folder or loaded model.
        processor: the [`LorgnetteProcessor`] to be used, made with `text=None`; its tokenizer, or the one beside
            `source`, says which word is `[DEC]`.
        itc_weight, itm_weight, itg_weight: see [`LorgnetteRetrievalConfig`].
        revision: branch, tag or commit on the Hub.
        dtype: of all parts; by default float32, of a loaded model and with `"auto"` its ViT's.
        attn_implementation: `"eager"`, `"sdpa"`, `"flash_attention_2"`; transformers chooses by default.

    Raises:
        ValueError: a model that is no BLIP-2, weights that it lacks, a processor that does not fit.
        OSError: there is no such model.
    """
    tokenizer = processor.qformer_tokenizer if processor is not None else None
    blip2 = _load(source, "Blip2ForImageTextRetrieval", revision, dtype, attn_implementation)
    if tokenizer is None and isinstance(source, (str, Path)):
        tokenizer = load_qformer_tokenizer(source, revision)
    vocab_size = blip2.model.get_input_embeddings().num_embeddings
    dec_token_id = _dec_token_id(tokenizer, vocab_size) if itg_weight else None
    config = LorgnetteRetrievalConfig(
        **_shared_fields(
            blip2,
            use_qformer_text_input=True,
            vocab_size=max(vocab_size, dec_token_id + 1) if itg_weight else vocab_size,
            dec_token_id=dec_token_id,
        ),
        image_text_hidden_size=blip2.model.config.image_text_hidden_size,
        itc_weight=itc_weight,
        itm_weight=itm_weight,
        itg_weight=itg_weight,
        attn_implementation=attn_implementation,
    )
    model = cls(config, vision_model=blip2.model.vision_model)
    _take_qformer(model, blip2.model)
    fresh = []
    for name, module in model.named_children():
        if name in ("vision_projection", "text_projection", "itm_head"):
            module.load_state_dict(getattr(blip2.model, name).state_dict())
        elif name == "text_head":
            fresh.append("the head of ITG (text_head)")
    if itc_weight:
        fresh.append("the temperature of ITC (logit_scale)")
    if itg_weight and dec_token_id == vocab_size:
        fresh.append(f"the embedding of [DEC] (id {dec_token_id})")
    if fresh:
        logger.warning(f"BLIP-2's checkpoint does not hold, and training has to teach: {', '.join(fresh)}")
    cast_parameters(model, blip2.model.vision_model.dtype if dtype in (None, "auto") else parse_dtype(dtype))
    if processor is not None:
        model.check_processor(processor)
        model._processor = processor
    return model.eval()


def _load(
    source: str | Path | PreTrainedModel,
    kind: str,
    revision: str | None,
    dtype: torch.dtype | str | None,
    attn_implementation: str | None,
) -> Backbone:
    """Load a BLIP-2 model of the class named `kind`, after checking its config.

    Raises:
        ValueError: no BLIP-2, the other of its two classes, an encoder-decoder LM, weights that are missing.
    """
    import transformers

    loaded = isinstance(source, PreTrainedModel)
    if loaded:
        config = source.config
    else:
        name, keywords = from_pretrained_arguments(source, revision)
        config = AutoConfig.from_pretrained(name, **keywords)
    if config.model_type != "blip-2":
        raise ValueError(f'model_type is "{config.model_type}"; from_blip2 takes a BLIP-2, whose is "blip-2"')
    model_class = getattr(transformers, kind)
    if loaded and not isinstance(source, model_class):
        raise ValueError(f"This takes a {kind}; the model is a {type(source).__name__}")
    if kind == "Blip2ForConditionalGeneration" and not config.use_decoder_only_language_model:
        raise ValueError(
            f'The language model is a "{config.text_config.model_type}", an encoder-decoder; a causal LM is needed'
        )
    if loaded:
        return Backbone(source)
    model, info = model_class.from_pretrained(
        name,
        dtype=parse_dtype(dtype) or torch.float32,
        attn_implementation=attn_implementation,
        output_loading_info=True,
        **keywords,
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{source} lacks {len(missing)} weights of a {kind} ({missing[0]}, …)")
    for part in (model.vision_model, getattr(model, "language_model", None)):
        if part is not None:
            part.config.name_or_path = ""  # a folder of someone's, or a model that BLIP-2 has trained further
    return from_source(model, source, revision)


def _shared_fields(blip2: Backbone, **qformer_fields: Any) -> dict[str, Any]:
    """Fields of [`LorgnetteBridgeConfig`]; `qformer_fields` win over BLIP-2's."""
    theirs = blip2.model.config.qformer_config
    fields = {name: getattr(theirs, name) for name in LorgnetteQFormerConfig.__annotations__ if hasattr(theirs, name)}
    return {
        "vision_config": blip2.model.vision_model.config,
        "qformer_config": fields | qformer_fields,
        "num_query_tokens": blip2.model.config.num_query_tokens,
        "qformer_backbone": blip2.name,  # ViT and LM lie inside BLIP-2: no Hub id leads to them alone
        "qformer_backbone_revision": blip2.revision,
    }


def _take_qformer(model: PreTrainedModel, blip2: PreTrainedModel) -> None:
    """Copy BLIP-2's Q-Former, its queries, and its words where both have them, into `model.qformer`."""
    theirs = dict(blip2.qformer.state_dict())
    theirs["query_tokens.weight"] = blip2.query_tokens.squeeze(0)
    if hasattr(blip2, "embeddings"):
        theirs |= {f"embeddings.{name}": tensor for name, tensor in blip2.embeddings.state_dict().items()}
    own = model.qformer.state_dict()
    name = "embeddings.word_embeddings.weight"
    if name in own and len(own[name]) > len(theirs[name]):  # the row of [DEC] keeps its random initial values
        theirs[name] = torch.cat([theirs[name], own[name][len(theirs[name]) :].to(theirs[name])])
    model.qformer.load_state_dict({name: theirs[name] for name in own})


def _dec_token_id(tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> int:
    """The id of `[DEC]` in the Q-Former's tokenizer; if it has none, the one after the vocabulary."""
    dec_token_id = None if tokenizer is None else tokenizer.get_vocab().get("[DEC]")
    return vocab_size if dec_token_id is None else dec_token_id


__all__ = ["convert_generation", "convert_retrieval"]
