"""`LorgnetteForConditionalGeneration`: head, loss and `generate` over the decoder's states of `modeling_headless.py`.

Shapes: B rows, N images of the whole batch in the order of their placeholders, S tokens, Q queries, M the LM's width.
"""

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Unpack

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_lorgnette import IN_PACKAGE, LorgnetteConfig, from_package
from .modeling_base import LorgnettePreTrainedModel
from .modeling_checks import IGNORED, check_decoding, check_prompts, setting_of
from .modeling_headless import IMAGE_INPUTS, LorgnetteImageFeatures, LorgnetteModel, one_cache, states_of
from .modeling_loss import LorgnetteLossOutput, can_supervise, supervised_loss


logger = logging.get_logger(__name__)


@dataclass
class LorgnetteCausalLMOutputWithPast(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` of the LM; of images the visual tokens `(N, Q, M)` and how they were made."""

    image_hidden_states: torch.Tensor | None = None
    image_outputs: LorgnetteImageFeatures | None = None

    def __getitem__(self, key: Any) -> Any:
        value = super().__getitem__(key)
        if key == "logits" and IN_PACKAGE and not torch.compiler.is_compiling():
            smoothing = from_package("assembly.label_smoothing", "")
            smoothing.check_label_smoother(sys._getframe(1).f_locals, value.shape[-1])
        return value


class LorgnetteForConditionalGeneration(LorgnettePreTrainedModel, GenerationMixin):
    """A causal LM that reads pictures: stage 2, and use. Only the Q-Former, the projector and LoRA train.

    Args:
        config: [`LorgnetteConfig`].
        vision_model, language_model: loaded backbones whose configs are those in `config`; made anew where left out.
        headless: a model to put the head on, in place of the two.
    """

    config: LorgnetteConfig
    config_class = LorgnetteConfig
    main_input_name = "input_ids"
    backbones = ("language_model", "vision_model")
    active_bridge: str = "default"  # the adapter set in use
    _idle_bridges: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        config: LorgnetteConfig,
        vision_model: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
        *,
        headless: LorgnetteModel | None = None,
    ):
        super().__init__(config)
        headless = headless or LorgnetteModel(config, vision_model, language_model)
        self.__dict__["_headless"] = headless  # and no submodule: the parts and their keys are this model's own
        self._modules, self.training = headless._modules, headless.training
        self.generation_config = headless.generation_config
        self.register_forward_pre_hook(_ignore_placeholder_labels, with_kwargs=True)
        self.post_init()

    @classmethod
    def from_backbones(
        cls, vision: str | Path | PreTrainedModel, text: str | Path | PreTrainedModel, **kwargs: Any
    ) -> "LorgnetteForConditionalGeneration":
        """Join pretrained parts: see [`~lorgnette.assembly.assemble.assemble`] for the keywords."""
        return from_package("assembly.assemble", "from_backbones").assemble(cls, vision, text, **kwargs)

    @classmethod
    def from_blip2(cls, source: str | Path | PreTrainedModel, **kwargs: Any) -> "LorgnetteForConditionalGeneration":
        """A `transformers.Blip2ForConditionalGeneration`: see [`~lorgnette.assembly.blip2.convert_generation`]."""
        return from_package("assembly.blip2", "from_blip2").convert_generation(cls, source, **kwargs)

    @property
    def base_model(self) -> LorgnetteModel:
        """The model without its head, of the same parts: trainers that compute a loss of their own run it."""
        return self._headless

    def train(self, mode: bool = True) -> "LorgnetteForConditionalGeneration":
        self._headless.training = mode
        return super().train(mode)

    # the functions of the model without its head, for the same parts
    get_input_embeddings = LorgnetteModel.get_input_embeddings
    set_input_embeddings = LorgnetteModel.set_input_embeddings
    get_output_embeddings = LorgnetteModel.get_output_embeddings
    set_output_embeddings = LorgnetteModel.set_output_embeddings
    get_decoder = LorgnetteModel.get_decoder
    max_text_length = LorgnetteModel.max_text_length
    enable_adapters = LorgnetteModel.enable_adapters
    disable_adapters = LorgnetteModel.disable_adapters
    disable_adapter = LorgnetteModel.disable_adapter
    add_adapter = load_adapter = LorgnetteModel.add_adapter
    _finish_loading = LorgnetteModel._finish_loading
    get_image_features = LorgnetteModel.get_image_features
    get_placeholder_mask = LorgnetteModel.get_placeholder_mask

    def load_lm_adapter(self, source: str | Path, **kwargs: Any) -> None:
        """Replace LoRA by one of peft's: see [`~lorgnette.assembly.foreign_adapters.load_lm_adapter`]."""
        from_package("assembly.foreign_adapters", "load_lm_adapter").load_lm_adapter(self, source, **kwargs)

    @property
    def bridges(self) -> list[str]:
        """The names of all adapter sets, the one in use (`active_bridge`) among them."""
        return sorted([self.active_bridge, *self._idle_bridges])

    def load_bridge(self, source: str | Path, name: str, **kwargs: Any) -> None:
        """Add an adapter set of another saved model: see [`~lorgnette.assembly.adapter_sets.load_bridge`]."""
        from_package("assembly.adapter_sets", "load_bridge").load_bridge(self, source, name, **kwargs)

    def set_bridge(self, name: str) -> None:
        """Use another adapter set: see [`~lorgnette.assembly.adapter_sets.set_bridge`]."""
        if name != self.active_bridge:
            from_package("assembly.adapter_sets", "set_bridge").set_bridge(self, name)

    def adopt_processor(self, processor: Any) -> None:
        """Save this processor with the model, and end answers where it says; raises what [`check_processor`] does."""
        self.check_processor(processor)
        self._processor = processor
        # a base LM knows no end of a turn, which the chat template of a processor may have
        known = self.generation_config.eos_token_id or []
        known = known if isinstance(known, list) else [known]
        self.generation_config.eos_token_id = sorted({*known, *processor.stop_token_ids})
        self.generation_config.pad_token_id = processor.tokenizer.pad_token_id

    def _get_name(self) -> str:
        """A causal LM's: where Trainer smooths labels, it shifts them for models of these names alone."""
        return "LlamaForCausalLM"

    def __repr__(self) -> str:
        return super().__repr__().replace(self._get_name(), type(self).__name__, 1)

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
        sequence_ids: torch.Tensor | None = None,
        text_ids: torch.Tensor | None = None,
        supervised_positions: torch.Tensor | None = None,
        shared_input_ids: torch.Tensor | None = None,
        row_index: torch.Tensor | None = None,
        num_query_tokens: int | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LorgnetteCausalLMOutputWithPast | LorgnetteLossOutput:
        """Predict the next tokens.

        Args:
            input_ids: `(B, S)` with `num_query_tokens` placeholders for each image; or `inputs_embeds` `(B, S, M)`.
            pixel_values: `(N, 3, H, W)`, the images of all rows in the order of their placeholders; or, in their place,
                `vision_features` `(N, L, E)`, the ViT's output. For the other inputs of images see
                [`get_image_features`].
            labels: `(B, S)`, -100 where nothing is to be learned.
            sequence_ids: `(B, S)` int64, of several sequences packed into a row: the one that each token belongs to,
                numbered from 0 through the batch, and -1 for padding; in place of `attention_mask` and `position_ids`.
            text_ids: `(B, S)` int64, of sequences with several texts for one prompt: 0 at the prompt except its last
                token, n at text n, which begins with that token again.
            supervised_positions: `(K,)` int64, where in `labels`, flat, those are that are not -100; 0 for padding.
                Without them the head of a compiled model computes all positions in training.
            shared_input_ids: `(B, P)`, the first tokens of `input_ids` where they are the same in all rows: in training
                the language model runs them once. The loss is the same without.
            num_query_tokens: placeholders an image, and queries, where they are fewer than the config's.
            row_index: `(B,)` rows of the data set, or `(D,)` of D packed sequences, for error messages alone.
            kwargs: for the language model (`use_cache`, `num_items_in_batch`, `output_attentions` …).

        Returns:
            `logits` `(B, S, vocabulary)`; in training with `labels` [`LorgnetteLossOutput`], which has none, unless
            `logits_to_keep` asks for some (0 for all).

        Raises:
            ValueError: with the row, for placeholders and images that do not match, labels on placeholders and pictures
                that are not finite. Sequences that the language model cannot separate; float16 weights that train.
            ImportError: `sequence_ids`, `shared_input_ids` or `supervised_positions`, and the package is not installed.
        """
        # Trainer keeps the labels, and counts them, where it computes the loss itself
        if self.training and (labels is not None or kwargs.get("num_items_in_batch") is not None):
            self.check_trainable()
        image_inputs = (pixel_values, vision_features, pixel_attention_mask, spatial_shapes, image_rows)
        image_inputs += (qformer_input_ids, qformer_attention_mask, num_query_tokens)
        images = dict(zip(IMAGE_INPUTS, image_inputs))  # noqa: B905 (compiled)
        tokens = (input_ids, inputs_embeds, attention_mask, position_ids, one_cache(past_key_values, cache))
        shared = shared_input_ids if self.training and labels is not None and input_ids is not None else None
        learned = (row_index, sequence_ids, text_ids, labels, supervised_positions, shared)
        inputs, features = self._headless.lm_inputs(*tokens, images, *learned)
        lm_forward = self.language_model
        if self.training and labels is not None and can_supervise(self.language_model, kwargs):
            if inputs["labels"].shape != labels.shape:  # FlashAttention's packed rows are one
                supervised_positions = None
            lm_forward = partial(supervised_loss, self.language_model, supervised_positions=supervised_positions)
            if shared is not None:
                prefix = from_package("assembly.shared_prefix", "A batch with shared_input_ids")
                inputs |= prefix.shared_inputs(self.language_model, inputs | kwargs, shared.shape[1])
        outputs = lm_forward(return_dict=True, **inputs | kwargs)
        states = states_of(outputs, features)
        if outputs.logits is None:
            kept = ("hidden_states", "attentions", "image_hidden_states")
            return LorgnetteLossOutput(loss=outputs.loss, **{name: states[name] for name in kept})
        return LorgnetteCausalLMOutputWithPast(loss=outputs.loss, logits=outputs.logits, **states)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `GenerationMixin.generate`: prompt and continuation, `(B, S + new)`.

        Each image is encoded once, and so are, with the package, the tokens that all rows begin with: see
        [`~lorgnette.assembly.prompt_cache.prefilled`]. Placeholders are not generated, nor seen by logits processors.

        A batch with `labels`, as `Seq2SeqTrainer(predict_with_generate=True)` gives it, is cut to its prompts, which
        are padded on the left: S is their width. Images without `input_ids` are asked the processor's own query.

        Raises:
            ValueError: as in `forward`; prompts padded on the right, labels that are not one answer at the end of each
                row; images with a way of decoding that reads token ids alone; images alone, and no processor known.
        """
        images = {name: kwargs.pop(name, None) for name in IMAGE_INPUTS}
        input_ids = inputs if input_ids is None else input_ids
        if kwargs.get("labels") is not None:
            training = from_package("assembly.training_prompts", "generate with labels")
            input_ids, kwargs = training.prompts_of(input_ids, kwargs, self.generation_config.pad_token_id)
        check_prompts(kwargs)
        if input_ids is not None and input_ids.is_floating_point():
            given = f"{input_ids.dtype} {tuple(input_ids.shape)}"
            raise ValueError(f"generate was given {given} in the place of input_ids: pictures go in as pixel_values=…")
        configs = (generation_config, self.generation_config)
        has_images = images["pixel_values"] is not None or images["vision_features"] is not None
        check_decoding(has_images or kwargs.get("inputs_embeds") is not None, kwargs, *configs)
        if setting_of("stop_strings", kwargs, *configs) and kwargs.get("tokenizer") is None:
            kwargs["tokenizer"] = self._known_processor("give its tokenizer=, which stop_strings need").tokenizer
        if has_images:
            if input_ids is None and kwargs.get("inputs_embeds") is None:
                if (mask := kwargs.get("attention_mask")) is not None:
                    given = f"attention_mask {tuple(mask.shape)}"
                    raise ValueError(f"{given} was given without the input_ids that it is for: give both")
                input_ids, own = self._own_prompts(images)
                images |= own
            tokens = (input_ids, kwargs.get("inputs_embeds"), None, None, None)
            inputs, _ = self._headless.lm_inputs(*tokens, images, kwargs.pop("row_index", None), None)
            kwargs["inputs_embeds"] = inputs["inputs_embeds"]
            if IN_PACKAGE and tokens[1] is None:
                kwargs |= from_package("assembly.prompt_cache", "").prefilled(self, input_ids, kwargs, *configs)
        folding = from_package("assembly.lora_folding", "").for_generation if IN_PACKAGE else nullcontext
        with folding(self.language_model):
            return super().generate(input_ids, generation_config, **kwargs)

    def _own_prompts(self, images: dict[str, torch.Tensor | None]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`(N, S)`, the processor's own query about each of N images; and the same for a Q-Former that reads it."""
        what = "give input_ids with the images' placeholders, or the model its processor: adopt_processor(…)"
        processor = self._known_processor(what)
        self.check_processor(processor)
        sources = ("image_rows", "vision_features", "pixel_values")
        shown = next(images[name] for name in sources if images[name] is not None)
        prompt, _ = processor.encode_example(None)
        text = {}
        if self.config.qformer_config.use_qformer_text_input and images["qformer_input_ids"] is None:
            encoded = processor.encode_for_qformer([processor.query] * len(shown), return_tensors="pt")
            text = {f"qformer_{name}": encoded[name].to(self.device) for name in ("input_ids", "attention_mask")}
        return torch.tensor([prompt] * len(shown), device=self.device), text

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The language model's own: it knows its cache, positions and masks."""
        inputs = self.language_model.prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if inputs.get("logits_to_keep") == 1 and inputs.get("inputs_embeds") is not None:
            # an index copies the last states; of a view of them torch multiplies each row with a frozen head by itself
            inputs["logits_to_keep"] = torch.tensor([-1], device=inputs["inputs_embeds"].device)
        return inputs

    def _supports_default_dynamic_cache(self) -> bool:
        return self.language_model._supports_default_dynamic_cache()

    def _supports_logits_to_keep(self) -> bool:
        return self.language_model._supports_logits_to_keep()  # then `generate` needs the prompt's last logits alone

    def _get_logits_processor(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        # no public hook lets a model wrap the processors that a caller gives
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        return ImageTokenLogitsProcessor(processors, self.config.image_token_id, not generation_config.output_logits)


LorgnetteModel.head_class = LorgnetteForConditionalGeneration


class ImageTokenLogitsProcessor(LogitsProcessorList):
    """Logits processors that see, in the place of placeholders, a token that the row has anyway; none is generated."""

    def __init__(self, processors: LogitsProcessorList, image_token_id: int, in_place: bool = False):
        super().__init__(processors)
        self.image_token_id, self.in_place = image_token_id, in_place

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """`input_ids` `(B, S)`, `scores` `(B, vocabulary)`; returns scores."""
        if len(self) > 0 and input_ids.shape[1] > 0:
            placeholders = input_ids == self.image_token_id
            present = input_ids.masked_fill(placeholders, 0).amax(dim=1, keepdim=True)
            input_ids = torch.where(placeholders, present, input_ids)
        if self.image_token_id < scores.shape[-1]:
            scores = scores if self.in_place else scores.clone()  # of the whole vocabulary, for each token
            scores[:, self.image_token_id] = -torch.inf
        return super().__call__(input_ids, scores, **kwargs)


def _ignore_placeholder_labels(
    model: LorgnetteForConditionalGeneration, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Leave labels on placeholders out where TRL computes the loss from states: it labels all of a row of messages.

    Raises a ValueError where such a call, in training, measures alone: then the loss was computed with these labels.
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
            "compute_loss_func): give rows of prompt and completion, or LorgnetteCollator as data_collator"
        )
    logger.warning_once(f"{where}: they are left out of the loss, and not of the trainer's count, by which it divides")
    return args, kwargs | {"labels": labels.masked_fill(labelled, IGNORED)}
