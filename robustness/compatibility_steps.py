"""What one tiny model goes through, and how it is found out whether it works."""

import inspect
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from tiny_hub import TinyHub
from tiny_models import NUM_QUERY_TOKENS, QFORMER, language_model, vision_model
from transformers import MODEL_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lorgnette import LorgnetteForConditionalGeneration
from lorgnette.assembly.lora_targets import layers_of_one_weight, linear_layers, read_layers, resolve_lora_config
from lorgnette.configuration.configuration_lorgnette import SAVE_FORMATS

from .tiny_configs import VOCABULARY, NotTinyError, tiny_model


LMS, VITS = "Language models", "ViTs"
WORDS = 9
BRIDGE = QFORMER | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Sums in another order: a product of few rows, of many, of merged weights. Random weights make logits of about 1.
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


@dataclass(frozen=True)
class Outcome:
    """What became of a model.

    Args:
        verdict: "works", "refused" at the join, "fails" afterwards, or "not tried".
        reason: why it is not "works", or what it needs for that.
        packed: of a language model that works: "yes", or why not.
    """

    kind: str
    model_type: str
    verdict: str
    reason: str = ""
    packed: str = ""


class WrongAnswerError(AssertionError):
    """An answer that is not what it has to be."""


def try_language_model(model_type: str, config_class: type[PreTrainedConfig]) -> Outcome:
    """A causal LM of this type, with a tiny ViT."""
    try:
        text = tiny_model(config_class, AutoModelForCausalLM.from_config, **FIELDS.get(model_type, {}))
    except NotTinyError as error:
        return Outcome(LMS, model_type, "not tried", UNTRIED.get(model_type) or short(error))
    named = layers_to_name(text)
    with hub_with(text) as hub:
        return _try_joined(LMS, model_type, hub, vision_model(), text, named)


def _try_joined(
    kind: str,
    model_type: str,
    hub: TinyHub,
    vision: PreTrainedModel,
    text: PreTrainedModel,
    named: list[str] | None = None,
) -> Outcome:
    try:
        built = joined(vision, text, named)
    except ValueError as error:
        return Outcome(kind, model_type, "refused", short(error))
    except Exception as error:
        return Outcome(kind, model_type, "fails", f"at the join: {where(error)}")
    outcome = through(built, kind, model_type, hub)
    if outcome.verdict == "works" and named:
        return replace(outcome, reason=f"lora has to name its target_modules, here {', '.join(named)}")
    return outcome


def try_vision_model(model_type: str, config_class: type[PreTrainedConfig]) -> Outcome:
    """A ViT of this type, with a tiny Llama."""
    try:
        vision = tiny_model(config_class, MODEL_MAPPING[config_class]._from_config, **FIELDS.get(model_type, {}))
    except NotTinyError as error:
        return Outcome(VITS, model_type, "not tried", UNTRIED.get(model_type) or short(error))
    text = language_model()
    with hub_with(text) as hub:
        return _try_joined(VITS, model_type, hub, vision, text)


@contextmanager
def hub_with(text: PreTrainedModel) -> Iterator[TinyHub]:
    """A Hub cache that has this language model, before a join puts LoRA into it."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        hub = TinyHub(Path(folder), patch)
        hub.add("tiny/text", text)
        yield hub


def joined(
    vision: PreTrainedModel, text: PreTrainedModel, layers: list[str] | None = None
) -> LorgnetteForConditionalGeneration:
    """The two, with LoRA on these layers or on the attention."""
    lora: dict[str, Any] = {"r": 2} | ({"target_modules": layers} if layers else {})
    built = LorgnetteForConditionalGeneration.from_backbones(
        vision, text, qformer_config=dict(BRIDGE), num_query_tokens=NUM_QUERY_TOKENS, lora=lora
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in built.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return built.eval()


def layers_to_name(text: PreTrainedModel) -> list[str] | None:
    """Names of linear layers that LoRA can train, where the attention cannot have it or there is none.

    peft refuses Mamba's last, and experts may be chosen for no token.
    """
    try:
        resolve_lora_config({}, text)
    except Exception:  # or it is nothing that can be asked: the join says what
        pass
    else:
        return None
    try:
        read = read_layers(text) - layers_of_one_weight(linear_layers(text))
    except Exception:  # the join says why
        read = set()
    names = {name.rsplit(".", 1)[-1] for name, layer in text.named_modules() if layer in read}
    return sorted(names - {"out_proj", "classifier", "gate_proj", "up_proj", "down_proj"}) or ["none"]


def through(built: LorgnetteForConditionalGeneration, kind: str, model_type: str, hub: TinyHub) -> Outcome:
    """Everything that comes after the join."""
    batch, packed, step = batch_for(built), "", "loss"
    try:
        the_loss_is_the_language_models(built, batch)
        step = "training"
        train(built, batch)
        step = "generate"
        generates(built, batch)
        if kind == LMS:
            step = "packing"
            packed = packs(built)
        with tempfile.TemporaryDirectory() as scratch:
            for step in SAVE_FORMATS[::-1]:
                if step == "thin":
                    names_its_backbones(built, hub)
                comes_back(built, batch, step, Path(scratch, step))
    except Exception as error:
        return Outcome(kind, model_type, "fails", f"{step}: {where(error)}")
    return Outcome(kind, model_type, "works", packed=packed)


def batch_for(built: LorgnetteForConditionalGeneration, rows: int = 2) -> dict[str, torch.Tensor]:
    """Prompts with a picture each, between words."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, VOCABULARY, (rows, WORDS), generator=generator)
    image = torch.full((rows, NUM_QUERY_TOKENS), built.config.image_token_id)
    input_ids = torch.cat([words[:, :3], image, words[:, 3:]], dim=1)
    config = built.config.vision_config
    size = getattr(config, "image_size", None) or 32
    height, width = (size, size) if isinstance(size, int) else size
    pictures = torch.randn(rows, getattr(config, "num_channels", 3), height, width, generator=generator)
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pictures}
    if "spatial_shapes" in inspect.signature(built.vision_model.forward).parameters:
        side, values = 4, 3 * config.patch_size**2
        batch["pixel_values"] = torch.randn(rows, side * side, values, generator=generator)
        batch["pixel_attention_mask"] = torch.ones(rows, side * side, dtype=torch.long)
        batch["spatial_shapes"] = torch.tensor([[side, side]] * rows)
    return batch


