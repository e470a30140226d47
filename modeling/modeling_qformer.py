"""The Q-Former of BLIP-2 (Li et al. 2023, section 3.1): learned queries that read an image through cross-attention.

- queries and text share self-attention, and have feed-forwards of their own; only queries look at the image
- parameter names and outputs are those of `transformers.Blip2QFormerModel` (`models/blip_2/modeling_blip_2.py`), plus
  `query_tokens` and, with a text half, `embeddings` (there: `Blip2TextEmbeddings`)
- runs in the model's own dtype, through `ALL_ATTENTION_FUNCTIONS` (eager, sdpa, FlashAttention, flex)

Shapes: B images, Q queries, T text tokens, L image tokens, D width, E width of the image features.
"""

from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import BertIntermediate, BertOutput, BertSelfOutput, eager_attention_forward
from transformers.utils import TransformersKwargs
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..configuration.configuration_lorgnette import LorgnetteQFormerConfig


KeysAndValues = tuple[torch.Tensor, torch.Tensor]
# of each layer (None of one without cross-attention), and pooled features (N, Q, 3 E) where they are used
ProjectedImage = tuple[list[KeysAndValues | None], torch.Tensor | None]


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
        shared_rows: int = 0,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        keys, values = self.project(source) if isinstance(source, torch.Tensor) else source
        if shared_rows:  # they are folded from (N * c, Q, D) to (N, c * Q, D), and read keys in place
            own, others = hidden_states.tensor_split([shared_rows])
            attended, _ = self.forward(own.reshape(len(keys), -1, own.shape[2]), (keys, values), None, **kwargs)
            others, _ = self.forward(others, (keys, values), None, source_rows[shared_rows:], **kwargs)
            return torch.cat([attended.view_as(own), others]), None
        if source_rows is not None:
            # `keys[source_rows]`, but with gradients that are added up in blocks, on a CPU in a third of the time
            keys, values = (x.transpose(1, 2).index_select(0, source_rows).transpose(1, 2) for x in (keys, values))
        queries = self.split_heads(self.query(hidden_states))
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self, queries, keys, values, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return output.flatten(2), weights  # (B, Q, D), (B, heads, Q, L)


class LorgnetteQFormerAttention(nn.Module):
    def __init__(self, config: LorgnetteQFormerConfig, source_size: int):
        super().__init__()
        self.attention = LorgnetteQFormerMultiHeadAttention(config, source_size)
        self.output = BertSelfOutput(config)

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        attended, _ = self.attention(hidden_states, *args, **kwargs)
        return self.output(attended, hidden_states)


class LorgnetteQFormerLayer(GradientCheckpointingLayer):
    def __init__(self, config: LorgnetteQFormerConfig, layer_idx: int):
        super().__init__()
        self.attention = LorgnetteQFormerAttention(config, config.hidden_size)
        self.has_cross_attention = layer_idx % config.cross_attention_frequency == 0
        if self.has_cross_attention:
            self.crossattention = LorgnetteQFormerAttention(config, config.encoder_hidden_size)
        if config.use_qformer_text_input:
            self.intermediate = BertIntermediate(config)
            self.output = BertOutput(config)
        self.intermediate_query = BertIntermediate(config)
        self.output_query = BertOutput(config)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, Q + T, D)
        image: torch.Tensor | KeysAndValues | None,  # (B, L, E); None where there are no queries
        attention_mask: torch.Tensor | None,
        query_length: int,
        *looks: torch.Tensor | int | None,  # the images' mask, image_rows, shared_rows
        **kwargs,
    ) -> torch.Tensor:
        hidden_states = self.attention(hidden_states, hidden_states, attention_mask, **kwargs)
        queries, text = hidden_states[:, :query_length], hidden_states[:, query_length:]
        if query_length > 0:
            if self.has_cross_attention:
                queries = self.crossattention(queries, image, *looks, **kwargs)
            queries = self.output_query(self.intermediate_query(queries), queries)
        if text.shape[1] > 0:
            text = self.output(self.intermediate(text), text)
        return torch.cat([queries, text], dim=1)


