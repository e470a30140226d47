"""Shrink configs of any architecture of transformers to tiny models.

Field names identify widths and numbers of layers, heads and experts: transformers uses few names for them. Fields that
    a config derives from others (lists of layers, ranks, offsets) are not set.
"""

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel


MOST_WEIGHTS = 40_000_000
VOCABULARY = 320
# pattern for a field's full name -> its value; the first match counts
_SIZES = {
    r"vocab_size|.*_vocab(_size)?|vocab_size_per_layer_input": VOCABULARY,
    r"hidden_size|n_embd|d_model|dim|embed_dim|emb_dim|embedding_(size|dim)|word_embed_proj_dim|backbone_hidden_size"
    r"|hidden_size_global|adapter_(in_dim|input_size|out_dim)"
    r"|(in|out)put_embedding_size|attention_hidden_size|lru_width|hidden_dim|projection_dim": 32,
    r"num_(hidden_|decoder_|encoder_)?layers|n_layers?|(de|en)coder_layers|num_blocks|depth": 2,
    r"num_(attention_|decoder_attention_|encoder_attention_)?heads|n_heads?|((de|en)coder_)?attention_heads"
    r"|swa_num_attention_heads|num_query_groups": 4,
    r"num_(key_value|kv)_heads|swa_num_key_value_heads|n_kv_heads?": 2,
    r"(swa_|global_|index_|linear_|attention_)?head_dim|global_head_dim|kv_channels|v_head_dim|qk_nope_head_dim"
    r"|qk_rope_head_dim|dim_head|attention_head_size|d_head|rotary_dim": 8,
    r"qk_head_dim": 16,
    r".*intermediate_size(_mlp)?|.*ffn_dim|dim_ff|dff|d_inner|n_inner|ffn_hidden_size|feed_forward_size"
    r"|expert_ffn_hidden_size": 48,
    r"(q|kv|o)_lora_rank|.*lowrank|hidden_size_per_layer_input|laurel_rank|adapter_rank|router_hidden_size": 8,
    r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts": 4,
    r"num_experts_per_(tok|token)|moe_topk|moe_k|moe_top_k": 2,
    r"n_group|topk_group|n_groups|num_expert_group": 1,
    r"(num|n|moe_num)_shared_experts": 1,
    r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length|original_max_position.*"
    r"|max_target_positions|max_source_positions": 256,
    r".*sliding_window(_size)?|attention_window_size|window_size": 16,
    r"mamba_n_heads|mamba_num_heads|n_mamba_heads": 8,
    r"mamba_d_head|mamba_head_dim|mamba_headdim|linear_(key|value)_head_dim": 8,
    r"mamba_d_ssm": 64,
    r"linear_num_key_heads|linear_num_heads": 2,
    r"linear_num_value_heads": 4,
    r"mamba_d_state|state_size|ssm_state_size": 8,
    r"image_size|img_size": 32,
    r"patch_size": 8,
    r"num_nextn_predict_layers|first_k_dense_replace|num_kv_shared_layers": 0,
}  # fmt: skip
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LAYERS = r"num_hidden_layers|n_layers?|num_layers"


class NotTinyError(ValueError):
    """No tiny config could be built; with the reason."""