def labels_of(built: LorgnetteForConditionalGeneration, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    labels = batch["input_ids"].clone()
    labels[:, : 3 + NUM_QUERY_TOKENS] = -100
    return labels


def the_loss_is_the_language_models(built: LorgnetteForConditionalGeneration, batch: dict[str, torch.Tensor]) -> None:
    """That of supervised positions alone is that of all logits."""
    labels = labels_of(built, batch)
    built.eval()
    with torch.no_grad():
        logits = built(**batch).logits[:, :-1].float()
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        built.train()
        found = built(**batch, labels=labels).loss
    if not torch.isfinite(found):
        raise WrongAnswerError(f"the loss is {found}")
    same(found, expected, "loss of a training step", "cross entropy of the logits")


def train(built: LorgnetteForConditionalGeneration, batch: dict[str, torch.Tensor]) -> None:
    """Two steps, in which every weight that trains gets a gradient."""
    built.train()
    optimizer = torch.optim.AdamW([weight for weight in built.parameters() if weight.requires_grad], lr=1e-3)
    for _ in range(2):
        loss = built(**batch, labels=labels_of(built, batch)).loss
        loss.backward()
        if not torch.isfinite(loss):
            raise WrongAnswerError(f"the loss is {loss}")
        idle = [name for name, weight in built.named_parameters() if weight.requires_grad and weight.grad is None]
        if idle:
            raise WrongAnswerError(f"{len(idle)} weights that train get no gradient ({idle[0]}, …)")
        optimizer.step()
        optimizer.zero_grad()
    built.eval()


def generates(built: LorgnetteForConditionalGeneration, batch: dict[str, torch.Tensor]) -> None:
    """With the cache, what a pass over all says without it."""
    first = {name: value[:1] for name, value in batch.items()}
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    made = built.generate(**first, **settings, output_logits=True, return_dict_in_generate=True)
    whole = first | {"input_ids": made.sequences, "attention_mask": torch.ones_like(made.sequences)}
    with torch.no_grad():
        logits = built(**whole, use_cache=False).logits[:, -5:-1]
    same(torch.stack(made.logits, dim=1), logits, "logits with the cache", "those without")


def packs(built: LorgnetteForConditionalGeneration) -> str:
    """Two documents in a row are what each is alone; "yes", or why they cannot share one."""
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(3, VOCABULARY, (1, 12), generator=generator)
    documents = torch.tensor([[0] * 5 + [1] * 7])
    with torch.no_grad():
        try:
            together = built(words, sequence_ids=documents).logits
        except ValueError as error:
            if "cannot be packed" not in str(error):
                raise
            return "no: " + short(error).partition(" ")[2].replace(": it cannot be packed", "")
        alone = torch.cat([built(words[:, :5]).logits, built(words[:, 5:]).logits], dim=1)
    same(together, alone, "logits of packed documents", "those of each alone")
    return "yes"


def names_its_backbones(built: LorgnetteForConditionalGeneration, hub: TinyHub) -> None:
    """As if it had been joined from Hub ids: a thin save leaves them out."""
    hub.add("tiny/vision", built.vision_model)
    for part in ("vision", "text"):
        setattr(built.config, f"{part}_backbone", f"tiny/{part}")
        setattr(built.config, f"{part}_backbone_revision", hub.snapshot(f"tiny/{part}").name)


def comes_back(built: LorgnetteForConditionalGeneration, batch: dict[str, torch.Tensor], form: str, folder: Path):
    """Saved in a form, and loaded to the same logits."""
    built.save_pretrained(folder, save_format=form)
    loaded = LorgnetteForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        ours, theirs = built(**batch).logits, loaded(**batch).logits
    if form == "full" and not torch.allclose(ours, theirs, rtol=0, atol=1e-6):  # some kernels heed where memory begins
        raise WrongAnswerError(f"logits after loading differ by {(ours - theirs).abs().max():.2g}")
    same(ours, theirs, "logits", "those after loading")


def same(first: torch.Tensor, second: torch.Tensor, what: str, other: str) -> None:
    if first.shape != second.shape:
        raise WrongAnswerError(f"{what} are {tuple(first.shape)}, {other} {tuple(second.shape)}")
    scale = float(second.abs().max().clamp(min=1.0))
    if not torch.allclose(first / scale, second / scale, **CLOSE):
        raise WrongAnswerError(f"{what} and {other} differ by {(first - second).abs().max():.2g}, of {scale:.2g}")


def where(error: Exception) -> str:
    """The error, and the last line of code on the way to it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = "" if isinstance(error, WrongAnswerError) else f" ({Path(last.filename).name}:{last.lineno})"
    return f"{type(error).__name__}: {short(error)}{place}"


def short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:199] + "…"


# Why a tiny one is not to be had, where the error that says so speaks of something else
UNTRIED: dict[str, str] = {
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "drafts words for another model from that model's states, and does not run alone",
    ),
    **dict.fromkeys(
        ("musicgen", "musicgen_melody"),
        "AutoModelForCausalLM cannot build it: its class takes the config of the decoder, which has no Auto class",
    ),
}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}
_PER_LAYER_WORDS = {"ple_layer_ids": [1], "ngram_vocab_size_base": VOCABULARY, "split_ngram_parts": 1}
_REPEATED_BLOCK = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
}
# in place of a backbone of timm
_RESNET = {"backbone_config": {"model_type": "resnet", "out_features": ["stage2", "stage3", "stage4"]}}
# the size, stride and padding of PP-OCR's convolutions
_KERNELS = {
    "reduce_channel": [1, 1, 0],
    "return_channel": [1, 1, 0],
    "vertical_long_to_small_conv_longratio": [[7, 1], 1, [3, 0]],
    "vertical_long_to_small_conv_midratio": [[5, 1], 1, [2, 0]],
    "vertical_long_to_small_conv_shortratio": [[3, 1], 1, [1, 0]],
    "horizontal_small_to_long_conv_longratio": [[1, 7], 1, [0, 3]],
    "horizontal_small_to_long_conv_midratio": [[1, 5], 1, [0, 2]],
    "horizontal_small_to_long_conv_shortratio": [[1, 3], 1, [0, 1]],
    "symmetric_conv_long_longratio": [7, 1, 3],
    "symmetric_conv_long_midratio": [5, 1, 2],
    "symmetric_conv_long_shortratio": [3, 1, 1],
}
_SWIN = {"embed_dim": 48, "hidden_size": 384, "window_size": 2, "patch_size": 2}
# What the names of fields do not say
FIELDS: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"use_cache": False},  # the one that it makes by itself asks for layers of its config, which has none
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "conditional_detr": _RESNET,
    "d_fine": {"backbone_config": {"out_features": ["stage2", "stage3", "stage4"]}},
    "dab-detr": _RESNET,
    "dbrx": {"attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 10_000.0}},
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "deformable_detr": _RESNET,
    "detr": _RESNET,
    "donut-swin": _SWIN,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "efficientloftr": {"out_features": [8, 8, 16, 32]},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.1},
    "falcon_mamba": {"state_size": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lw_detr": {"backbone_config": {"image_size": 64, "out_indices": [0, 1]}},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "maskformer-swin": _SWIN,
    "ministral": {"head_dim": 8},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "omdet-turbo": _RESNET,
    "pp_ocrv6_medium_det": {"intraclass_block_config": _KERNELS},
    "qwen4_exp": {"text_config": _INDEXER | _PER_LAYER_WORDS},  # as it is published
    "qwen4_exp_text": _INDEXER,  # without what asks for words
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16]},
    "sapiens2": {"hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads_per_layer": [2, 2]},
    "swin": _SWIN,
    "swin2sr": {"embed_dim": 48, "window_size": 2, "image_size": 16},
    "swinv2": _SWIN,
    "table-transformer": _RESNET,
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": _REPEATED_BLOCK | {"mamba_dt_rank": 2},
    "zamba2": _REPEATED_BLOCK,
}
