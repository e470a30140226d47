"""A plain stage 1 from transformers' BLIP-2: the baseline for ours.

The layers, embeddings and heads are those of `transformers.Blip2ForImageTextRetrieval`; the head of ITG and the
temperature, which it lacks, and the losses, functions of embeddings and logits, are ours. Two variants:

    reuse      one ViT pass; the text of ITG reuses the keys and values of ITC's queries, as in LAVIS
    separate   each of ITC, ITM and ITG encodes the picture itself: three ViT passes, and no reuse

Shapes: B pairs, Q queries, T text tokens, L image tokens, D the Q-Former's width.
"""

import torch
from torch import nn
from transformers import Blip2ForImageTextRetrieval

from lorgnette import LorgnetteForImageTextRetrieval
from lorgnette.modeling.modeling_contrastive import (
    contrastive_loss,
    draw_negatives,
    generation_loss,
    matching_loss,
    same_caption,
    similarities,
)


class PlainStage1(nn.Module):
    """Args: blip2: its parts are used; ours: source of the parts that BLIP-2 lacks; separate: the variant."""

    def __init__(self, blip2: Blip2ForImageTextRetrieval, ours: LorgnetteForImageTextRetrieval, separate: bool):
        super().__init__()
        self.blip2, self.separate = blip2, separate
        self.text_head = type(ours.text_head)(ours.config.qformer_config)
        self.text_head.load_state_dict(ours.text_head.state_dict())
        self.logit_scale = nn.Parameter(ours.logit_scale.detach().clone())
        self.dec_token_id = ours.config.qformer_config.dec_token_id
        blip2.vision_model.requires_grad_(False)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor,
        image_ids: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """`(B, T)` ids and mask, `(B, 3, H, W)` pictures, to the three losses and their sum.

        `image_ids` `(B,)` say which pictures are the same, and their texts each other's positives; by default none.
        """
        features = self._vision_features(pixel_values)
        queries, kept = self._queries(features, keep=not self.separate)
        image_embeds = nn.functional.normalize(self.blip2.vision_projection(queries).float(), dim=-1)
        cls = self._text(input_ids, attention_mask)[:, 0]
        text_embeds = nn.functional.normalize(self.blip2.text_projection(cls).float(), dim=-1)
        similarity, scale = similarities(image_embeds, text_embeds), self.logit_scale.float().exp().clamp(max=100)
        if image_ids is None:
            image_ids = torch.arange(len(input_ids), device=input_ids.device)
        own = image_ids[:, None] == image_ids
        candidates = own.float() @ same_caption(input_ids).float() == 0  # no caption of the picture is its negative
        losses = {
            "loss_itc": 0.5
            * (
                contrastive_loss(similarity, own, candidates, scale)
                + contrastive_loss(similarity.T, own, candidates, scale)
            )
        }
        hardness = similarity.detach() * scale.detach()
        if self.separate:
            features = self._vision_features(pixel_values)
        losses["loss_itm"] = self._match(features, input_ids, attention_mask, hardness, candidates)
        decoded = input_ids.clone()
        decoded[:, 0] = self.dec_token_id
        if self.separate:
            states = self._causal(self._vision_features(pixel_values), decoded, attention_mask)
        else:
            states = self._continue(kept, decoded, attention_mask)
        predicted = attention_mask[:, 1:] > 0
        logits = self.text_head(states[:, :-1][predicted], self.blip2.get_input_embeddings().weight)
        losses["loss_itg"] = generation_loss(logits, input_ids[:, 1:][predicted])
        return {"loss": sum(losses.values()), **losses}

    def _vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.blip2.vision_model(pixel_values).last_hidden_state  # (B, L, E)

    def _queries(self, features: torch.Tensor, keep: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """States `(B, Q, D)`, and, with `keep`, the keys and values `(B, Q, D)` of each layer, alternately."""
        kept: list[torch.Tensor] = []
        hooks = [
            getattr(layer.attention.attention, name).register_forward_hook(lambda *call: kept.append(call[-1]))
            for layer in self.blip2.qformer.encoder.layer
            for name in ("key", "value")
            if keep
        ]
        queries = self.blip2.query_tokens.expand(len(features), -1, -1)
        states = self.blip2.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        for hook in hooks:
            hook.remove()
        return states, kept

    def _text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """States `(B, T, D)` of a text by itself."""
        embeds = self.blip2.embeddings(input_ids=ids)
        return self.blip2.qformer(query_embeds=embeds, query_length=0, attention_mask=mask).last_hidden_state

    def _both(self, features: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """States `(B, Q + T, D)` of queries and text in one pass; `(B, Q + T)` or `(B, 1, Q + T, Q + T)` mask."""
        queries = self.blip2.query_tokens.expand(len(features), -1, -1)
        return self.blip2.qformer(
            query_embeds=self.blip2.embeddings(input_ids=ids, query_embeds=queries),
            query_length=queries.shape[1],
            attention_mask=mask,
            encoder_hidden_states=features,
        ).last_hidden_state

    def _match(
        self,
        features: torch.Tensor,
        ids: torch.Tensor,
        mask: torch.Tensor,
        hardness: torch.Tensor,
        candidates: torch.Tensor,
    ) -> torch.Tensor:
        """Right pairs, images with wrong texts, texts with wrong images: 3 B rows."""
        generator = None if self.training else torch.Generator(hardness.device).manual_seed(0)
        has_text, wrong_texts = draw_negatives(hardness, candidates, generator)
        has_image, wrong_images = draw_negatives(hardness.T, candidates.T, generator)
        pairs, queries = torch.arange(len(ids), device=ids.device), self.blip2.query_tokens.shape[1]
        of_text = torch.cat([pairs, wrong_texts, pairs])
        states = self._both(
            features[torch.cat([pairs, pairs, wrong_images])],
            ids[of_text],
            nn.functional.pad(mask[of_text], (queries, 0), value=1),
        )
        logits = self.blip2.itm_head(states[:, :queries]).mean(dim=1)
        wrong = 100 * (torch.cat([has_text, has_image]).long() - 1)  # 0, or -100 where there is no negative
        return matching_loss(logits, torch.cat([torch.ones_like(pairs), wrong]))

    def _continue(self, kept: list[torch.Tensor], ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """States `(B, T, D)` of a causal text that attends to the queries' keys and values."""
        qformer, attending = self.blip2.qformer, nn.functional.scaled_dot_product_attention
        states = qformer.dropout(qformer.layernorm(self.blip2.embeddings(input_ids=ids)))
        visible = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril() & (
            mask[:, None] > 0
        )
        visible = nn.functional.pad(visible, (kept[0].shape[1], 0), value=True)[:, None]  # (B, 1, T, Q + T)
        for layer, keys, values in zip(qformer.encoder.layer, kept[::2], kept[1::2], strict=True):
            attention = layer.attention.attention
            query, key, value = (
                part.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)  # (B, heads, T or Q + T, ·)
                for part in (
                    attention.query(states),
                    torch.cat([keys, attention.key(states)], dim=1),
                    torch.cat([values, attention.value(states)], dim=1),
                )
            )
            dropout = attention.attention_dropout if self.training else 0.0
            attended = attending(query, key, value, attn_mask=visible, dropout_p=dropout).transpose(1, 2).flatten(2)
            states = layer.feed_forward_chunk(layer.attention.output(attended, states))
        return states

    def _causal(self, features: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The same in one pass with the queries, which do not attend to the text."""
        queries = self.blip2.query_tokens.shape[1]
        length = queries + ids.shape[1]
        visible = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        visible[:, :queries] = True
        visible = visible & nn.functional.pad(mask > 0, (queries, 0), value=True)[:, None]
        return self._both(features, ids, visible[:, None])[:, queries:]