def tiny_model(
    config_class: type[PreTrainedConfig], build: Callable[[PreTrainedConfig], PreTrainedModel], **fields: Any
) -> PreTrainedModel:
    """A model with few random weights, scaled so that outputs differ.

    Args:
        build: from a config to a model.
        fields: further fields for this class.

    Raises:
        NotTinyError: no attempt gives a model that runs; with the first cause.
    """
    cause: Exception | None = None
    try:
        ways = _ways(config_class)
    except Exception as error:  # classes raise different exceptions
        ways, cause = [], error
    for shrunk in ways:
        try:
            config = config_class(**_over(shrunk, fields))
            with torch.device("meta"):
                size = sum(weight.numel() for weight in build(copy.deepcopy(config)).parameters())
            if size > MOST_WEIGHTS:
                raise NotTinyError(f"{size:,} weights where all that is known by its name is small")
            torch.manual_seed(0)
            model = build(config).eval()
            with torch.no_grad():
                for weight in model.parameters():
                    if weight.is_floating_point():
                        weight.add_(torch.randn_like(weight) * 0.05)
                for table in model.modules():  # transformers resets a Youtu's padding embedding to zero when it loads
                    if isinstance(table, torch.nn.Embedding) and table.padding_idx is not None:
                        table.weight[table.padding_idx] = 0
                if model.main_input_name == "input_ids" and not config.is_encoder_decoder:
                    model(input_ids=torch.arange(3, 8)[None])
            return model
        except Exception as error:
            cause = cause or error
    raise NotTinyError(_in_words(cause)) from cause


def _in_words(cause: Exception | None) -> str:
    libraries = sorted(set(re.findall(r"requires the (\w+) library", str(cause))))
    if isinstance(cause, ImportError) and libraries:
        names = " and ".join(libraries)
        one = len(libraries) == 1
        return f"needs the {'library' if one else 'libraries'} {names}, which {'is' if one else 'are'} not installed"
    if isinstance(cause, NotTinyError):
        return str(cause)
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:160]}"


def _ways(config_class: type[PreTrainedConfig]) -> list[dict[str, Any]]:
    """Keyword arguments to try for the class, the smallest first."""
    small = _shrunk(config_class())
    plain = {name: value for name, value in small.items() if not isinstance(value, list)}
    return [small, _as_many_heads(small), plain, _as_many_heads(plain)]


def _as_many_heads(shrunk: dict[str, Any]) -> dict[str, Any]:
    """The fields with as many key heads as query heads."""
    fields = shrunk.copy()
    for name, value in fields.items():
        if isinstance(value, dict):
            fields[name] = _as_many_heads(value)
        elif re.fullmatch(r"(swa_)?num_(key_value|kv)_heads", name):
            fields[name] = 4
    return fields


def _over(fields: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Merge `others` into the fields, recursively into nested configs."""
    inner = {
        name: _over(fields[name], value)
        for name, value in others.items()
        if isinstance(value, dict) and isinstance(fields.get(name), dict)
    }
    return fields | others | inner


def _shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    shrunk: dict[str, Any] = {}
    fields = {name: vars(config).get(name, value) for name, value in config.to_dict().items()}
    layers = next((value for name, value in fields.items() if re.fullmatch(_LAYERS, name)), None)
    lists = {name: value for name, value in fields.items() if isinstance(value, list) and len(value) == layers}
    kept = _kinds_of_layers(lists, layers)
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            shrunk[name] = _shrunk(value) | {"model_type": value.model_type}
        elif name in lists and name not in ("architectures",):
            shrunk[name] = [value[place] for place in kept]
        elif "drop" in name and isinstance(value, float):
            shrunk[name] = 0.0  # training and evaluation then compute the same
        elif isinstance(value, int) and not isinstance(value, bool):
            if kept and re.fullmatch(_LAYERS, name):
                shrunk[name] = len(kept)
                continue
            rule = next((size for pattern, size in _SIZES.items() if re.fullmatch(pattern, name)), None)
            if rule is not None and value > rule:
                shrunk[name] = rule
    return shrunk | {name: value for name, value in _IDS.items() if name in fields}


def _kinds_of_layers(lists: dict[str, list], layers: int | None) -> list[int]:
    """The first layer of each kind, by the lists with an entry per layer; at least two."""
    if not layers:
        return []
    first: dict[str, int] = {}
    for place in range(layers):
        first.setdefault(repr([value[place] for value in lists.values()]), place)
    kept = sorted(first.values())[:4]
    return kept if len(kept) > 1 else list(range(min(2, layers)))
