"""`LorgnetteForImageTextRetrieval`: stage 1, in which the Q-Former learns to see what words can say (BLIP-2, figure 2).

Three losses share one Q-Former; their masks differ:

    queries and `[DEC] text`, the text causal, unseen by the queries ─▶ ITG on the text, ITC on the queries
    `[CLS] text` alone                                               ─▶ ITC on [CLS]
    queries and text, all seen, pairs and hard negatives             ─▶ ITM on the queries

Since the queries of the first pass do not see the text, ITC and ITG share it. There is no language model here; stage 2
takes the Q-Former over: `LorgnetteForConditionalGeneration.from_backbones(…, qformer=folder)`.

Shapes: B pairs, L image tokens, E their width, T text tokens, Q queries, D the Q-Former's width, P the shared space's.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_lorgnette import LorgnetteQFormerConfig, from_package
from ..configuration.configuration_retrieval import LorgnetteRetrievalConfig
from .modeling_base import LorgnettePreTrainedModel
from .modeling_checks import IGNORED, check_finite, row_name, value_check
from .modeling_contrastive import (
    contrastive_loss,
    draw_negatives,
    gather,
    generation_loss,
    matching_loss,
    processes,
    same_caption,
    similarities,
)
from .modeling_loading import new_vision_model
from .modeling_loss import in_process_group, supervised
from .modeling_qformer import LorgnetteQFormerModel
from .modeling_ranking import retrieve, take_rows


START_TEMPERATURE = 0.07  # of the contrast, as in BLIP-2
MAX_LOGIT_SCALE = 100.0  # CLIP (Radford et al. 2021, section 2.5): beyond it training is not stable


@value_check
def checked_texts(
    attention_mask: torch.Tensor,
    pictures: torch.Tensor,
    image_rows: torch.Tensor | None,
    row_index: torch.Tensor | None,
) -> torch.Tensor:
    """The mask `(B, T)` of texts that are padded on the right alone, beside pictures `(N, …)` that are finite.

    Raises:
        ValueError: names the row.
    """
    check_finite(pictures, None, row_index, image_rows)
    left = attention_mask[:, 0] == 0
    if left.any():
        raise ValueError(
            f"{row_name(int(left.nonzero()[0]), row_index)} is padded on the left: a text begins with its [CLS]"
        )
    return attention_mask.clone()


@value_check
def checked_candidates(candidates: torch.Tensor, row_index: torch.Tensor | None) -> torch.Tensor:
    """`(N, N)` bool, which texts are negatives of which pairs: some are.

    Raises:
        ValueError: none is.
    """
    if len(candidates) == 1:
        raise ValueError(
            f"{row_name(0, row_index)} is alone in its batch: there are no negatives to tell it from. "
            "dataloader_drop_last leaves out such a last batch"
        )
    if not candidates.any():
        raise ValueError(
            f"{row_name(0, row_index)} and the {len(candidates) - 1} others of its batch have the same "
            "caption: there are no negatives to tell them from. Larger batches may help"
        )
    return candidates.clone()


@dataclass
class LorgnetteImageTextOutput(ModelOutput):
    """What [`LorgnetteForImageTextRetrieval`] returns.

    Args:
        loss: the weighted sum of the three, where they were asked for.
        loss_itc, loss_itm, loss_itg: scalars; None where the weight is 0.
        logits_per_image: `(B, B)` float32, cosines of the pictures and texts of this process; None without ITC.
    """

    loss: torch.Tensor | None = None
    loss_itc: torch.Tensor | None = None
    loss_itm: torch.Tensor | None = None
    loss_itg: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None


class LorgnetteTextHead(nn.Module):
    """Predicts a token from a text state, through the word embeddings, as BERT's head does."""

    def __init__(self, config: LorgnetteQFormerConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: torch.Tensor, word_embeddings: torch.Tensor) -> torch.Tensor:
        """`(R, D)` states and the `(vocabulary, D)` table to `(R, vocabulary)` logits."""
        hidden_states = self.LayerNorm(self.activation(self.dense(hidden_states)))
        return nn.functional.linear(hidden_states, word_embeddings, self.bias)


