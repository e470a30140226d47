"""`LorgnetteForConditionalGeneration`: a frozen ViT, a Q-Former, a linear projector and a causal LM with LoRA.

The way of the data (BLIP-2, Li et al. 2023, figure 3, decoder-only):

    pixel_values (N, 3, H, W) ─ vision_model, frozen ─▶ vision features (N, L, E) ─ qformer ─▶ (N, Q, D) ─ projector ─▶
    soft tokens (N, Q, M), which replace the `<image>` placeholders among token embeddings (B, S, M) ─ language_model

Shapes: B rows, N images of the whole batch in the order of their placeholders, S tokens, Q queries, M the LM's width.
"""

from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import TransformersKwargs, is_peft_available, requires_backends
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_lorgnette import LorgnetteConfig
from .modeling_adapters import LanguageModelAdapters
from .modeling_backbones import (
    load_language_model,
    load_vision_model,
    new_vision_model,
    next_free_token_id,
    parse_dtype,
)
from .modeling_base import LorgnettePreTrainedModel
from .modeling_blip2 import Blip2Generation
from .modeling_bridges import Bridges
from .modeling_checks import checked_placeholders, checked_shared
from .modeling_lora import check_lora_config, resolve_lora_config
from .modeling_losses import in_process_group
from .modeling_outputs_lorgnette import LorgnetteCausalLMOutputWithPast, LorgnetteImageFeatures
from .modeling_packing import check_documents, packed
from .modeling_placeholders import PlaceholderBlind, check_context
from .modeling_qformer import LorgnetteQFormerModel
from .modeling_qformer_start import QFormerStart
from .modeling_shared_prefix import can_share
from .modeling_supervision import can_supervise, supervised_loss


