"""`LorgnetteForImageTextRetrieval`: stage 1, in which the Q-Former learns to see what words can say (BLIP-2, figure 2).

Three losses share one Q-Former; their masks differ:

    queries and `[DEC] text`, the text causal, unseen by the queries ─▶ ITG on the text, ITC on the queries
    `[CLS] text` alone                                               ─▶ ITC on [CLS]
    queries and text, all seen, pairs and hard negatives             ─▶ ITM on the queries

A picture may have several texts: they are positives of each other, and share its queries and its keys and values.

Shapes: T texts, M pictures, L image tokens, E their width, S text tokens, Q queries, D the Q-Former's width, P that of
the space they are compared in.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.models.bert.modeling_bert import BertPredictionHeadTransform
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_lorgnette import LorgnetteQFormerConfig, from_package
from ..configuration.configuration_retrieval import LorgnetteRetrievalConfig
from .modeling_base import LorgnettePreTrainedModel
from .modeling_checks import IGNORED, check_finite
from .modeling_contrastive import (
    TextGroups,
    checked_batch,
    contrastive_loss,
    draw_negatives,
    gather,
    generation_loss,
    group_texts,
    labels_of,
    matching_loss,
    means_over_all,
    pairs_of,
    sigmoid_loss,
    similarities,
)
from .modeling_loading import vision_model_class
from .modeling_loss import supervised
from .modeling_qformer import LorgnetteQFormerModel, pool


START_TEMPERATURE = 0.07  # of the contrast, as in BLIP-2
SIGMOID_START = (math.log(10), -10.0)  # logarithm of the scale, and bias, as in SigLIP
RERANKED = 128  # candidates that ITM looks at, as in BLIP-2's evaluation
Tensors = dict[str, torch.Tensor | None]


@dataclass
class LorgnetteImageTextOutput(ModelOutput):
    """What [`LorgnetteForImageTextRetrieval`] returns.

    Args:
        loss, loss_itc, loss_itm, loss_itg: the weighted sum, and the three; None where not asked for, or of weight 0.
        logits_per_image: `(M, T)` float32, cosines of the pictures and texts of this process; None without ITC.
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
            if config.itc_loss == "sigmoid":
                self.logit_bias = nn.Parameter(torch.tensor(SIGMOID_START[1]))
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
            if self.qformer.pooling is not None:
                self.qformer.pooling.to_outputs.requires_grad_(False)
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
        image_ids: torch.Tensor | None = None,
        row_index: torch.Tensor | None = None,
        return_loss: bool = True,
        **kwargs: Any,
    ) -> LorgnetteImageTextOutput:
        """Compare M pictures and their T texts.

        Args:
            input_ids: `(T, S)`, from the Q-Former's tokenizer: `[CLS] … [SEP]`.
            attention_mask: `(T, S)`; all ones by default.
            pixel_values: `(M, 3, H, W)`; or, in their place, `vision_features` `(M, L, E)`, the ViT's output.
            pixel_attention_mask, spatial_shapes: of SigLIP2's variable resolution.
            image_rows: `(T,)` int64, the picture of each text, where a picture has several; text n's is picture n by
                default.
            image_ids: `(M,)` int64, a number of each picture in its data set: pictures of one number are one, in other
                processes too. Without them each picture is another one.
            row_index: `(T,)` rows of the data set, for error messages alone.
            return_loss: whether the losses are wanted. In eval mode the negatives of ITM are the same at each call.
            kwargs: for the Q-Former.

        Returns:
            [`LorgnetteImageTextOutput`]; a loss of weight 0 is None. ITC and ITM are means over pairs, ITG over tokens,
            of all processes where their losses are averaged.

        Raises:
            ValueError: both or neither of pictures and features, pictures, texts and numbers that do not match, a
                picture without a text, left padding, values that are not finite, one caption or picture for all pairs
                (with ITM, of a process), weights in float16 that train.
        """
        if self.training and return_loss:
            self.check_trainable()
        if (pixel_values is None) == (vision_features is None):
            raise ValueError("Give either pixel_values or vision_features")
        pictures = pixel_values if vision_features is None else vision_features
        shown = pictures if image_rows is None else image_rows
        if len(shown) != len(input_ids) or not len(pictures):
            raise ValueError(
                f"{len(pictures) and len(shown)} pictures and {len(input_ids)} texts: stage 1 learns from pairs"
            )
        for name, numbers, count in (("image_ids", image_ids, len(pictures)), ("row_index", row_index, len(input_ids))):
            if numbers is not None and len(numbers) != count:
                raise ValueError(
                    f"{name} has {len(numbers)} numbers, and the batch {len(pictures)} pictures and {len(input_ids)} "
                    f"texts: it needs {count}"
                )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        contrast, match, generate = self.config.itc_weight, self.config.itm_weight, self.config.itg_weight
        count = size = len(pictures)
        if not return_loss:
            match = generate = 0
        elif self.training and self.config.matching_batch:
            size = min(self.config.matching_batch, count)  # pictures that ITM and ITG learn from
        pad_token_id = self.config.qformer_config.pad_token_id or 0
        ids = input_ids.masked_fill(attention_mask == 0, pad_token_id)
        rows = torch.arange(count, device=ids.device) if image_rows is None else image_rows.long().clamp(0, count - 1)
        candidates = process = matched = None
        if return_loss and (contrast or match):
            pairs = pairs_of(ids, rows, count, image_ids, pad_token_id)
            candidates, process = pairs.candidates, pairs.process * bool(match)  # ITM needs some in each process
            if match and size < count:
                matched = (pairs.process < 0).index_copy(0, pairs.own, rows < size)
        checked = (pictures.detach(), image_rows, candidates, process, matched, row_index)
        attention_mask, numbers = checked_batch(attention_mask, rows, size if return_loss else None, *checked)
        features = vision_features
        if features is None:
            features = self.get_vision_features(pixel_values, pixel_attention_mask, spatial_shapes).last_hidden_state
        text = {"input_ids": ids, "attention_mask": attention_mask}
        losses, counts = {}, {}  # counts: what they are means over
        logits_per_image, hardness = None, torch.zeros(len(ids), len(ids), device=ids.device)
        image_mask, embeds, own_text, own_rows = pixel_attention_mask, None, text, rows
        if size < count and contrast:
            image = {"encoder_hidden_states": features, "encoder_attention_mask": image_mask}
            image_embeds = self._in_chunks(self.embed_images, image, size)
            embeds = image_embeds, self._in_chunks(lambda rows: self.embed_texts(**rows), text, size)
        if size < count:
            kept = rows[:size]
            if image_rows is not None:
                number = numbers[0] if numbers else int((rows < size).sum())
                kept = (rows >= size).long().argsort(stable=True)[:number]
            features, image_mask = features[:size], None if image_mask is None else image_mask[:size]
            own_text, own_rows = take_rows(text, kept), rows[kept]
        own_groups = group_texts(own_rows, size, image_rows is None, numbers and numbers[1:3])
        if match or generate or embeds is None:
            image = {
                "encoder_hidden_states": self.qformer.project_image(features, image_mask),  # once for all passes
                "encoder_attention_mask": image_mask,
            }
        if generate:  # queries do not see a text that is to be generated: ITC reads them too
            queries, written = self._write(image, own_text, own_groups, **kwargs)
        elif contrast and embeds is None:
            queries = self.qformer(**image, **kwargs).last_hidden_state
        if contrast:
            if embeds is None:
                embeds = self._project(queries), self.embed_texts(**text, **kwargs)
            image_embeds, text_embeds = embeds
            logits_per_image = similarities(image_embeds, text_embeds)  # (M, T)
            scale = self.logit_scale.float().exp().clamp(max=self.config.max_logit_scale)
            hardness = (logits_per_image.detach() * scale.detach())[rows]  # (T, T)
            if return_loss:
                to_text = similarities(image_embeds, gather(text_embeds, pairs.texts))  # (M, N)
                to_text = to_text.index_select(0, rows)  # (T, N): a picture counts once a text
                to_image = similarities(gather(image_embeds, pairs.pictures), text_embeds).T
                to_image = to_image.index_select(1, pairs.image_rows)  # (T, N)
                loss_of = partial(contrastive_loss, label_smoothing=self.config.itc_label_smoothing)
                if self.config.itc_loss == "sigmoid":
                    loss_of = partial(sigmoid_loss, logit_bias=self.logit_bias)
                losses["loss_itc"] = 0.5 * (
                    loss_of(to_text, pairs.positives[pairs.own], candidates[pairs.own], logit_scale=scale)
                    + loss_of(to_image, pairs.positives[pairs.own], candidates.T[pairs.own], logit_scale=scale)
                )
                counts["loss_itc"] = len(ids)
        if match:
            own = candidates[pairs.own][:, pairs.own]
            if size < count:
                own, hardness = own[kept][:, kept], hardness[kept][:, kept]
            losses["loss_itm"], counts["loss_itm"] = self._match(image, own_text, hardness, own, own_groups, **kwargs)
        if generate:
            states, targets = supervised(written, *labels_of(**own_text, count=numbers and numbers[3]))
            logits = self.text_head(states, self.get_input_embeddings().weight)  # (R, vocabulary)
            losses["loss_itg"], counts["loss_itg"] = generation_loss(logits, targets), (targets != IGNORED).sum()
        losses = means_over_all(losses, counts)
        weights = {"loss_itc": contrast, "loss_itm": match, "loss_itg": generate}
        loss = sum(weights[name] * value for name, value in losses.items()) if losses else None
        return LorgnetteImageTextOutput(loss=loss, logits_per_image=logits_per_image, **losses)

    def _in_chunks(self, embed: Callable, inputs: Tensors, size: int) -> torch.Tensor:
        """What `embed` makes of so many rows at a time; their activations are made again in the backward pass.

        The gradients are those of all rows at once (GradCache, Gao et al. 2021, section 3), dropout included.
        """
        rows = next(iter(inputs.values()))
        chunks = (
            {name: None if tensor is None else tensor[start : start + size] for name, tensor in inputs.items()}
            for start in range(0, len(rows), size)
        )
        return torch.cat([checkpoint(embed, chunk, use_reentrant=False) for chunk in chunks])

    def _write(
        self, image: Tensors, text: Tensors, groups: TextGroups, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """ITG's pass: states of the pictures' queries, `(M, Q, D)`, and of the texts' tokens, `(T, S, D)`."""
        ids, mask = text["input_ids"].clone(), text["attention_mask"]
        ids[:, 0] = self.config.qformer_config.dec_token_id
        queries, (texts, length) = self.config.num_query_tokens, ids.shape
        size = groups.pictures * groups.most  # each picture's texts, filled up with masked ones
        if groups.most and groups.pictures * queries + size * length < texts * (queries + length):
            places = groups.image_rows * groups.most + groups.rank
            ids, mask = (  # (M, most, S)
                tensor.new_zeros(size, length).index_copy(0, places, tensor).view(groups.pictures, -1, length)
                for tensor in (ids, mask)
            )
            states = self.qformer(**image, input_ids=ids, attention_mask=mask, causal_text=True, **kwargs)
            of_queries, of_texts = states.last_hidden_state.tensor_split([queries], dim=1)
            return of_queries, of_texts.reshape(size, length, -1).index_select(0, places)
        if not groups.in_order:
            image = image | {"image_rows": groups.image_rows}
        states = self.qformer(**image, input_ids=ids, attention_mask=mask, causal_text=True, **kwargs)
        of_queries, of_texts = states.last_hidden_state.tensor_split([queries], dim=1)
        if not groups.in_order:
            of_queries = of_queries.index_select(0, groups.first)
        return of_queries, of_texts

    def _match(
        self,
        image: Tensors,
        text: Tensors,
        hardness: torch.Tensor,
        candidates: torch.Tensor,
        groups: TextGroups,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """ITM, in this process: pairs, each image with a wrong text, each text with a wrong image; how many count."""
        generator = None if self.training else torch.Generator(hardness.device).manual_seed(0)
        has_text, wrong_texts = draw_negatives(hardness, candidates, generator)
        has_image, wrong_images = draw_negatives(hardness.T, candidates.T, generator)
        own, order = torch.arange(len(hardness), device=hardness.device), groups.order
        shown = groups.image_rows[torch.cat([order.repeat_interleave(2), wrong_images])]
        # a picture's rows stand together, and read its keys and values in place; those of drawn pictures copy them
        shared = 2 * groups.fewest * groups.pictures if image["encoder_attention_mask"] is None else 0
        logits = self.match_logits(
            image | {"image_rows": shown, "shared_rows": shared},
            take_rows(text, torch.cat([torch.stack([order, wrong_texts[order]], dim=1).flatten(), own])),
            **kwargs,
        )
        # a pair without a negative has nothing to be told from
        no_text, no_image = (torch.where(has, 0, IGNORED) for has in (has_text[order], has_image))
        matches = torch.cat([torch.stack([torch.ones_like(own), no_text], dim=1).flatten(), no_image])
        return matching_loss(logits, matches), (matches != IGNORED).sum()

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
        """`(N, P)` float32, normalised: texts, as `text_pooling` says. Raises ValueError for a model without ITC."""
        self.require_loss("itc_weight", "pictures and texts have no space in common")
        outputs = self.qformer(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        pooled = outputs.pooler_output
        if self.config.text_pooling == "mean":
            pooled = pool(outputs.last_hidden_state, attention_mask, 1).squeeze(1)
        return nn.functional.normalize(self.text_projection(pooled).float(), dim=-1)

    def require_loss(self, weight: str, consequence: str) -> None:
        if not getattr(self.config, weight):
            raise ValueError(f"This model was trained with {weight} 0: {consequence}")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.config.itc_weight:
            init.constant_(self.logit_scale, -math.log(START_TEMPERATURE))
            if self.config.itc_loss == "sigmoid":
                init.constant_(self.logit_scale, SIGMOID_START[0])
                init.constant_(self.logit_bias, SIGMOID_START[1])
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
