"""`from_backbones` of both stages: join pretrained parts into a model."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..configuration.configuration_lorgnette import LorgnetteConfig, LorgnetteQFormerConfig
from ..configuration.configuration_retrieval import LorgnetteRetrievalConfig
from ..modeling.modeling_loading import parse_dtype
from .backbones import (
    cast_parameters,
    folders_of,
    load_bert,
    load_language_model,
    load_vision_model,
    next_free_token_id,
    pooling_of,
)
from .blip2_qformer import is_blip2
from .checkpoint_names import accept_names_in_files
from .lora_targets import resolve_lora_config
from .processor_checks import check_token_ids
from .qformer_init import QFormerInit, load_bert_weights, qformer_fields


def assemble(
    cls: type[PreTrainedModel],
    vision: str | Path | PreTrainedModel,
    text: str | Path | PreTrainedModel,
    *,
    qformer: str | Path | PreTrainedModel | None = None,
    qformer_config: dict[str, Any] | None = None,
    num_query_tokens: int | None = None,
    lora: Any = None,
    processor: Any = None,
    vision_feature_layer: int | None = None,
    vision_feature_select_strategy: str = "full",
    vision_revision: str | None = None,
    text_revision: str | None = None,
    qformer_revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    quantization_config: Any = None,
) -> PreTrainedModel:
    """Join pretrained parts: `LorgnetteForConditionalGeneration.from_backbones`.

    Args:
        cls: the class of the model.
        vision: a ViT (ViT, DeiT, CLIP, SigLIP, SigLIP2, DINOv2 …): Hub id, local folder or loaded model.
        text: any causal LM: Hub id, local folder, `.gguf` file or loaded model.
        qformer: initial weights of the Q-Former: a BERT, a stage-1 model ([`LorgnetteForImageTextRetrieval`] or its
            folder), or a BLIP-2 or InstructBLIP checkpoint, whose queries and cross-attention are taken too (keys and
            values start anew under a ViT of another width). The text half of the latter two is left out unless
            `use_qformer_text_input`. Random without it.
        qformer_config: fields of [`LorgnetteQFormerConfig`]; they win over the BERT's.
        num_query_tokens: visual tokens per image; by default stage 1's, as many as `processor` makes room for, or 32.
        lora: fields of `peft.LoraConfig`, or one; `{}` for peft's defaults on all attention projections; `None` for
            no LoRA.
        processor: the [`LorgnetteProcessor`] to be used. It decides the placeholder's id and what ends an answer,
            and is saved with the model. Without it the id is read from the tokenizer beside `text`, and without
            that it is the first past the LM's vocabulary.
        vision_feature_layer, vision_feature_select_strategy: see [`LorgnetteConfig`].
        vision_revision, text_revision, qformer_revision: branch, tag or commit on the Hub.
        dtype: of all parts; float32 by default, `"auto"` is that of the checkpoints. Loaded models keep theirs
            unless it is given. Those of ViT and LM have to agree.
        attn_implementation: `"eager"`, `"sdpa"`, `"flash_attention_2"`; transformers chooses by default.
        quantization_config: of the LM's base weights, `transformers.BitsAndBytesConfig` for one; all else keeps
            `dtype`. The LM has to be a Hub id or a folder.

    Raises:
        ValueError: a backbone of the wrong kind or with code of its own, a ViT that draws random numbers, an LM
            that does not continue from embeddings with a cache, backbones of two dtypes, LoRA targets that match
            nothing, a BERT of another shape, tokens that the LM has no embeddings for.
        OSError: a backbone cannot be found.
    """
    dtype = parse_dtype(dtype)
    vision_backbone = load_vision_model(vision, vision_revision, dtype, attn_implementation, vision_feature_layer)
    language_backbone = load_language_model(text, text_revision, dtype, attn_implementation, quantization_config)
    qformer_init = QFormerInit.load(qformer, qformer_revision)
    qformer_init.check_vision(vision_backbone.model)
    if dtype in (None, "auto") and vision_backbone.model.dtype != language_backbone.model.dtype:
        raise ValueError(
            f"The ViT is {vision_backbone.model.dtype}, the LM {language_backbone.model.dtype}: pass dtype= to join "
            "them in one"
        )

    num_embeddings = language_backbone.model.get_input_embeddings().num_embeddings
    if processor is not None:
        image_token_id = processor.image_token_id
        check_token_ids(processor.tokenizer, image_token_id, num_embeddings)
    else:
        image_token_id = next_free_token_id(text, text_revision, num_embeddings)
    config = LorgnetteConfig(
        vision_config=vision_backbone.model.config,
        qformer_config=qformer_init.fields(qformer_config),
        text_config=language_backbone.model.config,
        image_token_id=image_token_id,
        **qformer_init.resolve_fields(
            processor,
            num_query_tokens=num_query_tokens,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
        ),
        lora_config=resolve_lora_config(lora, language_backbone.model) if lora is not None else None,
        vision_backbone=vision_backbone.name,
        vision_backbone_revision=vision_backbone.revision,
        text_backbone=language_backbone.name,
        text_backbone_revision=language_backbone.revision,
        qformer_backbone=qformer_init.name,
        qformer_backbone_revision=qformer_init.revision,
        attn_implementation=attn_implementation,
    )
    model = cls(config, vision_model=vision_backbone.model, language_model=language_backbone.model)
    model._backbone_folders = folders_of(vision_model=vision_backbone, language_model=language_backbone)
    if quantization_config is not None:  # transformers puts a quantised LM on the GPU, where there is one
        for part in (model.vision_model, model.qformer, model.projector):
            part.to(language_backbone.model.device)
    qformer_init.load_into(model.qformer)
    cast_parameters(model, language_backbone.model.dtype if dtype in (None, "auto") else dtype)
    model.mark_backbones_loaded()
    accept_names_in_files(model)
    if processor is not None:
        model.adopt_processor(processor)
    return model


def assemble_stage1(
    cls: type[PreTrainedModel],
    vision: str | Path | PreTrainedModel,
    *,
    qformer: str | Path | PreTrainedModel | None = None,
    qformer_config: dict[str, Any] | None = None,
    num_query_tokens: int | None = None,
    itc_weight: float = 1.0,
    itm_weight: float = 1.0,
    itg_weight: float = 1.0,
    image_text_hidden_size: int = 256,
    text_pooling: str | None = None,
    itc_loss: str = "softmax",
    itc_label_smoothing: float = 0.1,
    max_logit_scale: float = 100.0,
    processor: Any = None,
    vision_feature_layer: int | None = None,
    vision_feature_select_strategy: str = "full",
    vision_revision: str | None = None,
    qformer_revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Join a ViT and a Q-Former: `LorgnetteForImageTextRetrieval.from_backbones`.

    Args:
        cls: the class of the model.
        vision: a ViT: Hub id, local folder or loaded model.
        qformer: the BERT that the Q-Former starts from, text half included; without one it starts at random.
        qformer_config: fields of [`LorgnetteQFormerConfig`]; they win over the BERT's.
        num_query_tokens: learned queries; by default as many as `processor` makes room for, or 32.
        itc_weight, itm_weight, itg_weight, image_text_hidden_size, itc_loss, itc_label_smoothing, max_logit_scale: see
            [`LorgnetteRetrievalConfig`].
        text_pooling: `"cls"` or `"mean"`; by default as the BERT was trained, where files of sentence-transformers
            beside it say so, and `"cls"` elsewhere.
        processor: the [`LorgnetteProcessor`] to be used, made with `text=None`; saved with the model.
        vision_feature_layer, vision_feature_select_strategy: see [`LorgnetteBridgeConfig`].
        vision_revision, qformer_revision: branch, tag or commit on the Hub.
        dtype: of all parts; the loaded ViT's, or float32, by default; `"auto"` is the ViT's.
        attn_implementation: `"eager"`, `"sdpa"`, or where `itg_weight` is 0 `"flash_attention_2"`; transformers
            chooses by default.

    Raises:
        ValueError: a backbone of the wrong kind, a BERT of another shape, a processor that does not fit.
        OSError: a backbone cannot be found.
    """
    dtype = parse_dtype(dtype)
    vision_backbone = load_vision_model(vision, vision_revision, dtype, attn_implementation, vision_feature_layer)
    if qformer is not None and is_blip2(qformer, qformer_revision):
        raise ValueError(
            "The Q-Former of stage 1 starts from a BERT, and this is a BLIP-2: from_blip2 takes one with all its heads"
        )
    qformer_init = load_bert(qformer, qformer_revision) if qformer is not None else None
    fields = qformer_fields(qformer_init, qformer_config) | {"use_qformer_text_input": True}
    if itg_weight and fields.get("dec_token_id") is None:
        fields["dec_token_id"] = fields.get("vocab_size", LorgnetteQFormerConfig().vocab_size)
        fields["vocab_size"] = fields["dec_token_id"] + 1
    if num_query_tokens is None:
        num_query_tokens = processor.num_query_tokens if processor is not None else 32
    config = LorgnetteRetrievalConfig(
        vision_config=vision_backbone.model.config,
        qformer_config=fields,
        num_query_tokens=num_query_tokens,
        itc_weight=itc_weight,
        itm_weight=itm_weight,
        itg_weight=itg_weight,
        image_text_hidden_size=image_text_hidden_size,
        itc_loss=itc_loss,
        itc_label_smoothing=itc_label_smoothing,
        max_logit_scale=max_logit_scale,
        text_pooling=text_pooling or pooling_of(qformer, qformer_revision),
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=vision_feature_select_strategy,
        vision_backbone=vision_backbone.name,
        vision_backbone_revision=vision_backbone.revision,
        qformer_backbone=qformer_init.name if qformer_init else None,
        qformer_backbone_revision=qformer_init.revision if qformer_init else None,
        attn_implementation=attn_implementation,
    )
    model = cls(config, vision_model=vision_backbone.model)
    model._backbone_folders = folders_of(vision_model=vision_backbone)
    if qformer_init is not None:
        load_bert_weights(model.qformer, qformer_init.model)
    cast_parameters(model, vision_backbone.model.dtype if dtype in (None, "auto") else dtype)
    model.mark_backbones_loaded()
    accept_names_in_files(model)
    if processor is not None:
        model.check_processor(processor)
        model._processor = processor
    return model


__all__ = ["assemble", "assemble_stage1"]