class LorgnetteForConditionalGeneration(
    LanguageModelAdapters, Bridges, Blip2Generation, LorgnettePreTrainedModel, GenerationMixin
):
    """A language model that is shown pictures: stage 2, and use.

    Build it with [`from_backbones`] or [`from_blip2`], load it with `from_pretrained`. Only the Q-Former, the projector
    and LoRA train.

    Args:
        config: [`LorgnetteConfig`].
        vision_model, language_model: loaded backbones whose configs are those in `config`; made anew where left out.

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
    ):
        super().__init__(config)
        # ahead of the ViT: transformers' common tests want the first checkpointed layer to be one that trains
        self.qformer = LorgnetteQFormerModel._from_config(config.qformer_config)
        self.vision_model = vision_model if vision_model is not None else new_vision_model(config.vision_config)
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.language_model = language_model
        self.projector = nn.Linear(config.qformer_config.hidden_size, self.get_input_embeddings().embedding_dim)
        if config.lora_config is not None:
            self._attach_lora()
        self.generation_config = self.language_model.generation_config
        self.post_init()
        self.freeze()

    def _attach_lora(self) -> None:
        requires_backends(self, "peft")
        if is_peft_available():  # said so that transformers asks for peft only where there is LoRA
            from peft import LoraConfig

        check_lora_config(self.config.lora_config)
        # inside the LM, driven by the config: so that a plain reload finds every key, and targets cannot hit the ViT
        self.language_model.add_adapter(LoraConfig(**self.config.lora_config))
        for name, module in self.language_model.named_modules():
            if "lora_" in name:
                module._is_hf_initialized = True  # peft has: transformers would overwrite the zeros of lora_B

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
            ValueError: a backbone of the wrong kind, backbones of two dtypes, LoRA targets that match nothing, a BERT
                of another shape.
            OSError: a backbone cannot be found.
        """
        dtype = parse_dtype(dtype)
        seen = load_vision_model(vision, vision_revision, dtype, attn_implementation)
        spoken = load_language_model(text, text_revision, dtype, attn_implementation, quantization_config)
        started = QFormerStart.load(qformer, qformer_revision)
        started.check_vision(seen.model)
        if dtype in (None, "auto") and seen.model.dtype != spoken.model.dtype:
            raise ValueError(
                f"The ViT is {seen.model.dtype}, the LM {spoken.model.dtype}: pass dtype= to join them in one"
            )

        if processor is not None:
            image_token_id = processor.image_token_id
        else:
            image_token_id = next_free_token_id(text, text_revision, spoken.model.config.vocab_size)
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
            ValueError: another placeholder or another number of them, with both; a Q-Former that takes instructions and
                a processor without its tokenizer, or the reverse.
        """
        for field in ("image_token_id", "num_query_tokens"):
            ours, theirs = getattr(self.config, field), getattr(processor, field)
            if ours != theirs:
                raise ValueError(
                    f"The model's {field} is {ours}, the processor's {theirs}: they do not belong together"
                )
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

    def _finish_loading(self, missing: set[str], unexpected: set[str]) -> None:
        unfilled = sorted(key for key in missing if key.replace(".base_layer.", ".") in unexpected)
        if unfilled:
            raise ValueError(
                f"{len(unfilled)} weights under LoRA are not in the checkpoint ({unfilled[0]}, …): it was saved "
                "without the LoRA that lora_config describes. from_backbones(lora=…) is where a model gets its LoRA"
            )
        for name, layer in self.language_model.named_modules():
            if f"language_model.{name}.lora_A.default.weight" in missing:
                layer.reset_lora_parameters("default", init_lora_weights=True)
        super()._finish_loading(missing, unexpected)

    def freeze(self) -> None:
        super().freeze()
        for name, parameter in self.language_model.named_parameters():
            parameter.requires_grad_("lora_" in name)

    @property
    def max_text_length(self) -> int | None:
        """Tokens the LM has positions for, the placeholders' included; None where its config does not say."""
        return getattr(self.config.text_config, "max_position_embeddings", None)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    # ------------------------------------------------------------------------------------------------ seeing

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        image_rows: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LorgnetteImageFeatures:
        """Pictures to soft tokens.

        Args:
            pixel_values: `(N, 3, H, W)`; or, in their place, `vision_features` `(N, L, E)`, the ViT's output.
            image_rows: `(N,)` int64, which picture each image is, where several are one: there are fewer pictures then.
            pixel_attention_mask, spatial_shapes: of SigLIP2's variable resolution.
            qformer_input_ids, qformer_attention_mask: `(N, T)` instruction for the Q-Former, one an image.
            kwargs: `output_attentions`, `output_hidden_states` of the ViT and of the Q-Former.

        Returns:
            [`LorgnetteImageFeatures`]; its `pooler_output` `(N, Q, M)` are the soft tokens.

        Raises:
            ValueError: both or neither of `pixel_values` and `vision_features`.
        """
        if (pixel_values is None) == (vision_features is None):
            raise ValueError("Give either pixel_values or vision_features")
        if self.config.qformer_config.use_qformer_text_input and qformer_input_ids is None:
            raise ValueError("This Q-Former reads the instruction as well: give qformer_input_ids (and its mask)")
        seen = BaseModelOutput(vision_features)
        if vision_features is None:
            seen = self.get_vision_features(pixel_values, pixel_attention_mask, spatial_shapes, **kwargs)
        outputs = self.qformer(
            seen.last_hidden_state,
            encoder_attention_mask=pixel_attention_mask,
            input_ids=qformer_input_ids,
            attention_mask=qformer_attention_mask,
            image_rows=image_rows,
            **kwargs,
        )
        queries = outputs.last_hidden_state[:, : self.config.num_query_tokens]  # (N, Q, D)
        return LorgnetteImageFeatures(
            last_hidden_state=seen.last_hidden_state,
            pooler_output=self.projector(queries),
            hidden_states=seen.hidden_states,
            attentions=seen.attentions,
            qformer_outputs=outputs,
        )

    def get_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`(B, S)`, True at the `<image>` placeholders; found by their embedding where there are no ids."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        table = self.get_input_embeddings()
        if self.config.image_token_id >= table.num_embeddings:
            raise ValueError(
                "Placeholders cannot be found in inputs_embeds: their id is past the table. Give input_ids"
            )
        placeholder = table(torch.tensor(self.config.image_token_id, device=inputs_embeds.device))
        return (inputs_embeds == placeholder).all(-1)

    def _embed(
        self, input_ids, inputs_embeds, row_index, labels=None, supervised_positions=None, document_ids=None, **images
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Token embeddings `(B, S, M)`, soft tokens in the placeholders' places; and the soft tokens `(N, Q, M)`."""
        mask = self.get_placeholder_mask(input_ids, inputs_embeds)
        pictures = images["pixel_values"] if images["vision_features"] is None else images["vision_features"]
        mask = checked_placeholders(
            mask,
            None if pictures is None else pictures.detach(),
            images["image_rows"],
            row_index,
            labels,
            supervised_positions,
            document_ids,
            self.config.num_query_tokens,
            self.config.image_token_id,
        )
        if inputs_embeds is None:
            # swapped out before the look-up: the placeholder's id may lie past the end of the table
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(mask, 0))
        if pictures is None:
            return inputs_embeds, None
        soft = self.get_image_features(**images).pooler_output.to(inputs_embeds)
        return inputs_embeds.masked_scatter(mask.unsqueeze(-1), soft), soft

    def _unused_bridge(self) -> torch.Tensor:
        """A sum over soft tokens of nothing: a batch without images has to reach every trainable tensor under DDP."""
        nothing = torch.zeros(1, 1, self.config.qformer_config.encoder_hidden_size, device=self.projector.weight.device)
        words = None
        if self.config.qformer_config.use_qformer_text_input:
            words = torch.zeros(1, 1, dtype=torch.long, device=nothing.device)
        return self.get_image_features(vision_features=nothing, qformer_input_ids=words).pooler_output.sum()

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
        **kwargs: Unpack[TransformersKwargs],
    ) -> LorgnetteCausalLMOutputWithPast:
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
            `logits` `(B, S, vocabulary)`; in training with `labels` None, unless `logits_to_keep` asks for some.

        Raises:
            ValueError: placeholders and images that do not match, labels on placeholders, pictures that are not finite;
                each names the row. Documents that the language model cannot be kept from mixing, or weights in float16
                that train.
        """
        if self.training and labels is not None:
            self.refuse_half_precision()
        soft_tokens = None
        has_images = pixel_values is not None or vision_features is not None
        decoding = past_key_values is not None and input_ids is not None and input_ids.shape[1] == 1
        if has_images or (inputs_embeds is None and not decoding):
            inputs_embeds, soft_tokens = self._embed(
                input_ids,
                inputs_embeds,
                row_index,
                labels,
                supervised_positions,
                document_ids,
                pixel_values=pixel_values,
                vision_features=vision_features,
                pixel_attention_mask=pixel_attention_mask,
                spatial_shapes=spatial_shapes,
                image_rows=image_rows,
                qformer_input_ids=qformer_input_ids,
                qformer_attention_mask=qformer_attention_mask,
            )
        elif inputs_embeds is None:  # one more generated token, which is no placeholder
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if labels is not None:
            check_context(inputs_embeds.shape[1], attention_mask, self.config, row_index, document_ids)
        inputs = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "labels": labels,
        }
        if document_ids is not None:
            document_ids = check_documents(document_ids, self.language_model, inputs)
            inputs |= packed(self.language_model, document_ids, inputs_embeds, labels) | {"use_cache": False}
        speak = self.language_model
        if self.training:
            inputs["use_cache"] = False  # Trainer turns it off in this config, not in the language model's
            if labels is not None and can_supervise(self.language_model, kwargs):
                if inputs["labels"].shape != labels.shape:  # FlashAttention's packed rows are one
                    supervised_positions = None
                speak = partial(supervised_loss, self.language_model, supervised_positions=supervised_positions)
                if shared_input_ids is not None and can_share(self.language_model, inputs | kwargs):
                    inputs["num_shared_tokens"] = shared_input_ids.shape[1]
                    inputs["labels"] = checked_shared(
                        labels, shared_input_ids, input_ids, attention_mask, row_index, self.config.image_token_id
                    )
        outputs = speak(return_dict=True, **inputs | kwargs)
        loss = outputs.loss
        if self.training and loss is not None and soft_tokens is None and in_process_group():
            loss = loss + 0 * self._unused_bridge()
        return LorgnetteCausalLMOutputWithPast(
            loss=loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=soft_tokens,
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

        Raises:
            ValueError: as in `forward`; or images with a way of decoding that reads token ids alone.
        """
        input_ids = inputs if input_ids is None else input_ids
        if pixel_values is not None or vision_features is not None:
            blind = [name for name in _READS_IDS_ALONE if kwargs.get(name) is not None]
            if blind:
                raise ValueError(f"{', '.join(blind)}: this way of decoding sees token ids alone, not the images")
            kwargs["inputs_embeds"], _ = self._embed(
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

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor | None = None, **kwargs
    ):
        """The language model's own: its cache, positions and masks are its business."""
        return self.language_model.prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        return PlaceholderBlind(super()._get_logits_processor(*args, **kwargs), self.config.image_token_id)


_READS_IDS_ALONE = ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size")


__all__ = ["LorgnetteForConditionalGeneration"]
