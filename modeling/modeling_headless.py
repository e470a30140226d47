"""`LorgnetteModel`: pictures and words to the states of a language model's decoder, without its head.

The way of the data (BLIP-2, Li et al. 2023, figure 3, decoder-only):

    pixel_values (N, 3, H, W) ─ vision_model, frozen ─▶ vision features (N, L, E) ─ qformer ─▶ (N, Q, D) ─ projector ─▶
    visual tokens (N, Q, M), which replace the `<image>` placeholders among token embeddings (B, S, M) ─ language_model

Shapes: B rows, N images of the whole batch in the order of their placeholders, S tokens, Q queries, M the LM's width.
"""

from typing import Any, ClassVar, Unpack

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_lorgnette import LorgnetteConfig
from .modeling_adapters import LanguageModelAdapters
from .modeling_backbones import new_vision_model
from .modeling_base import LorgnettePreTrainedModel
from .modeling_checks import checked_placeholders
from .modeling_losses import in_process_group
from .modeling_outputs_lorgnette import KV_CACHE, LorgnetteImageFeatures, LorgnetteModelOutputWithPast, one_cache
from .modeling_packing import check_documents, packed
from .modeling_placeholders import check_context
from .modeling_qformer import LorgnetteQFormerModel


class LorgnetteModel(LanguageModelAdapters, LorgnettePreTrainedModel):
    """The bare model: what [`LorgnetteForConditionalGeneration`] is without its head, as `LlavaModel` is to LLaVA.

    `AutoModel` loads it from the folder of a saved [`LorgnetteForConditionalGeneration`]: the parts and their keys are
    the same. Its `language_model` is the whole causal LM, of which `forward` runs the decoder; so it can `generate`,
    which programs that know models by `AutoModel` alone expect (lmms-eval).

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
    # `modeling_lorgnette.py` sets it: [`LorgnetteForConditionalGeneration`], which is built on this class
    head_class: ClassVar[type[PreTrainedModel]]

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

    # transformers resizes the table and the head together, and asks whichever model it is called on for both
    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    adjust_generation_fn = GenerationMixin.adjust_generation_fn  # reads generation_config.json

    @classmethod
    def can_generate(cls) -> bool:
        """Whether there is a generation config to be loaded and saved."""
        return True

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """See [`LorgnetteForConditionalGeneration.generate`]."""
        with_head = self.head_class(self.config, headless=self)
        with_head.generation_config, with_head._processor = self.generation_config, self._processor
        return with_head.generate(*args, **kwargs)

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
        """Pictures to visual tokens.

        Args:
            pixel_values: `(N, 3, H, W)`; or, in their place, `vision_features` `(N, L, E)`, the ViT's output.
            image_rows: `(N,)` int64, which picture each image is, where several are one: there are fewer pictures then.
            pixel_attention_mask, spatial_shapes: of SigLIP2's variable resolution.
            qformer_input_ids, qformer_attention_mask: `(N, T)` instruction for the Q-Former, one an image.
            kwargs: `output_attentions`, `output_hidden_states` of the ViT and of the Q-Former.

        Returns:
            [`LorgnetteImageFeatures`]; its `pooler_output` `(N, Q, M)` are the visual tokens.

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
        """`(B, S)`, True at the `<image>` placeholders; found by their embedding where there are no ids.

        Raises:
            ValueError: neither is given; or the placeholder has no embedding, for its id is past the table.
        """
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        if inputs_embeds is None:
            raise ValueError("Give input_ids, or inputs_embeds: the prompt, with placeholders for its images")
        table = self.get_input_embeddings()
        if self.config.image_token_id >= table.num_embeddings:
            raise ValueError(
                "Placeholders cannot be found in inputs_embeds: their id is past the table. Give input_ids"
            )
        placeholder = table(torch.tensor(self.config.image_token_id, device=inputs_embeds.device))
        return (inputs_embeds == placeholder).all(-1)

    def embed(
        self, input_ids, inputs_embeds, row_index, labels=None, supervised_positions=None, document_ids=None, **images
    ) -> tuple[torch.Tensor, LorgnetteImageFeatures | None]:
        """Token embeddings `(B, S, M)`, with visual tokens at the placeholders; and the features of the images."""
        mask = self.get_placeholder_mask(input_ids, inputs_embeds)
        pictures = images["pixel_values"] if images["vision_features"] is None else images["vision_features"]
        if images["pixel_values"] is not None and images.get("spatial_shapes") is None and pictures.ndim != 4:
            raise ValueError(
                f"pixel_values is {tuple(pictures.shape)}, and (N, 3, H, W) is needed: for one picture (1, 3, H, W)"
            )
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
        features = self.get_image_features(**images)
        visual_tokens = features.pooler_output.to(inputs_embeds)  # (N, Q, M)
        return inputs_embeds.masked_scatter(mask.unsqueeze(-1), visual_tokens), features

    def _unused_bridge(self) -> torch.Tensor:
        """A sum over visual tokens of nothing: a batch without images has to reach every trainable tensor under DDP."""
        nothing = torch.zeros(1, 1, self.config.qformer_config.encoder_hidden_size, device=self.projector.weight.device)
        words = None
        if self.config.qformer_config.use_qformer_text_input:
            words = torch.zeros(1, 1, dtype=torch.long, device=nothing.device)
        return self.get_image_features(vision_features=nothing, qformer_input_ids=words).pooler_output.sum()

    def lm_inputs(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        document_ids: torch.Tensor | None,
        row_index: torch.Tensor | None,
        labels: torch.Tensor | None = None,
        supervised_positions: torch.Tensor | None = None,
        **images: torch.Tensor | None,
    ) -> tuple[dict[str, Any], LorgnetteImageFeatures | None]:
        """What the language model is given, and the features of the images in it; see [`forward`]."""
        features = None
        has_images = images["pixel_values"] is not None or images["vision_features"] is not None
        decoding = cache is not None and input_ids is not None and input_ids.shape[1] == 1
        if has_images or (inputs_embeds is None and not decoding):
            inputs_embeds, features = self.embed(
                input_ids, inputs_embeds, row_index, labels, supervised_positions, document_ids, **images
            )
        elif inputs_embeds is None:  # one more generated token, which is no placeholder
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if self.training and features is None and in_process_group():
            inputs_embeds = inputs_embeds + 0 * self._unused_bridge()
        if labels is not None or self.training:
            check_context(inputs_embeds.shape[1], attention_mask, self.config, row_index, document_ids)
        inputs = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "labels": labels,
            KV_CACHE: cache,
        }
        if document_ids is not None:
            document_ids = check_documents(document_ids, self.language_model, inputs)
            inputs |= packed(self.language_model, document_ids, inputs_embeds, labels) | {"use_cache": False}
        if self.training:
            inputs["use_cache"] = False  # Trainer turns it off in this config, not in the language model's
        return inputs, features

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
    ) -> LorgnetteModelOutputWithPast:
        """The decoder's states, `(B, S, M)`, for a head of the caller's.

        Args:
            input_ids, attention_mask, pixel_values, vision_features, inputs_embeds, document_ids, row_index: see
                [`~LorgnetteForConditionalGeneration.forward`].
            pixel_attention_mask, spatial_shapes, image_rows, qformer_input_ids, qformer_attention_mask: see
                [`get_image_features`].
            supervised_positions, shared_input_ids: of a batch of [`LorgnetteCollator`]'s; all states are computed.
            kwargs: for the decoder.

        Returns:
            [`LorgnetteModelOutputWithPast`].

        Raises:
            ValueError: as in [`~LorgnetteForConditionalGeneration.forward`]; a language model whose decoder is not a
                part of its own.
        """
        decoder = self.language_model.base_model
        if decoder is self.language_model:
            raise ValueError(f"{type(decoder).__name__} has no decoder apart from its head, and so no states to return")
        if self.training:
            self.check_trainable()
        inputs, features = self.lm_inputs(
            input_ids,
            inputs_embeds,
            attention_mask,
            position_ids,
            one_cache(past_key_values, cache),
            document_ids,
            row_index,
            pixel_values=pixel_values,
            vision_features=vision_features,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            image_rows=image_rows,
            qformer_input_ids=qformer_input_ids,
            qformer_attention_mask=qformer_attention_mask,
        )
        del inputs["labels"]
        outputs = decoder(return_dict=True, **inputs | kwargs)
        return LorgnetteModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=getattr(outputs, "hidden_states", None),
            attentions=getattr(outputs, "attentions", None),  # Mamba has none
            image_hidden_states=None if features is None else features.pooler_output,
            image_outputs=features,
            **{KV_CACHE: getattr(outputs, KV_CACHE, None)},
        )


__all__ = ["LorgnetteModel"]
