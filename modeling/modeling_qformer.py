"""The Q-Former of BLIP-2 (Li et al. 2023, section 3.1): learned queries that read an image through cross-attention.

- queries and text share self-attention; each has its own feed-forward; only queries look at the image
- parameter names and outputs are those of `transformers.Blip2QFormerModel` (`models/blip_2/modeling_blip_2.py`), plus
  `query_tokens` and, with a text half, `embeddings` (there: `Blip2TextEmbeddings`)
- runs in the model's own dtype, through `ALL_ATTENTION_FUNCTIONS` (eager, sdpa, FlashAttention, flex)

Shapes: B images, Q queries, T text tokens, L image tokens, D width, E width of the image features.
"""

from collections.abc import Callable
from typing import Unpack

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import TransformersKwargs
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..configuration.configuration_lorgnette import LorgnetteQFormerConfig, from_package


KeysAndValues = tuple[torch.Tensor, torch.Tensor]


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,  # (B, heads, Q, D / heads)
    key: torch.Tensor,  # (B, heads, L, D / heads)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # (B, 1, Q, L), added to the scores
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention with the signature of `ALL_ATTENTION_FUNCTIONS`; the one that returns its weights."""
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class LorgnetteQFormerMultiHeadAttention(nn.Module):
    def __init__(self, config: LorgnetteQFormerConfig, source_size: int):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(source_size, config.hidden_size)
        self.value = nn.Linear(source_size, config.hidden_size)

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:  # (B, N, D) -> (B, heads, N, D / heads)
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def project(self, source: torch.Tensor) -> KeysAndValues:
        """`(B, L, D or E)` to keys and values, `(B, heads, L, D / heads)` each."""
        return self.split_heads(self.key(source)), self.split_heads(self.value(source))

    def forward(
        self,
        hidden_states: torch.Tensor,
        source: torch.Tensor | KeysAndValues,
        attention_mask: torch.Tensor | None,
        source_rows: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        keys, values = self.project(source) if isinstance(source, torch.Tensor) else source
        if source_rows is not None:  # a source that several rows look at is projected once
            keys, values = (_rows(x, source_rows) for x in (keys, values))
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attention(
            self,
            self.split_heads(self.query(hidden_states)),
            keys,
            values,
            attention_mask,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return output.reshape(*output.shape[:2], -1), weights  # (B, Q, D), (B, heads, Q, L)


def _rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`x[rows]` of `(N, heads, L, D / heads)`.

    Its gradients are added up a row at a time, each one block of memory: on a CPU in a third of the time of indexing's.
    """
    return x.transpose(1, 2).index_select(0, rows).transpose(1, 2)


class LorgnetteQFormerSelfAttention(LorgnetteQFormerMultiHeadAttention):
    def __init__(self, config: LorgnetteQFormerConfig):
        super().__init__(config, source_size=config.hidden_size)


class LorgnetteQFormerCrossAttention(LorgnetteQFormerMultiHeadAttention):
    def __init__(self, config: LorgnetteQFormerConfig):
        super().__init__(config, source_size=config.encoder_hidden_size)


class LorgnetteQFormerOutput(nn.Module):
    """Dense, dropout, residual, LayerNorm: BERT's post-norm ending of attention and of feed-forward."""

    def __init__(self, config: LorgnetteQFormerConfig, input_size: int):
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + residual)


class LorgnetteQFormerAttention(nn.Module):
    def __init__(self, config: LorgnetteQFormerConfig, attention: type[LorgnetteQFormerMultiHeadAttention]):
        super().__init__()
        self.attention = attention(config)
        self.output = LorgnetteQFormerOutput(config, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, source: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs
    ) -> torch.Tensor:
        attended, _ = self.attention(hidden_states, source, attention_mask, **kwargs)
        return self.output(attended, hidden_states)


class LorgnetteQFormerIntermediate(nn.Module):
    def __init__(self, config: LorgnetteQFormerConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.activation(self.dense(hidden_states))


class LorgnetteQFormerLayer(GradientCheckpointingLayer):
    def __init__(self, config: LorgnetteQFormerConfig, layer_idx: int):
        super().__init__()
        self.attention = LorgnetteQFormerAttention(config, LorgnetteQFormerSelfAttention)
        self.has_cross_attention = layer_idx % config.cross_attention_frequency == 0
        if self.has_cross_attention:
            self.crossattention = LorgnetteQFormerAttention(config, LorgnetteQFormerCrossAttention)
        if config.use_qformer_text_input:
            self.intermediate = LorgnetteQFormerIntermediate(config)
            self.output = LorgnetteQFormerOutput(config, config.intermediate_size)
        self.intermediate_query = LorgnetteQFormerIntermediate(config)
        self.output_query = LorgnetteQFormerOutput(config, config.intermediate_size)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, Q + T, D)
        encoder_hidden_states: torch.Tensor | KeysAndValues | None,  # (B, L, E); None where there are no queries
        attention_mask: torch.Tensor | None,
        encoder_attention_mask: torch.Tensor | None,
        query_length: int,
        image_rows: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        hidden_states = self.attention(hidden_states, hidden_states, attention_mask, **kwargs)
        queries, text = hidden_states[:, :query_length], hidden_states[:, query_length:]
        if query_length > 0:
            if self.has_cross_attention:
                queries = self.crossattention(
                    queries, encoder_hidden_states, encoder_attention_mask, source_rows=image_rows, **kwargs
                )
            queries = self.output_query(self.intermediate_query(queries), queries)
        if text.shape[1] > 0:
            text = self.output(self.intermediate(text), text)
        return torch.cat([queries, text], dim=1)