class LorgnetteForImageTextRetrieval(LorgnettePreTrainedModel):
    """A frozen ViT and a Q-Former with its text half: stage 1, and retrieval.

    Build it with [`from_backbones`] or [`from_blip2`], load it with `from_pretrained`. The heads are named as in
    `transformers.Blip2ForImageTextRetrieval`; a loss of weight 0 has none.

    Args:
        config: [`LorgnetteRetrievalConfig`].
        vision_model: a loaded ViT whose config is the one in `config`; made anew where left out.
    """

    config: LorgnetteRetrievalConfig
    config_class = LorgnetteRetrievalConfig
    main_input_name = "input_ids"
    accepts_loss_kwargs = False  # Trainer divides the loss by the accumulated steps: it is a mean over pairs

    def __init__(self, config: LorgnetteRetrievalConfig, vision_model: PreTrainedModel | None = None):
        super().__init__(config)
        width = config.qformer_config.hidden_size
        self.qformer = LorgnetteQFormerModel._from_config(config.qformer_config)
        self.vision_model = vision_model if vision_model is not None else new_vision_model(config.vision_config)
        if config.itc_weight:
            self.vision_projection = nn.Linear(width, config.image_text_hidden_size)
            self.text_projection = nn.Linear(width, config.image_text_hidden_size)
            self.logit_scale = nn.Parameter(torch.tensor(-math.log(START_TEMPERATURE)))  # one over it, as CLIP has it
        if config.itm_weight:
            self.itm_head = nn.Linear(width, 2)
        if config.itg_weight:
            self.text_head = LorgnetteTextHead(config.qformer_config)
        self.post_init()
        self.freeze()

    @classmethod
    def from_backbones(cls, vision: str | Path | PreTrainedModel, **kwargs: Any) -> "LorgnetteForImageTextRetrieval":
        """Join a ViT and a Q-Former: see [`~lorgnette.assembly.assemble.assemble_stage1`] for the keywords."""
        return from_package("assembly.assemble", "from_backbones").assemble_stage1(cls, vision, **kwargs)

    @classmethod
    def from_blip2(cls, source: str | Path | PreTrainedModel, **kwargs: Any) -> "LorgnetteForImageTextRetrieval":
        """A `transformers.Blip2ForImageTextRetrieval`: see [`~lorgnette.assembly.blip2.convert_retrieval`]."""
        return from_package("assembly.blip2", "from_blip2").convert_retrieval(cls, source, **kwargs)

    def check_processor(self, processor: Any) -> None:
        """Check that a processor makes this model's inputs.

        Raises:
            ValueError: it is one of stage 2, or of another number of queries; its tokenizer has more tokens than the
                Q-Former, or uses the id of `[DEC]`.
        """
        if not processor.is_stage1:
            raise ValueError("This is no stage-1 processor: make one with text=None and qformer= (the Q-Former's BERT)")
        if processor.num_query_tokens != self.config.num_query_tokens:
            raise ValueError(
                f"The model's num_query_tokens is {self.config.num_query_tokens}, the processor's "
                f"{processor.num_query_tokens}: they do not belong together"
            )
        config, tokens = self.config.qformer_config, len(processor.qformer_tokenizer)
        room = config.vocab_size if config.dec_token_id is None else config.dec_token_id
        if tokens > room and processor.qformer_tokenizer.convert_tokens_to_ids("[DEC]") != config.dec_token_id:
            raise ValueError(f"The Q-Former has room for {room} tokens; the processor's qformer_tokenizer has {tokens}")

    def freeze(self) -> None:
        super().freeze()
        config, last = self.config, self.qformer.encoder.layer[-1]
        if not (config.itc_weight or config.itg_weight):  # ITM reads queries alone: the text's last step is for nothing
            _freeze(last.intermediate, last.output)
        if not (config.itc_weight or config.itm_weight):  # ITG reads text alone
            _freeze(
                last.intermediate_query, last.output_query, *([last.crossattention] if last.has_cross_attention else [])
            )

    def get_input_embeddings(self) -> nn.Module:
        return self.qformer.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.qformer.set_input_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refused: head and `[DEC]` hang on the vocabulary. Raises NotImplementedError."""
        raise NotImplementedError(
            "The vocabulary of stage 1 is that of its Q-Former's start: resize the BERT, then build from it"
        )

    @property
    def max_text_length(self) -> int:
        """Tokens the Q-Former has positions for."""
        return self.config.qformer_config.max_position_embeddings

    # ------------------------------------------------------------------------------------------------ learning

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        image_rows: torch.Tensor | None = None,
        row_index: torch.Tensor | None = None,
        return_loss: bool = True,
        **kwargs: Any,
    ) -> LorgnetteImageTextOutput:
        """Compare B pictures and their B texts.

        Args:
            input_ids: `(B, T)`, from the Q-Former's tokenizer: `[CLS] … [SEP]`.
            attention_mask: `(B, T)`; all ones by default.
            pixel_values: `(B, 3, H, W)`; or, in their place, `vision_features` `(B, L, E)`, the ViT's output.
            pixel_attention_mask, spatial_shapes: of SigLIP2's variable resolution.
            image_rows: `(B,)` int64, which picture goes with each text, where several texts have one: there are fewer
                pictures than texts then.
            row_index: `(B,)` rows of the data set, for error messages alone.
            return_loss: whether the losses are wanted. In eval mode the negatives of ITM are the same at each call.
            kwargs: for the Q-Former.

        Returns:
            [`LorgnetteImageTextOutput`]; a loss of weight 0 is None.

        Raises:
            ValueError: both or neither of pictures and features, not as many as texts, texts padded on the left, values
                that are not finite, one caption for all pairs, a pair by itself, processes of unequal batches, weights
                in float16 that train.
        """
        if self.training and return_loss:
            self.check_trainable()
        if (pixel_values is None) == (vision_features is None):
            raise ValueError("Give either pixel_values or vision_features")
        pictures = pixel_values if vision_features is None else vision_features
        shown = pictures if image_rows is None else image_rows
        if len(shown) != len(input_ids):
            raise ValueError(f"{len(shown)} pictures and {len(input_ids)} texts: stage 1 learns from pairs")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        attention_mask = checked_texts(attention_mask, pictures.detach(), image_rows, row_index)
        features = self.vision_features_of(pixel_values, vision_features, pixel_attention_mask, spatial_shapes)
        ids = input_ids.masked_fill(attention_mask == 0, self.config.qformer_config.pad_token_id or 0)
        image = {
            "encoder_hidden_states": self.qformer.project_image(features),  # once for the passes of all losses
            "encoder_attention_mask": pixel_attention_mask,
            "image_rows": image_rows,
        }
        text = {"input_ids": ids, "attention_mask": attention_mask}
        contrast, match, generate = self.config.itc_weight, self.config.itm_weight, self.config.itg_weight
        if not return_loss:
            match = generate = 0
        candidates = self._candidates(ids, row_index) if return_loss and (contrast or match) else None  # (B, N)

        losses: dict[str, torch.Tensor] = {}
        logits_per_image, hardness = None, torch.zeros(len(ids), len(ids), device=ids.device)
        if contrast or generate:
            queries, states = self._encode(image, text if generate else None, **kwargs)
        if contrast:
            image_embeds, text_embeds = self._project(queries), self.embed_texts(ids, attention_mask, **kwargs)
            logits_per_image, scale = similarities(image_embeds, text_embeds), self._scale()  # (B, B)
            hardness = logits_per_image.detach() * scale.detach()
            if return_loss:
                losses["loss_itc"] = self._contrast(image_embeds, text_embeds, candidates, scale)
        if match:
            losses["loss_itm"] = self._match(image, text, hardness, candidates, **kwargs)
        if generate:
            states, targets = supervised(states, input_ids.masked_fill(attention_mask == 0, IGNORED))
            logits = self.text_head(states, self.get_input_embeddings().weight)  # (R, vocabulary)
            losses["loss_itg"] = generation_loss(logits, targets)
        weights = {"loss_itc": contrast, "loss_itm": match, "loss_itg": generate}
        loss = sum(weights[name] * value for name, value in losses.items()) if losses else None
        return LorgnetteImageTextOutput(loss=loss, logits_per_image=logits_per_image, **losses)

    def vision_features_of(
        self,
        pixel_values: torch.Tensor | None,
        vision_features: torch.Tensor | None,
        pixel_attention_mask: torch.Tensor | None,
        spatial_shapes: torch.Tensor | None,
    ) -> torch.Tensor:
        if vision_features is not None:
            return vision_features
        return self.get_vision_features(pixel_values, pixel_attention_mask, spatial_shapes).last_hidden_state

    def _encode(
        self, image: dict[str, torch.Tensor], text: dict[str, torch.Tensor] | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries `(B, Q, D)` that have seen the image alone, and states `(B, T, D)` of a text that is generated."""
        if text is not None:
            ids = text["input_ids"].clone()
            ids[:, 0] = self.config.qformer_config.dec_token_id
            text = {"input_ids": ids, "attention_mask": text["attention_mask"], "causal_text": True}
        states = self.qformer(**image, **(text or {}), **kwargs).last_hidden_state
        return states.split([self.config.num_query_tokens, states.shape[1] - self.config.num_query_tokens], dim=1)

    def _scale(self) -> torch.Tensor:
        return self.logit_scale.float().exp().clamp(max=MAX_LOGIT_SCALE)

    def _project(self, queries: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.vision_projection(queries).float(), dim=-1)

    def _candidates(self, ids: torch.Tensor, row_index: torch.Tensor | None) -> torch.Tensor:
        """`(B, N)` bool: which texts of all processes are negatives of this process' pairs.

        Raises:
            ValueError: none is.
        """
        if processes() > 1:
            sizes = gather(torch.tensor([len(ids)], device=ids.device))
            if (sizes != len(ids)).any():
                raise ValueError(
                    f"The processes' batches differ in size ({sizes.tolist()}): negatives are taken from all of them. "
                    "Set dataloader_drop_last"
                )
            if self.config.itm_weight and len(ids) == 1:
                raise ValueError(
                    f"Each of {len(sizes)} processes has a batch of one pair, and matching (ITM) takes its negatives "
                    "from a process' own batch: make per_device_train_batch_size 2 or more, or itm_weight 0"
                )
            # texts of one length, whatever the process
            pad_token_id = self.config.qformer_config.pad_token_id or 0
            ids = nn.functional.pad(ids, (0, self.max_text_length - ids.shape[1]), value=pad_token_id)
        return checked_candidates(~same_caption(gather(ids)), row_index)[self._own_columns(len(ids))]

    def _own_columns(self, batch_size: int) -> slice:
        rank = torch.distributed.get_rank() if in_process_group() else 0
        return slice(rank * batch_size, (rank + 1) * batch_size)

    def _contrast(
        self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, candidates: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        """ITC: both directions, against the texts and the images of all processes."""
        own = self._own_columns(len(image_embeds))
        targets = torch.arange(own.start, own.stop, device=image_embeds.device)
        to_text = similarities(image_embeds, gather(text_embeds))  # (B, N)
        to_image = similarities(gather(image_embeds), text_embeds).T  # (B, N)
        return 0.5 * (
            contrastive_loss(to_text, targets, candidates, scale)
            + contrastive_loss(to_image, targets, candidates, scale)
        )

    def _match(
        self,
        image: dict[str, torch.Tensor],
        text: dict[str, torch.Tensor],
        hardness: torch.Tensor,
        candidates: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        """ITM, within this process: pairs, each image with a wrong text, each text with a wrong image."""
        pairs = len(hardness)
        candidates = candidates[:, self._own_columns(pairs)]  # (B, B)
        generator = None if self.training else torch.Generator(hardness.device).manual_seed(0)
        has_text, wrong_texts = draw_negatives(hardness, candidates, generator)
        has_image, wrong_images = draw_negatives(hardness.T, candidates.T, generator)
        own = torch.arange(pairs, device=hardness.device)
        shown = own if image["image_rows"] is None else image["image_rows"]
        logits = self.match_logits(
            image | {"image_rows": shown[torch.cat([own, own, wrong_images])]},
            take_rows(text, torch.cat([own, wrong_texts, own])),
            **kwargs,
        )
        # a pair without a negative has nothing to be told from
        wrong = torch.cat([has_text, has_image]).long() - 1  # 0, or -1
        return matching_loss(logits, torch.cat([torch.ones_like(own), -IGNORED * wrong]))

    def match_logits(
        self, image: dict[str, torch.Tensor], text: dict[str, torch.Tensor], **kwargs: Any
    ) -> torch.Tensor:
        """`(R, 2)`: no match, match; the mean over the queries, which see image and text."""
        states = self.qformer(**image, **text, **kwargs).last_hidden_state
        return self.itm_head(states[:, : self.config.num_query_tokens]).mean(dim=1)

    # ------------------------------------------------------------------------------------------------ retrieving

    def retrieve(self, images: Any, texts: Any, **kwargs: Any) -> torch.Tensor:
        """`(M, N)` scores of M pictures and N texts: see [`~modeling_ranking.retrieve`]."""
        return retrieve(self, images, texts, **kwargs)

    def embed_images(self, image: dict[str, torch.Tensor | None]) -> torch.Tensor:
        """`(M, Q, P)` float32, normalised: pictures, by their queries, in the space that they share with texts.

        Args:
            image: `encoder_hidden_states` `(M, L, E)` and `encoder_attention_mask` for the Q-Former.
        """
        queries, _ = self._encode(image, None)
        return self._project(queries)

    def embed_texts(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """`(N, P)` float32, normalised: texts, by their `[CLS]`, in the space that they share with pictures.

        Raises:
            ValueError: a model without ITC.
        """
        self.require_loss("itc_weight", "pictures and texts have no space in common")
        cls = self.qformer(input_ids=input_ids, attention_mask=attention_mask, **kwargs).pooler_output
        return nn.functional.normalize(self.text_projection(cls).float(), dim=-1)

    def require_loss(self, weight: str, consequence: str) -> None:
        if not getattr(self.config, weight):
            raise ValueError(f"This model was trained with {weight} 0: {consequence}")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.config.itc_weight:
            init.constant_(self.logit_scale, -math.log(START_TEMPERATURE))
        elif isinstance(module, LorgnetteTextHead):
            init.zeros_(module.bias)


def _freeze(*modules: nn.Module) -> None:
    for module in modules:
        module.requires_grad_(False)


__all__ = ["LorgnetteForImageTextRetrieval", "LorgnetteImageTextOutput"]