class LorgnetteQFormerEmbeddings(nn.Module):
    """Word and position embeddings of the text half; the LayerNorm after them is shared with the queries."""

    def __init__(self, config: LorgnetteQFormerConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:  # (…, T) -> (…, T, D)
        length, longest = input_ids.shape[-1], self.position_embeddings.num_embeddings
        if length > longest:
            raise ValueError(f"The Q-Former's text has {length} tokens; it has positions for {longest}")
        return self.word_embeddings(input_ids) + self.position_embeddings.weight[:length]


class LorgnetteQFormerPooling(nn.Module):
    """What pooling knows of an image, for the queries' start and, by an MLP past all layers, for their end.

    Each query has the first token (CLS), the mean of all, and the mean of its own stretch of them. The MLP, whose last
    weights start at 0, is a bridge by itself, which learns fast from few pictures (DeCo, Yao et al. 2024, section 3).
    """

    def __init__(self, config: LorgnetteQFormerConfig):
        super().__init__()
        width, hidden = config.encoder_hidden_size, config.hidden_size
        self.norm = nn.LayerNorm(width)
        self.to_queries = nn.Linear(3 * width, hidden)
        self.to_outputs = nn.Sequential(nn.Linear(3 * width, hidden), nn.GELU(), nn.Linear(hidden, hidden))

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None, queries: int) -> torch.Tensor:
        """`(N, L, E)` normalised features to `(N, Q, 3 E)`; `mask` `(N, L)` is 0 at padding."""
        own, mean = (pool(features, mask, count) for count in (queries, 1))
        return torch.cat([features[:, :1].expand_as(own), mean.expand_as(own), own], dim=-1)