class LorgnetteQFormerEncoder(nn.Module):
    def __init__(self, config: LorgnetteQFormerConfig):
        super().__init__()
        self.layer = nn.ModuleList(LorgnetteQFormerLayer(config, i) for i in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | list[KeysAndValues | None] | None,
        *args,
        **kwargs,
    ) -> torch.Tensor:
        for number, layer in enumerate(self.layer):
            projected = isinstance(encoder_hidden_states, list)
            source = encoder_hidden_states[number] if projected else encoder_hidden_states
            hidden_states = layer(hidden_states, source, *args, **kwargs)
        return hidden_states


class LorgnetteQFormerEmbeddings(nn.Module):
    """Word and position embeddings of the text half; the LayerNorm after them is shared with the queries."""

    def __init__(self, config: LorgnetteQFormerConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:  # (B, T) -> (B, T, D)
        length, longest = input_ids.shape[1], self.position_embeddings.num_embeddings
        if length > longest:
            raise ValueError(f"The Q-Former's text has {length} tokens; it has positions for {longest}")
        return self.word_embeddings(input_ids) + self.position_embeddings.weight[:length]


class LorgnetteQFormerModel(PreTrainedModel):
    """Q learned queries in, Q vectors that describe the image out.

    Args:
        config: [`LorgnetteQFormerConfig`] whose `encoder_hidden_size` is set. With `num_query_tokens` the model owns
            its queries; without, each call brings `query_embeds`.

    Raises:
        ValueError: `encoder_hidden_size` is not set.
    """

    config: LorgnetteQFormerConfig
    config_class = LorgnetteQFormerConfig
    base_model_prefix = "qformer"
    main_input_name = "encoder_hidden_states"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["LorgnetteQFormerLayer"]  # noqa: RUF012 (transformers' own class attribute)
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": LorgnetteQFormerLayer,
        "attentions": OutputRecorder(LorgnetteQFormerSelfAttention, index=1),
        "cross_attentions": OutputRecorder(LorgnetteQFormerCrossAttention, index=1),
    }

    def __init__(self, config: LorgnetteQFormerConfig):
        super().__init__(config)
        if config.encoder_hidden_size is None:
            raise ValueError("LorgnetteQFormerConfig.encoder_hidden_size is not set: give the ViT's hidden_size")
        self.query_tokens = None
        if config.num_query_tokens is not None:
            self.query_tokens = nn.Embedding(config.num_query_tokens, config.hidden_size)
        if config.use_qformer_text_input:
            self.embeddings = LorgnetteQFormerEmbeddings(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.encoder = LorgnetteQFormerEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding | None:
        """The text half's word embeddings; `None` where there is no text half."""
        return self.embeddings.word_embeddings if self.config.use_qformer_text_input else None

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.word_embeddings = value

    def project_image(self, encoder_hidden_states: torch.Tensor) -> list[KeysAndValues | None]:
        """Keys and values of images, for each layer that looks at them.

        They do not depend on what looks: several passes over the same images can share them.

        Args:
            encoder_hidden_states: `(N, L, E)` image features.

        Raises:
            ValueError: features of another width.
        """
        self._check_width(encoder_hidden_states)
        features = encoder_hidden_states.to(self.layernorm.weight)
        return [
            layer.crossattention.attention.project(features) if layer.has_cross_attention else None
            for layer in self.encoder.layer
        ]

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        encoder_hidden_states: torch.Tensor | list[KeysAndValues | None] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        query_embeds: torch.Tensor | None = None,
        causal_text: bool = False,
        image_rows: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Let the queries read the image, and the text where there is one; or read a text alone.

        The three self-attention masks of BLIP-2 (figure 2): queries and text see each other (bi-directional);
        queries see queries, and a token sees queries and the tokens before it (multimodal causal, `causal_text`);
        either sees its own kind alone (uni-modal: two calls, one with the image, one with the text alone).

        Args:
            encoder_hidden_states: `(B, L, E)` image features, or what [`project_image`] made of them; without them
                there are no queries, and text alone.
            encoder_attention_mask: `(B, L)`, 1 where there is an image token and 0 where there is padding.
            input_ids: `(B, T)` text: an instruction (InstructBLIP, Dai et al. 2023, section 2.3), or stage 1's; needs
                the text half.
            attention_mask: `(B, T)` for `input_ids`.
            query_embeds: `(B or 1, Q, D)` instead of the model's own queries.
            causal_text: the text is to be generated: it may not look ahead, and the queries may not look at it.
            image_rows: `(B,)` int64, which of `(N, L, E)` image features each row looks at; row n at image n by
                default. An image that several rows look at costs its keys and values once.
            kwargs: `output_attentions` and `output_hidden_states` add self- and cross-attention maps
                `(B, heads, Q + T, Q + T)` and `(B, heads, Q, L)`, and the layers' outputs.

        Returns:
            `last_hidden_state` `(B, Q + T, D)`, the queries first; `pooler_output` `(B, D)`, the first query, or of a
            text alone its first token.

        Raises:
            ValueError: text without a text half, a mask without text, features of another width, no queries for an
                image, neither image nor text, `causal_text` without text; FlashAttention where it cannot mask:
                `causal_text`, or padding in the image.
        """
        parts = []
        if encoder_hidden_states is not None:
            if isinstance(encoder_hidden_states, torch.Tensor):
                self._check_width(encoder_hidden_states)
                images, image_length = encoder_hidden_states.shape[:2]
            else:  # the first layer looks at the image, whatever the frequency
                images, _, image_length, _ = encoder_hidden_states[0][0].shape
            rows = images if image_rows is None else len(image_rows)
            parts.append(self._queries_for(query_embeds, rows))  # (B, Q, D)
        query_length = parts[0].shape[1] if parts else 0
        if input_ids is not None:
            if not self.config.use_qformer_text_input:
                raise ValueError("The Q-Former was given text and has no text half: set use_qformer_text_input=True")
            parts.append(self.embeddings(input_ids))  # (B, T, D)
        elif attention_mask is not None or causal_text:
            what = "an attention_mask" if attention_mask is not None else "causal_text"
            raise ValueError(f"The Q-Former was given {what} and no input_ids: it masks the text")
        if not parts:
            raise ValueError("The Q-Former was given neither image features (encoder_hidden_states) nor text")
        hidden_states = self.dropout(self.layernorm(torch.cat(parts, dim=1)))

        if attention_mask is not None:
            attention_mask = nn.functional.pad(attention_mask, (query_length, 0), value=1)
        if causal_text and is_flash_attention_requested(self.config):  # transformers would drop the mask in silence
            raise ValueError(self._flash_cannot("let queries and text see each other in part (causal_text, ITG)"))
        if attention_mask is not None or causal_text:
            attention_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=attention_mask,
                and_mask_function=multimodal_causal(query_length) if causal_text else None,
            )
        if isinstance(encoder_hidden_states, torch.Tensor):
            encoder_hidden_states = encoder_hidden_states.to(hidden_states)
        if encoder_attention_mask is not None:
            if image_rows is not None:
                encoder_attention_mask = encoder_attention_mask[image_rows]
            encoder_attention_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=hidden_states[:, :query_length],
                attention_mask=encoder_attention_mask,
                # its shape alone is read: one image a row
                encoder_hidden_states=hidden_states[:, :1].expand(-1, image_length, -1),
            )
            # transformers takes the mask of fewer queries than keys for the queries' own
            if encoder_attention_mask is not None and is_flash_attention_requested(self.config):
                raise ValueError(self._flash_cannot("leave out an image's padding"))
        hidden_states = self.encoder(
            hidden_states,
            encoder_hidden_states,
            attention_mask,
            encoder_attention_mask,
            query_length,
            image_rows=image_rows,
            **kwargs,
        )
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden_states, pooler_output=hidden_states[:, 0]
        )

    def _flash_cannot(self, what: str) -> str:
        return f'{self.config._attn_implementation} cannot {what}: set attn_implementation="sdpa"'

    def _check_width(self, encoder_hidden_states: torch.Tensor) -> None:
        width = encoder_hidden_states.shape[-1]
        if width != self.config.encoder_hidden_size:
            raise ValueError(
                f"Image features are {width} wide; this Q-Former reads features of width "
                f"{self.config.encoder_hidden_size} (encoder_hidden_size)"
            )

    def _queries_for(self, query_embeds: torch.Tensor | None, rows: int) -> torch.Tensor:
        if query_embeds is None:
            if self.query_tokens is None:
                raise ValueError("This Q-Former owns no queries (num_query_tokens is not set): give query_embeds")
            query_embeds = self.query_tokens.weight.unsqueeze(0)
        return query_embeds.expand(rows, -1, -1)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.query_tokens is not None:
            # zeros, as BLIP-2 starts them, would make all queries equal, and equal they would stay
            init.normal_(self.query_tokens.weight, std=self.config.initializer_range)

    def load_bert(self, bert: PreTrainedModel) -> None:
        """Copy the weights of a BERT: see [`~lorgnette.assembly.qformer_init.load_bert_weights`]."""
        from_package("assembly.qformer_init", "load_bert").load_bert_weights(self, bert)


def multimodal_causal(num_queries: int) -> Callable:
    """BLIP-2's mask for generation (figure 2), as a mask function of `transformers.masking_utils`."""

    def sees(batch_idx: torch.Tensor, head_idx: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor):
        return (kv_idx < num_queries) | ((q_idx >= num_queries) & (kv_idx <= q_idx))

    return sees


__all__ = ["LorgnetteQFormerModel"]
