"""`LorgnetteModel`: pictures and text to the hidden states of a language model's decoder, without its head.

The data flow (BLIP-2, Li et al. 2023, figure 3, decoder-only):

    pixel_values (N, 3, H, W) ─ vision_model, frozen ─▶ vision features (N, L, E) ─ qformer ─▶ (N, Q, D) ─ projector ─▶
    visual tokens (N, Q, M), which replace the `<image>` placeholders among token embeddings (B, S, M) ─ language_model

Shapes: B rows, N images of the whole batch in the order of their placeholders, S tokens, Q queries, M the LM's width.
"""

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, Unpack

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    BaseModelOutputWithPoolingAndCrossAttentions,
)
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_lorgnette import LorgnetteConfig, from_package
from .modeling_base import KV_CACHE, LorgnettePreTrainedModel
from .modeling_checks import check_context, checked_placeholders
from .modeling_loading import vision_model_class
from .modeling_lora import attach_lora, check_loaded_lora, disabled_lora, switch_lora
from .modeling_loss import in_process_group
from .modeling_qformer import LorgnetteQFormerModel


# What [`~LorgnetteModel.get_image_features`] makes visual tokens of
IMAGE_INPUTS = (
    *("pixel_values", "vision_features", "pixel_attention_mask", "spatial_shapes", "image_rows"),
    *("qformer_input_ids", "qformer_attention_mask", "num_query_tokens"),
)


@dataclass
class LorgnetteImageFeatures(BaseModelOutputWithPooling):
    """The ViT's output, with vision features `(N, L, E)` as its last hidden state, and the Q-Former's.

    `pooler_output` `(N, Q, M)` are the visual tokens, as the language model reads them.
    """

    qformer_outputs: BaseModelOutputWithPoolingAndCrossAttentions | None = None


