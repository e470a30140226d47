"""`LorgnetteForConditionalGeneration`: a frozen ViT, a Q-Former, a linear projector and a causal LM with LoRA.

`modeling_headless.py` shows the way of the data up to the language model's states. Here are the joint, the loss and
`generate`.

Shapes: B rows, N images of the whole batch in the order of their placeholders, S tokens, Q queries, M the LM's width.
"""

from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_lorgnette import LorgnetteConfig
from .modeling_adapters import LanguageModelAdapters
from .modeling_backbones import (
    check_token_ids,
    load_language_model,
    load_vision_model,
    next_free_token_id,
    parse_dtype,
)
from .modeling_base import LorgnettePreTrainedModel
from .modeling_blip2 import Blip2Generation
from .modeling_bridges import Bridges
from .modeling_checks import IGNORED, checked_shared
from .modeling_decoding import asked_for, check_decoding, prompts_of
from .modeling_headless import LorgnetteModel
from .modeling_lora import resolve_lora_config
from .modeling_outputs_lorgnette import (
    KV_CACHE,
    LorgnetteCausalLMOutputWithPast,
    LorgnetteImageFeatures,
    LorgnetteLossOutput,
    one_cache,
)
from .modeling_placeholders import PlaceholderBlind
from .modeling_qformer_start import QFormerStart
from .modeling_shared_prefix import can_share
from .modeling_supervision import can_supervise, supervised_loss


logger = logging.get_logger(__name__)