def pool(features: torch.Tensor, mask: torch.Tensor | None, count: int) -> torch.Tensor:
    """`(N, L, E)` to `(N, count, E)`: as `adaptive_avg_pool1d`, over the tokens where `mask` `(N, L)` is not 0."""
    shown = torch.ones_like(features[..., 0]) if mask is None else mask
    shown = shown.long().unsqueeze(1)  # (N, 1, L)
    place, total = shown.cumsum(-1) - 1, shown.sum(-1, keepdim=True)
    number = torch.arange(count, device=features.device).unsqueeze(1)
    inside = (place >= number * total // count) & (place < -(-(number + 1) * total // count)) & (shown > 0)
    return (inside.to(features) / inside.sum(-1, keepdim=True)) @ features


class LorgnetteQFormerModel(PreTrainedModel):
    """Q learned queries in, Q vectors that describe the image out.

    Args:
        config: [`LorgnetteQFormerConfig`] whose `encoder_hidden_size` is set. With `num_query_tokens` the model owns
            its queries; without, each call brings `query_embeds`. Raises ValueError without `encoder_hidden_size`.
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
    _input_embed_layer = "word_embeddings"
    _no_split_modules = ["LorgnetteQFormerLayer"]  # noqa: RUF012 (transformers' own class attribute)
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": LorgnetteQFormerLayer,
        "attentions": OutputRecorder(LorgnetteQFormerMultiHeadAttention, index=1, layer_name="attention.attention"),
        "cross_attentions": OutputRecorder(LorgnetteQFormerMultiHeadAttention, index=1, layer_name="crossattention"),
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
        self.pooling = LorgnetteQFormerPooling(config) if config.use_pooled_features else None
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        layers = [LorgnetteQFormerLayer(config, i) for i in range(config.num_hidden_layers)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})  # for the names of their parameters
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding | None:
        """The text half's word embeddings; `None` where there is no text half."""
        return self.embeddings.word_embeddings if self.config.use_qformer_text_input else None

    def project_image(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> ProjectedImage:
        """What all passes over `(N, L, E)` image features, with a mask `(N, L)` or without, can share."""
        features, pooled = self._pool(features, mask, self.config.num_query_tokens)
        keys_and_values = [
            layer.crossattention.attention.project(features) if layer.has_cross_attention else None
            for layer in self.encoder.layer
        ]
        return keys_and_values, pooled

    def _pool(self, features: torch.Tensor, mask: torch.Tensor | None, queries: int) -> tuple[torch.Tensor, Any]:
        width, expected = features.shape[-1], self.config.encoder_hidden_size
        if width != expected:
            raise ValueError(f"Image features are {width} wide; the Q-Former's encoder_hidden_size is {expected}")
        features = features.to(self.layernorm.weight)
        if self.pooling is None:
            return features, None
        features = self.pooling.norm(features)
        return features, self.pooling(features, mask, queries)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        encoder_hidden_states: torch.Tensor | ProjectedImage | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        query_embeds: torch.Tensor | None = None,
        num_query_tokens: int | None = None,
        causal_text: bool = False,
        image_rows: torch.Tensor | None = None,
        shared_rows: int = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Let the queries read the image, and the text where there is one; or read a text alone.

        Args:
            encoder_hidden_states: `(B, L, E)` image features, or what [`project_image`] made of them; without them
                there are no queries, and text alone.
            encoder_attention_mask: `(B, L)`, 0 at padding.
            input_ids, attention_mask: `(B, T)` text: an instruction (InstructBLIP, Dai et al. 2023, section 2.3), or
                stage 1's; with `causal_text` also `(B, n, T)`, n texts that do not see each other, n * T states.
            query_embeds: `(B or 1, Q, D)` in place of the model's own; of its own `num_query_tokens` takes the first.
            causal_text: the text is to be generated: it may not look ahead, nor the queries at it (BLIP-2, figure 2).
            image_rows: `(B,)` int64, which of `(N, L, E)` image features each row looks at; row n at image n by
                default. An image that several rows look at costs its keys and values once.
            shared_rows: the first rows, of `image_rows`, are as many for each image, in order: they copy no keys. Not
                with a mask of the images.
            kwargs: `output_attentions` and `output_hidden_states` add self- and cross-attention maps
                `(B, heads, Q + T, Q + T)` and `(B, heads, Q, L)`, and the layers' outputs.

        Returns:
            `last_hidden_state` `(B, Q + T, D)`, the queries first; `pooler_output` `(B, D)`, the first query, or of a
            text alone its first token.

        Raises:
            ValueError: text without a text half, a mask or `causal_text` without text, features of another width, no
                queries for an image, neither image nor text; FlashAttention with `causal_text`, or padding in an image.
        """
        sources, pooled, parts = [None] * len(self.encoder.layer), None, []  # what each layer looks at
        if encoder_hidden_states is not None:
            if query_embeds is None and self.query_tokens is None:
                raise ValueError("This Q-Former owns no queries (num_query_tokens is not set): give query_embeds")
            queries = self.query_tokens.weight[None, :num_query_tokens] if query_embeds is None else query_embeds
            if isinstance(encoder_hidden_states, tuple):
                sources, pooled = encoder_hidden_states
                image = sources[0][0]  # the first layer looks at the image, whatever the frequency
            else:
                image, pooled = self._pool(encoder_hidden_states, encoder_attention_mask, queries.shape[1])
                sources = [image] * len(self.encoder.layer)
            rows = (image if image_rows is None else image_rows).shape[0]  # `len` would fix it in an exported program
            queries = queries.expand(rows, -1, -1)  # (B, Q, D)
            if pooled is not None:
                pooled = pooled if image_rows is None else pooled.index_select(0, image_rows)
                queries = queries + self.pooling.to_queries(pooled)
            parts.append(queries)
        query_length = parts[0].shape[1] if parts else 0
        if input_ids is not None:
            if not self.config.use_qformer_text_input:
                raise ValueError("The Q-Former was given text and has no text half: set use_qformer_text_input=True")
            parts.append(self.embeddings(input_ids).flatten(1, -2))  # (B, T, D)
        elif attention_mask is not None or causal_text:
            raise ValueError("The Q-Former was given attention_mask or causal_text and no input_ids: they mask text")
        if not parts:
            raise ValueError("The Q-Former was given neither image features (encoder_hidden_states) nor text")
        hidden_states = self.dropout(self.layernorm(torch.cat(parts, dim=1)))

        if attention_mask is not None:
            attention_mask = nn.functional.pad(attention_mask.flatten(1), (query_length, 0), value=1)
        if attention_mask is not None or causal_text:
            attention_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=attention_mask,
                and_mask_function=multimodal_causal(query_length, input_ids.shape[-1]) if causal_text else None,
            )
        if encoder_attention_mask is not None:
            if image_rows is not None:
                encoder_attention_mask = encoder_attention_mask[image_rows]
            encoder_attention_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=hidden_states[:, :query_length],
                attention_mask=encoder_attention_mask,
                # its shape alone is read: one image a row
                encoder_hidden_states=hidden_states[:, :1].expand(-1, image.shape[-2], -1),
            )
        # transformers would drop the text's mask in silence, and take the image's for the queries' own
        if is_flash_attention_requested(self.config) and (causal_text or encoder_attention_mask is not None):
            text, padding = "let queries and text see each other in part (causal_text)", "leave out an image's padding"
            raise ValueError(
                f"{self.config._attn_implementation} cannot {text if causal_text else padding}: "
                'set attn_implementation="sdpa"'
            )
        looks = (encoder_attention_mask, image_rows, shared_rows)
        for layer, source in zip(self.encoder.layer, sources, strict=True):
            hidden_states = layer(hidden_states, source, attention_mask, query_length, *looks, **kwargs)
        if pooled is not None:
            queries, text = hidden_states.tensor_split([query_length], dim=1)
            hidden_states = torch.cat([queries + self.pooling.to_outputs(pooled), text], dim=1)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden_states, pooler_output=hidden_states[:, 0]
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if self.pooling is not None and module is self.pooling.to_outputs[-1]:
            init.zeros_(module.weight)


def multimodal_causal(start: int, length: int) -> Callable:
    """BLIP-2's mask to generate texts of `length` (figure 2), as a mask function of `transformers.masking_utils`."""

    def sees(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        same_text = (key - start) // length == (query - start) // length
        return (key < start) | ((query >= start) & (key <= query) & same_text)

    return sees