@dataclass
class LorgnetteModelOutputWithPast(BaseModelOutputWithPast):
    """`BaseModelOutputWithPast` of the decoder; of images the visual tokens `(N, Q, M)` and how they were made."""

    image_hidden_states: torch.Tensor | None = None
    image_outputs: LorgnetteImageFeatures | None = None


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache that was given, by either name; a ValueError where both are."""
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names of one thing, and both were given")
    if past_key_values is not None and KV_CACHE == "cache":
        warnings.warn("`past_key_values` is deprecated in transformers 5.24: it is `cache` there", FutureWarning, 3)
    return past_key_values if cache is None else cache


def states_of(outputs: Any, features: LorgnetteImageFeatures | None) -> dict[str, Any]:
    """The fields of outputs besides logits and loss, of a decoder or a causal LM that may lack some (Mamba does)."""
    return {
        "hidden_states": getattr(outputs, "hidden_states", None),
        "attentions": getattr(outputs, "attentions", None),
        "image_hidden_states": None if features is None else features.pooler_output,
        "image_outputs": features,
        KV_CACHE: getattr(outputs, KV_CACHE, None),
    }


class LorgnetteModel(LorgnettePreTrainedModel):
    """[`LorgnetteForConditionalGeneration`] without its head, as `LlavaModel` is to LLaVA: what `AutoModel` loads.

    Its `language_model` is the whole causal LM, of which `forward` runs the decoder: it can `generate` too.

    Args:
        config: [`LorgnetteConfig`].
        vision_model, language_model: loaded backbones whose configs are those in `config`; made anew where left out.
    """

    config: LorgnetteConfig
    config_class = LorgnetteConfig
    main_input_name = "input_ids"
    backbones = ("language_model", "vision_model")
    head_class: ClassVar[type[PreTrainedModel]]  # set by `modeling_lorgnette.py`, which builds on this class

    def __init__(
        self,
        config: LorgnetteConfig,
        vision_model: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        config.query_count()  # keywords of `from_pretrained` have changed the config since it was checked
        # ahead of the ViT: transformers' common tests want the first checkpointed layer to be one that trains
        self.qformer = LorgnetteQFormerModel._from_config(config.qformer_config)
        if vision_model is None:
            vision_model = vision_model_class(config.vision_config)._from_config(config.vision_config)
        self.vision_model = vision_model
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.language_model = language_model
        self.projector = nn.Linear(config.qformer_config.hidden_size, self.get_input_embeddings().embedding_dim)
        if config.lora_config is not None:
            attach_lora(self.language_model, config.lora_config)
        self.generation_config = self.language_model.generation_config
        self.post_init()
        self.freeze()

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

    def _finish_loading(self, missing: set[str], unexpected: set[str]) -> None:
        check_loaded_lora(self, missing, unexpected)
        LorgnettePreTrainedModel._finish_loading(self, missing, unexpected)  # by name: the class with a head borrows it

    @property
    def max_text_length(self) -> int | None:
        """Tokens the LM has positions for, the placeholders' included; None where its config does not say."""
        return getattr(self.config.text_config, "max_position_embeddings", None)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    # transformers resizes the table and the head together, and asks whichever model it is called on for both
    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def enable_adapters(self) -> None:
        """Answer with LoRA again. Raises a ValueError where the model has none."""
        switch_lora(self.language_model, True)

    def disable_adapters(self) -> None:
        """Answer as the original language model does. Raises a ValueError where there is no LoRA."""
        switch_lora(self.language_model, False)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Within the block the language model is the original one; after it, what it was before."""
        return disabled_lora(self.language_model)

    def add_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: transformers would freeze the Q-Former, and save the adapter alone."""
        raise ValueError("An adapter on the whole model is saved without the Q-Former: give from_backbones(lora=…)")

    load_adapter = add_adapter

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
        num_query_tokens: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LorgnetteImageFeatures:
        """Pictures to visual tokens `(N, Q, M)`, the `pooler_output`.

        Args:
            pixel_values: `(N, 3, H, W)`; or, in their place, `vision_features` `(N, L, E)`, the ViT's output.
            image_rows: `(N,)` int64, which picture each image is, where several are one: there are fewer pictures then.
            pixel_attention_mask, spatial_shapes: of SigLIP2's variable resolution.
            qformer_input_ids, qformer_attention_mask: `(N, T)` instruction for the Q-Former, one an image.
            num_query_tokens: Q, the first so many queries alone; the config's by default.
            kwargs: `output_attentions`, `output_hidden_states` of the ViT and of the Q-Former.
        """
        if (pixel_values is None) == (vision_features is None):
            raise ValueError("Give either pixel_values or vision_features")
        if self.config.qformer_config.use_qformer_text_input and qformer_input_ids is None:
            raise ValueError("This Q-Former reads the instruction as well: give qformer_input_ids (and its mask)")
        vision = BaseModelOutput(vision_features)
        if vision_features is None:
            vision = self.get_vision_features(pixel_values, pixel_attention_mask, spatial_shapes, **kwargs)
        count = self.config.query_count(num_query_tokens)
        outputs = self.qformer(
            vision.last_hidden_state,
            num_query_tokens=count,
            encoder_attention_mask=pixel_attention_mask,
            input_ids=qformer_input_ids,
            attention_mask=qformer_attention_mask,
            image_rows=image_rows,
            **kwargs,
        )
        queries = outputs.last_hidden_state[:, :count]  # (N, Q, D)
        return LorgnetteImageFeatures(
            last_hidden_state=vision.last_hidden_state,
            pooler_output=self.projector(queries),
            hidden_states=vision.hidden_states,
            attentions=vision.attentions,
            qformer_outputs=outputs,
        )

    def get_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`(B, S)`, True at the `<image>` placeholders; found by their embedding where there are no ids."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        if inputs_embeds is None:
            raise ValueError("Give input_ids, or inputs_embeds: the prompt, with placeholders for its images")
        table = self.get_input_embeddings()
        if self.config.image_token_id >= table.num_embeddings:
            raise ValueError("Placeholders cannot be found in inputs_embeds, as their id is past the table")
        placeholder = table(torch.tensor(self.config.image_token_id, device=inputs_embeds.device))
        return (inputs_embeds == placeholder).all(-1)

    def _zero_visual_tokens(self) -> torch.Tensor:
        """The sum of visual tokens of zeros: under DDP a batch without images has to reach every trainable tensor."""
        zeros = torch.zeros(1, 1, self.config.qformer_config.encoder_hidden_size, device=self.projector.weight.device)
        text = None
        if self.config.qformer_config.use_qformer_text_input:
            text = torch.zeros(1, 1, dtype=torch.long, device=zeros.device)
        return self.get_image_features(vision_features=zeros, qformer_input_ids=text).pooler_output.sum()

    def lm_inputs(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        images: Mapping[str, torch.Tensor | None],
        row_index: torch.Tensor | None,
        sequence_ids: torch.Tensor | None,
        text_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        supervised_positions: torch.Tensor | None = None,
        shared_input_ids: torch.Tensor | None = None,
    ) -> tuple[dict[str, Any], LorgnetteImageFeatures | None]:
        """The language model's inputs, and the features of the images in them; see [`forward`]."""
        features, pictures = None, images["vision_features"]
        if pictures is None:
            pictures, shapes = images["pixel_values"], images["spatial_shapes"]
            if pictures is not None and pictures.ndim != 4 and shapes is None:
                raise ValueError(f"pixel_values is {tuple(pictures.shape)}, and (N, 3, H, W) is needed")
        decoding = cache is not None and input_ids is not None and input_ids.shape[1] == 1
        rows = (row_index, labels, supervised_positions, sequence_ids, text_ids, shared_input_ids, input_ids)
        numbers = (self.config.query_count(images["num_query_tokens"]), self.config.image_token_id)
        shown = (None if pictures is None else pictures.detach(), images["image_rows"])
        others = (*shown, *rows, attention_mask, *numbers, self.max_text_length or 0)
        if pictures is not None or (inputs_embeds is None and not decoding):
            mask = checked_placeholders(self.get_placeholder_mask(input_ids, inputs_embeds), *others)
            if inputs_embeds is None:  # the placeholder's id may be past the end of the table
                inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(mask, 0))
            if pictures is not None:
                features = self.get_image_features(**images)
                visual_tokens = features.pooler_output.to(inputs_embeds)  # (N, Q, M)
                inputs_embeds = inputs_embeds.masked_scatter(mask.unsqueeze(-1), visual_tokens)
        elif inputs_embeds is None:  # one more generated token, which is no placeholder
            inputs_embeds = self.get_input_embeddings()(input_ids)
        elif sequence_ids is not None or shared_input_ids is not None:  # nothing but these is checked
            nowhere = checked_placeholders(inputs_embeds.new_zeros(inputs_embeds.shape[:2], dtype=torch.bool), *others)
            inputs_embeds = inputs_embeds.masked_fill(nowhere.unsqueeze(-1), 0)
        if self.training and features is None and in_process_group():
            inputs_embeds = inputs_embeds + 0 * self._zero_visual_tokens()
        is_packed = sequence_ids is not None or text_ids is not None
        if not is_packed and (labels is not None or self.training):
            check_context(inputs_embeds.shape[1], attention_mask, self.config, row_index)
        inputs = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": position_ids}
        inputs |= {"labels": labels, KV_CACHE: cache}
        if is_packed:
            packing = from_package("assembly.packing", "A batch with sequence_ids")
            inputs |= packing.pack(self.language_model, sequence_ids, text_ids, inputs)
        if is_packed or self.training:
            inputs["use_cache"] = False  # Trainer turns it off in this config, not in the language model's
        return inputs, features

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        sequence_ids: torch.Tensor | None = None,
        text_ids: torch.Tensor | None = None,
        supervised_positions: torch.Tensor | None = None,
        shared_input_ids: torch.Tensor | None = None,
        row_index: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> LorgnetteModelOutputWithPast:
        """The decoder's hidden states, `(B, S, M)`; for the rest see [`~LorgnetteForConditionalGeneration.forward`]."""
        decoder = self.language_model.base_model
        if decoder is self.language_model:
            raise ValueError(f"{type(decoder).__name__} has no decoder apart from its head, and so no states to return")
        if self.training:
            self.check_trainable()
        images = {name: kwargs.pop(name, None) for name in IMAGE_INPUTS} | {"pixel_values": pixel_values}
        tokens = (input_ids, inputs_embeds, attention_mask, position_ids, one_cache(past_key_values, cache))
        inputs, features = self.lm_inputs(*tokens, images, row_index, sequence_ids, text_ids)
        del inputs["labels"]
        outputs = decoder(return_dict=True, **inputs | kwargs)
        return LorgnetteModelOutputWithPast(outputs.last_hidden_state, **states_of(outputs, features))
