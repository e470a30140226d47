"""`LorgnetteForImageTextRetrieval`: stage 1, in which the Q-Former learns to see what words can say (BLIP-2, figure 2).

Three losses share one Q-Former; their masks differ:

    queries and `[DEC] text`, the text causal, unseen by the queries ─▶ ITG on the text, ITC on the queries
    `[CLS] text` alone                                               ─▶ ITC on [CLS]
    queries and text, all seen, pairs and hard negatives             ─▶ ITM on the queries

Shapes: B pairs, L image tokens, E their width, T text tokens, Q queries, D the Q-Former's width, P the shared space's.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.models.bert.modeling_bert import BertPredictionHeadTransform
from transformers.utils import ModelOutput, logging
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
from .modeling_loading import vision_model_class
from .modeling_loss import supervised
from .modeling_qformer import LorgnetteQFormerModel


START_TEMPERATURE = 0.07  # of the contrast, as in BLIP-2
MAX_LOGIT_SCALE = 100.0  # CLIP (Radford et al. 2021, section 2.5): beyond it training is not stable
RERANKED = 128  # candidates that ITM looks at, as in BLIP-2's evaluation
Tensors = dict[str, torch.Tensor | None]


@value_check
def checked_texts(
    attention_mask: torch.Tensor,
    pictures: torch.Tensor,
    image_rows: torch.Tensor | None,
    row_index: torch.Tensor | None,
) -> torch.Tensor:
    """The mask `(B, T)` of texts that are padded on the right alone, beside pictures `(N, …)` that are finite."""
    check_finite(pictures, None, row_index, image_rows)
    left = attention_mask[:, 0] == 0
    if left.any():
        row = row_name(int(left.nonzero()[0]), row_index)
        raise ValueError(f"{row} is padded on the left: a text begins with its [CLS]")
    return attention_mask.clone()


@value_check
def checked_candidates(candidates: torch.Tensor, row_index: torch.Tensor | None) -> torch.Tensor:
    """`(N, N)` bool, which texts are negatives of which pairs: some are."""
    if not candidates.any():
        alike = f"and the {len(candidates) - 1} others of its batch have the same caption (larger batches may help)"
        alone = "is alone in its batch (dataloader_drop_last leaves such a last one out)"
        what = alone if len(candidates) == 1 else alike
        raise ValueError(f"{row_name(0, row_index)} {what}: there are no negatives to tell it from")
    return candidates.clone()


@dataclass
class LorgnetteImageTextOutput(ModelOutput):
    """What [`LorgnetteForImageTextRetrieval`] returns.

    Args:
        loss, loss_itc, loss_itm, loss_itg: the weighted sum, and the three; None where not asked for, or of weight 0.
        logits_per_image: `(B, B)` float32, cosines of the pictures and texts of this process; None without ITC.
    """

    loss: torch.Tensor | None = None
    loss_itc: torch.Tensor | None = None
    loss_itm: torch.Tensor | None = None
    loss_itg: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None


class LorgnetteTextHead(BertPredictionHeadTransform):
    """Predicts a token from a text state, through the word embeddings, as BERT's head does."""

    def __init__(self, config: LorgnetteQFormerConfig):
        super().__init__(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: torch.Tensor, word_embeddings: torch.Tensor) -> torch.Tensor:
        """`(R, D)` states and the `(vocabulary, D)` table to `(R, vocabulary)` logits."""
        return nn.functional.linear(super().forward(hidden_states), word_embeddings, self.bias)


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
        if vision_model is None:
            vision_model = vision_model_class(config.vision_config)._from_config(config.vision_config)
        self.vision_model = vision_model
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

    def freeze(self) -> None:
        super().freeze()
        config, idle = self.config, []  # of the last layer, what no loss reads
        if not (config.itc_weight or config.itg_weight):  # ITM reads queries alone
            idle += ["intermediate", "output"]
        if not (config.itc_weight or config.itm_weight):  # ITG reads text alone
            idle += ["intermediate_query", "output_query", "crossattention"]
        for name, part in self.qformer.encoder.layer[-1].named_children():
            if name in idle:
                part.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        return self.qformer.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.qformer.set_input_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refused: head and `[DEC]` depend on the vocabulary. Raises NotImplementedError."""
        raise NotImplementedError("Stage 1 has the vocabulary of its BERT: resize the BERT, then build from it")

    @property
    def max_text_length(self) -> int:
        """Tokens the Q-Former has positions for."""
        return self.config.qformer_config.max_position_embeddings

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
            image_rows: `(B,)` int64, which of fewer pictures goes with each text, where several texts share one.
            row_index: `(B,)` rows of the data set, for error messages alone.
            return_loss: whether the losses are wanted. In eval mode the negatives of ITM are the same at each call.
            kwargs: for the Q-Former.

        Returns:
            [`LorgnetteImageTextOutput`]; a loss of weight 0 is None.

        Raises:
            ValueError: both or neither of pictures and features, not as many as texts, left padding, values that are
                not finite, one caption for all pairs, processes of unequal batches, weights in float16 that train.
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
        features = vision_features
        if features is None:
            features = self.get_vision_features(pixel_values, pixel_attention_mask, spatial_shapes).last_hidden_state
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
        if return_loss and (contrast or match):
            candidates, own = self._candidates(ids, row_index)

        losses: dict[str, torch.Tensor] = {}
        logits_per_image, hardness = None, torch.zeros(len(ids), len(ids), device=ids.device)
        if contrast or generate:
            written = {}
            if generate:  # queries do not see a text that is to be generated: ITC reads them too
                begun = ids.clone()
                begun[:, 0] = self.config.qformer_config.dec_token_id
                written = text | {"input_ids": begun, "causal_text": True}
            states = self.qformer(**image, **written, **kwargs).last_hidden_state
        if contrast:
            image_embeds, text_embeds = self._project(states), self.embed_texts(**text, **kwargs)
            logits_per_image = similarities(image_embeds, text_embeds)  # (B, B)
            scale = self.logit_scale.float().exp().clamp(max=MAX_LOGIT_SCALE)
            hardness = logits_per_image.detach() * scale.detach()
            if return_loss:
                to_text = similarities(image_embeds, gather(text_embeds))  # (B, N)
                to_image = similarities(gather(image_embeds), text_embeds).T  # (B, N)
                both = [contrastive_loss(each, own, candidates, scale) for each in (to_text, to_image)]
                losses["loss_itc"] = 0.5 * sum(both)
        if match:
            losses["loss_itm"] = self._match(image, text, hardness, candidates[:, own], **kwargs)
        if generate:
            labels = input_ids.masked_fill(attention_mask == 0, IGNORED)
            states, targets = supervised(states[:, self.config.num_query_tokens :], labels)
            logits = self.text_head(states, self.get_input_embeddings().weight)  # (R, vocabulary)
            losses["loss_itg"] = generation_loss(logits, targets)
        weights = {"loss_itc": contrast, "loss_itm": match, "loss_itg": generate}
        loss = sum(weights[name] * value for name, value in losses.items()) if losses else None
        return LorgnetteImageTextOutput(loss=loss, logits_per_image=logits_per_image, **losses)

    def _candidates(self, ids: torch.Tensor, row_index: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, N)` bool, which texts of all processes are negatives of a pair, and `(B,)`, which is its own."""
        own = torch.arange(len(ids), device=ids.device)
        if processes() > 1:
            sizes = gather(torch.tensor([len(ids)], device=ids.device)).tolist()
            if set(sizes) != {len(ids)}:
                raise ValueError(f"The processes' batches differ in size ({sizes}): set dataloader_drop_last")
            if self.config.itm_weight and len(ids) == 1:
                raise ValueError(
                    f"Each of {len(sizes)} processes has a batch of one pair, and matching (ITM) finds no negatives "
                    "in it: make per_device_train_batch_size 2 or more, or itm_weight 0"
                )
            # texts of one length, whatever the process
            pad_token_id = self.config.qformer_config.pad_token_id or 0
            ids = nn.functional.pad(ids, (0, self.max_text_length - ids.shape[1]), value=pad_token_id)
            own = own + torch.distributed.get_rank() * len(ids)
        return checked_candidates(~same_caption(gather(ids)), row_index)[own], own

    def _match(
        self, image: Tensors, text: Tensors, hardness: torch.Tensor, candidates: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """ITM, within this process: pairs, each image with a wrong text, each text with a wrong image."""
        generator = None if self.training else torch.Generator(hardness.device).manual_seed(0)
        has_text, wrong_texts = draw_negatives(hardness, candidates, generator)
        has_image, wrong_images = draw_negatives(hardness.T, candidates.T, generator)
        own = torch.arange(len(hardness), device=hardness.device)
        shown = own if image["image_rows"] is None else image["image_rows"]
        logits = self.match_logits(
            image | {"image_rows": shown[torch.cat([own, own, wrong_images])]},
            take_rows(text, torch.cat([own, wrong_texts, own])),
            **kwargs,
        )
        # a pair without a negative has nothing to be told from
        wrong = torch.where(torch.cat([has_text, has_image]), 0, IGNORED)
        return matching_loss(logits, torch.cat([torch.ones_like(own), wrong]))

    def match_logits(self, image: Tensors, text: Tensors, **kwargs: Any) -> torch.Tensor:
        """`(R, 2)`: no match, match; the mean over the queries, which see image and text."""
        states = self.qformer(**image, **text, **kwargs).last_hidden_state
        return self.itm_head(states[:, : self.config.num_query_tokens]).mean(dim=1)

    @torch.no_grad()
    def retrieve(
        self,
        images: Iterable[Any] | torch.Tensor,
        texts: Iterable[str],
        *,
        rerank: bool | int = False,
        processor: Any = None,
        batch_size: int = 32,
    ) -> torch.Tensor:
        """How well each text fits each picture, by ITC, re-ranked by ITM (BLIP-2, section 4.4). Sort along either axis.

        Args:
            images: M pictures, of any kind that [`LorgnetteProcessor`] takes; or the ViT's features, `(M, L, E)`.
            texts: N strings. Of both, iterators are read to their ends.
            rerank: let ITM score the best pairs: of each picture its nearest texts and of each text its nearest
                pictures, 128 each as in BLIP-2 (appendix), or this number. They come before all other pairs.
            processor: by default the one that the model was joined with or loaded beside.
            batch_size: pictures, texts or pairs at a time.

        Returns:
            `(M, N)` float32 on the CPU: cosines, from -1 to 1; where re-ranked, 2 + the cosine + ITM's probability.

        Raises:
            TypeError: one string, picture or dict in place of a list of them.
            ValueError: nothing to compare; no ITC, or, to re-rank, no ITM; no processor, or one that does not fit.
        """
        images, texts = _listed("images", images), list(_listed("texts", texts))
        if rerank:
            self.require_loss("itm_weight", "nothing can re-rank")
        if len(images) == 0 or len(texts) == 0:
            raise ValueError(f"{len(images)} images and {len(texts)} texts: there is nothing to compare")
        processor = self._known_processor() if processor is None else processor
        self.check_processor(processor)
        was_training = self.training
        self.eval()  # in the middle of training, too
        try:
            return self._scores(images, texts, RERANKED if rerank is True else int(rerank), processor, batch_size)
        finally:
            self.train(was_training)

    def _scores(self, images: Any, texts: list[str], rerank: int, processor: Any, batch_size: int) -> torch.Tensor:
        words = processor(text=texts, padding=True, return_tensors="pt").to(self.device)
        batches = _batches(len(texts), batch_size, "texts")
        text_embeds = torch.cat([self.embed_texts(**take_rows(words, rows)) for rows in batches])
        scores, kept = [], []
        for rows in _batches(len(images), batch_size, "images"):
            if isinstance(images, torch.Tensor):
                pictures = features = images[rows].to(self.device)
                mask = None
            else:
                inputs = processor(images=[images[row] for row in rows], return_tensors="pt").to(self.device)
                pictures, mask = inputs["pixel_values"], inputs.get("pixel_attention_mask")
                features = self.get_vision_features(pictures, mask, inputs.get("spatial_shapes")).last_hidden_state
            check_finite(pictures, None, None)
            image = {"encoder_hidden_states": features}
            if mask is not None:
                image["encoder_attention_mask"] = mask
            scores.append(similarities(self.embed_images(image), text_embeds))
            if rerank:
                kept.append({name: tensor.cpu() for name, tensor in image.items()})  # they may be many
        scores = torch.cat(scores)
        if rerank:
            pairs = _best_pairs(scores, rerank)  # (R, 2)
            stored = {name: torch.cat([part[name] for part in kept]) for name in kept[0]}
            for rows in _batches(len(pairs), batch_size, "pairs"):
                at = pairs[rows].T
                image = {name: tensor.to(self.device) for name, tensor in take_rows(stored, at[0].cpu()).items()}
                logits = self.match_logits(image, take_rows(words, at[1]))
                scores[at[0], at[1]] += 2 + logits.float().softmax(dim=-1)[:, 1]
        return scores.cpu()

    def embed_images(self, image: Tensors) -> torch.Tensor:
        """`(M, Q, P)` float32, normalised: of `encoder_hidden_states` `(M, L, E)` and `encoder_attention_mask`."""
        return self._project(self.qformer(**image).last_hidden_state)

    def _project(self, states: torch.Tensor) -> torch.Tensor:
        queries = states[:, : self.config.num_query_tokens]
        return nn.functional.normalize(self.vision_projection(queries).float(), dim=-1)

    def embed_texts(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        """`(N, P)` float32, normalised: texts, by their `[CLS]`. Raises ValueError for a model without ITC."""
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


def _listed(name: str, given: Any) -> Any:
    """What has a length and is looked up by position; iterators are read into a list."""
    if isinstance(given, str):
        raise TypeError(f"{name} is one string ({given[:100]!r}); a list is needed")
    if isinstance(given, (bytes, bytearray, Mapping)) or not (isinstance(given, Iterable) or hasattr(given, "__len__")):
        raise TypeError(f"{name} is a {type(given).__name__}; a list is needed")
    if hasattr(given, "iloc"):  # pandas looks up by label
        return given.tolist()
    return given if hasattr(given, "__len__") and hasattr(given, "__getitem__") else list(given)


def take_rows(tensors: Mapping[str, torch.Tensor], rows: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: tensor[rows] for name, tensor in tensors.items()}


def _batches(count: int, size: int, unit: str) -> Iterator[torch.Tensor]:
    rows = torch.arange(count).split(size)
    return iter(logging.tqdm(rows, desc=f"reading {unit}", disable=None if len(rows) > 1 else True))


def _best_pairs(scores: torch.Tensor, count: int) -> torch.Tensor:
    """`(R, 2)`: rows and columns of the `count` highest scores in each row and in each column."""
    best = torch.zeros_like(scores, dtype=torch.bool)
    best.scatter_(1, scores.topk(min(count, scores.shape[1]), dim=1).indices, True)
    best.scatter_(0, scores.topk(min(count, scores.shape[0]), dim=0).indices, True)
    return best.nonzero()