class LorgnetteForConditionalGeneration(
    LanguageModelAdapters, Bridges, Blip2Generation, LorgnettePreTrainedModel, GenerationMixin
):
    """A language model that is shown pictures: stage 2, and use.

    Build it with [`from_backbones`] or [`from_blip2`], load it with `from_pretrained`. Only the Q-Former, the projector
    and LoRA train.

    Args:
        config: [`LorgnetteConfig`].
        vision_model, language_model: loaded backbones whose configs are those in `config`; made anew where left out.
        headless: a model to put the head on, in place of the two.

    Raises:
        ValueError: `config.lora_config` would train or rewrite base weights of the language model.
    """

    config: LorgnetteConfig
    config_class = LorgnetteConfig
    main_input_name = "input_ids"
    backbones = ("language_model", "vision_model")

    def __init__(
        self,
        config: LorgnetteConfig,
        vision_model: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
        *,
        headless: LorgnetteModel | None = None,
    ):
        super().__init__(config)
        is_new = headless is None
        headless = LorgnetteModel(config, vision_model, language_model) if is_new else headless
        self.__dict__["_headless"] = headless  # and no submodule: the parts and their keys are this model's own
        self._modules, self.training = headless._modules, headless.training
        self.generation_config = headless.generation_config
        self.register_forward_pre_hook(_leave_out_placeholders, with_kwargs=True)
        self.post_init()
        if is_new:  # what trains of another's parts is its own affair
            self.freeze()

    @property
    def base_model(self) -> LorgnetteModel:
        """The model without its head, of the same parts: trainers that compute a loss of their own run it."""
        return self._headless

    def train(self, mode: bool = True) -> "LorgnetteForConditionalGeneration":
        self._headless.training = mode
        return super().train(mode)

    @classmethod
    def from_backbones(
        cls,
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
    ) -> "LorgnetteForConditionalGeneration":
        """Join pretrained parts.

        Args:
            vision: a ViT (ViT, DeiT, CLIP, SigLIP, SigLIP2, DINOv2 …): Hub id, local folder or loaded model.
            text: any causal LM: Hub id, local folder, `.gguf` file or loaded model.
            qformer: what the Q-Former starts from: a BERT, or a stage-1 model ([`LorgnetteForImageTextRetrieval`] or
                its folder), whose text half is left out unless `use_qformer_text_input`. Without it: random numbers.
            qformer_config: fields of [`LorgnetteQFormerConfig`]; they win over the BERT's.
            num_query_tokens: soft tokens per image; by default stage 1's, as many as `processor` makes room for, or 32.
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
                that does not go on from embeddings with a cache, backbones of two dtypes, LoRA targets that match
                nothing, a BERT of another shape, tokens that the LM has no embeddings for.
            OSError: a backbone cannot be found.
        """
        dtype = parse_dtype(dtype)
        seen = load_vision_model(vision, vision_revision, dtype, attn_implementation, vision_feature_layer)
        spoken = load_language_model(text, text_revision, dtype, attn_implementation, quantization_config)
        started = QFormerStart.load(qformer, qformer_revision)
        started.check_vision(seen.model)
        if dtype in (None, "auto") and seen.model.dtype != spoken.model.dtype:
            raise ValueError(
                f"The ViT is {seen.model.dtype}, the LM {spoken.model.dtype}: pass dtype= to join them in one"
            )

        num_embeddings = spoken.model.get_input_embeddings().num_embeddings
        if processor is not None:
            image_token_id = processor.image_token_id
            check_token_ids(processor.tokenizer, image_token_id, num_embeddings)
        else:
            image_token_id = next_free_token_id(text, text_revision, num_embeddings)
        config = LorgnetteConfig(
            vision_config=seen.model.config,
            qformer_config=started.fields(qformer_config),
            text_config=spoken.model.config,
            image_token_id=image_token_id,
            **started.settle(
                processor,
                num_query_tokens=num_query_tokens,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
            ),
            lora_config=resolve_lora_config(lora, spoken.model) if lora is not None else None,
            vision_backbone=seen.name,
            vision_backbone_revision=seen.revision,
            text_backbone=spoken.name,
            text_backbone_revision=spoken.revision,
            qformer_backbone=started.name,
            qformer_backbone_revision=started.revision,
            attn_implementation=attn_implementation,
        )
        model = cls(config, vision_model=seen.model, language_model=spoken.model)
        if quantization_config is not None:  # transformers puts a quantised LM on the GPU, where there is one
            for part in (model.vision_model, model.qformer, model.projector):
                part.to(spoken.model.device)
        started.load_into(model.qformer)
        model.cast_parameters(spoken.model.dtype if dtype in (None, "auto") else dtype)
        model.say_backbones_are_loaded()
        if processor is not None:
            model.adopt_processor(processor)
        return model

    def adopt_processor(self, processor: Any) -> None:
        """Make a processor this model's own: it is saved along with it, and what ends an answer there ends it here.

        Raises:
            ValueError: it does not fit, see [`check_processor`].
        """
        self.check_processor(processor)
        self._processor = processor
        # a base LM knows no end of a turn, which the chat template of a processor may have
        known = self.generation_config.eos_token_id or []
        known = known if isinstance(known, list) else [known]
        self.generation_config.eos_token_id = sorted({*known, *processor.stop_token_ids})
        self.generation_config.pad_token_id = processor.tokenizer.pad_token_id

    def check_processor(self, processor: Any) -> None:
        """See to it that a processor makes what this model reads.

        Raises:
            ValueError: another placeholder or another number of them, with both; tokens past the language model's table
                of embeddings; a Q-Former that takes instructions and a processor without its tokenizer, or the reverse.
        """
        for field in ("image_token_id", "num_query_tokens"):
            ours, theirs = getattr(self.config, field), getattr(processor, field)
            if ours != theirs:
                raise ValueError(
                    f"The model's {field} is {ours}, the processor's {theirs}: they do not belong together"
                )
        check_token_ids(processor.tokenizer, processor.image_token_id, self.get_input_embeddings().num_embeddings)
        takes_text = self.config.qformer_config.use_qformer_text_input
        if takes_text != (processor.qformer_tokenizer is not None):
            raise ValueError(
                f"qformer_config.use_qformer_text_input is {takes_text}, and the processor has "
                f"{'no' if takes_text else 'a'} qformer_tokenizer: instructions need both"
            )
        if takes_text and len(processor.qformer_tokenizer) > self.config.qformer_config.vocab_size:
            raise ValueError(
                f"qformer_config.vocab_size is {self.config.qformer_config.vocab_size}, and the processor's "
                f"qformer_tokenizer has {len(processor.qformer_tokenizer)} tokens"
            )

    # ------------------------------------------------------------------------------------------------ parts

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_image_features(self, *args: Any, **kwargs: Any) -> LorgnetteImageFeatures:
        """See [`LorgnetteModel.get_image_features`]."""
        return self.base_model.get_image_features(*args, **kwargs)

    def get_placeholder_mask(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See [`LorgnetteModel.get_placeholder_mask`]."""
        return self.base_model.get_placeholder_mask(*args, **kwargs)

    def _get_name(self) -> str:
        """A causal LM's: where Trainer smooths labels, it shifts them for models of these names alone."""
        return "LlamaForCausalLM"

    def __repr__(self) -> str:
        return super().__repr__().replace(self._get_name(), type(self).__name__, 1)

    # ------------------------------------------------------------------------------------------------ speaking

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        image_rows: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        supervised_positions: torch.Tensor | None = None,
        shared_input_ids: torch.Tensor | None = None,
        row_index: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LorgnetteCausalLMOutputWithPast | LorgnetteLossOutput:
        """Predict the next tokens.

        Args:
            input_ids: `(B, S)` with `num_query_tokens` placeholders for each image.
            attention_mask: `(B, S)`.
            pixel_values: `(N, 3, H, W)`, the images of all rows in the order of their placeholders; or, in their place,
                `vision_features` `(N, L, E)`, the ViT's output.
            inputs_embeds: `(B, S, M)` in place of `input_ids`.
            labels: `(B, S)`, -100 where nothing is to be learned.
            pixel_attention_mask, spatial_shapes, image_rows, qformer_input_ids, qformer_attention_mask: see
                [`get_image_features`].
            document_ids: `(B, S)` int64: where several documents share a row, which one each token is of, numbered from
                0 through the batch, and -1 for padding; in place of `attention_mask` and `position_ids`.
            supervised_positions: `(K,)` int64, where in `labels`, flat, those are that are not -100; 0 for padding.
                Without them the head of a compiled model sees all positions in training.
            shared_input_ids: `(B, P)`, the first tokens of `input_ids` where they are the same in all rows: in training
                the language model runs them once. The loss is the same without.
            row_index: `(B,)` rows of the data set, or `(D,)` of D documents, for error messages alone.
            kwargs: for the language model (`use_cache`, `num_items_in_batch`, `output_attentions` …).

        Returns:
            `logits` `(B, S, vocabulary)`; in training with `labels` [`LorgnetteLossOutput`], which has none, unless
            `logits_to_keep` asks for some (0 for all).

        Raises:
            ValueError: placeholders and images that do not match, labels on placeholders, pictures that are not finite;
                each names the row. Documents that the language model cannot be kept from mixing, or weights in float16
                that train.
        """
        # Trainer keeps the labels, and counts them, where it computes the loss itself
        if self.training and (labels is not None or kwargs.get("num_items_in_batch") is not None):
            self.check_trainable()
        inputs, features = self.base_model.lm_inputs(
            input_ids,
            inputs_embeds,
            attention_mask,
            position_ids,
            one_cache(past_key_values, cache),
            document_ids,
            row_index,
            labels,
            supervised_positions,
            pixel_values=pixel_values,
            vision_features=vision_features,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            image_rows=image_rows,
            qformer_input_ids=qformer_input_ids,
            qformer_attention_mask=qformer_attention_mask,
        )
        lm_forward = self.language_model
        if self.training and labels is not None and can_supervise(self.language_model, kwargs):
            if inputs["labels"].shape != labels.shape:  # FlashAttention's packed rows are one
                supervised_positions = None
            lm_forward = partial(supervised_loss, self.language_model, supervised_positions=supervised_positions)
            if shared_input_ids is not None and can_share(self.language_model, inputs | kwargs):
                inputs["num_shared_tokens"] = shared_input_ids.shape[1]
                inputs["labels"] = checked_shared(
                    labels, shared_input_ids, input_ids, attention_mask, row_index, self.config.image_token_id
                )
        outputs = lm_forward(return_dict=True, **inputs | kwargs)
        if outputs.logits is None:
            return LorgnetteLossOutput(
                loss=outputs.loss,
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
                image_hidden_states=None if features is None else features.pooler_output,
            )
        return LorgnetteCausalLMOutputWithPast(
            loss=outputs.loss,
            logits=outputs.logits,
            hidden_states=getattr(outputs, "hidden_states", None),
            attentions=getattr(outputs, "attentions", None),  # Mamba has none
            image_hidden_states=None if features is None else features.pooler_output,
            image_outputs=features,
            **{KV_CACHE: getattr(outputs, KV_CACHE, None)},
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        image_rows: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `GenerationMixin.generate`: prompt and continuation, `(B, S + new)`.

        Each image is encoded once, before the loop over tokens and beams. Placeholders cannot be generated, and logits
        processors (repetition penalty and the like) do not see them.

        A batch with `labels`, as `Seq2SeqTrainer(predict_with_generate=True)` gives it, is cut to its prompts, which
        are padded on the left: S is their width. Images without `input_ids` are asked the processor's own query, each
        in a row of its own; the processor is the one that the model was joined with or lay beside.

        Raises:
            ValueError: as in `forward`; prompts padded on the right, labels that are not one answer at the end of each
                row; images with a way of decoding that reads token ids alone; images alone, and no processor known.
        """
        input_ids, kwargs = prompts_of(
            inputs if input_ids is None else input_ids, kwargs, self.generation_config.pad_token_id
        )
        if input_ids is not None and input_ids.is_floating_point():
            raise ValueError(
                f"generate was given {input_ids.dtype} {tuple(input_ids.shape)} in the place of input_ids, the "
                "prompts' ids (B, S): pictures go in as pixel_values=…"
            )
        configs = (generation_config, self.generation_config)
        has_images = pixel_values is not None or vision_features is not None
        check_decoding(has_images or kwargs.get("inputs_embeds") is not None, kwargs, *configs)
        if asked_for("stop_strings", kwargs, *configs) and kwargs.get("tokenizer") is None:
            kwargs["tokenizer"] = self._known_processor("give its tokenizer=, which stop_strings need").tokenizer
        if has_images:
            if input_ids is None and kwargs.get("inputs_embeds") is None:
                pictures = pixel_values if vision_features is None else vision_features
                count = len(pictures if image_rows is None else image_rows)
                if (mask := kwargs.get("attention_mask")) is not None:
                    raise ValueError(
                        f"attention_mask {tuple(mask.shape)} was given without the input_ids that it is for: give "
                        "both, or the images alone, which are asked the processor's own query"
                    )
                input_ids, words = self._own_prompts(count)
                if qformer_input_ids is None:
                    qformer_input_ids, qformer_attention_mask = words
            kwargs["inputs_embeds"], _ = self.base_model.embed(
                input_ids,
                kwargs.get("inputs_embeds"),
                kwargs.pop("row_index", None),
                pixel_values=pixel_values,
                vision_features=vision_features,
                pixel_attention_mask=pixel_attention_mask,
                spatial_shapes=spatial_shapes,
                image_rows=image_rows,
                qformer_input_ids=qformer_input_ids,
                qformer_attention_mask=qformer_attention_mask,
            )
        return super().generate(input_ids, generation_config, **kwargs)

    def _own_prompts(self, count: int) -> tuple[torch.Tensor, tuple[torch.Tensor | None, torch.Tensor | None]]:
        """`(count, S)`: what the processor asks of one image each; and the same for the Q-Former, ids and mask."""
        processor = self._known_processor(
            "give input_ids with the images' placeholders, or the model its processor: adopt_processor(…)"
        )
        self.check_processor(processor)
        prompt, _ = processor.encode_example(None)
        words = (None, None)
        if self.config.qformer_config.use_qformer_text_input:
            encoded = processor.encode_for_qformer([processor.query] * count, return_tensors="pt")
            words = (encoded["input_ids"].to(self.device), encoded["attention_mask"].to(self.device))
        return torch.tensor([prompt] * count, device=self.device), words

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor | None = None, **kwargs
    ):
        """The language model's own: its cache, positions and masks are its business."""
        return self.language_model.prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)

    def _supports_default_dynamic_cache(self) -> bool:
        return self.language_model._supports_default_dynamic_cache()

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        return PlaceholderBlind(super()._get_logits_processor(*args, **kwargs), self.config.image_token_id)


LorgnetteModel.head_class = LorgnetteForConditionalGeneration


def _leave_out_placeholders(
    model: LorgnetteForConditionalGeneration, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Labels on placeholders are left out where a trainer computes the loss from states by itself.

    TRL copies `input_ids` of rows of messages to `labels`, and calls `forward` with `fused_lm_head=True`, which it has
    put in place of this model's. An id past the vocabulary would be looked up in the logits there.

    Raises:
        ValueError: such a call measures alone, in training: the loss came of a call without labels, and has them.
    """
    labels, input_ids = kwargs.get("labels"), kwargs.get("input_ids")
    if not kwargs.get("fused_lm_head") or labels is None or input_ids is None:
        return None
    labelled = (input_ids == model.config.image_token_id) & (labels != IGNORED)
    if not labelled.any():
        return None
    where = f"{int(labelled.sum())} labels of the batch are on image placeholders (id {model.config.image_token_id})"
    if model.training and not torch.is_grad_enabled():
        raise ValueError(
            f"{where}, and the trainer computes its loss outside of the model (label_smoothing_factor, "
            "compute_loss_func), where they cannot be left out: give rows of prompt and completion, or "
            "LorgnetteCollator as data_collator, which label none"
        )
    logger.warning_once(
        f"{where}: they are left out of the loss. The trainer's count of labels, by which it divides, has them: rows "
        "of prompt and completion, or LorgnetteCollator as data_collator, have none"
    )
    return args, kwargs | {"labels": labels.masked_fill(labelled, IGNORED)}


__all__ = ["LorgnetteForConditionalGeneration"]
