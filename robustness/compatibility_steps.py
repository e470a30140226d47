"""The steps that test whether one tiny model works."""

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
TEXT_TOKENS = 9
BRIDGE = QFORMER | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# tolerance for another order of sums: other batch sizes, merged weights. Random weights make logits of about 1.
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


@dataclass(frozen=True)
class Outcome:
    """The result for one model.

    Args:
        verdict: "works", "refused" by `from_backbones`, "fails" afterwards, or "not tried".
        reason: why it does not work, or what it needs to work.
        packed: for a language model that works: "yes", or why not.
    """

    kind: str
    model_type: str
    verdict: str
    reason: str = ""
    packed: str = ""


class WrongOutputError(AssertionError):
    """An output differs from the expected one."""


def try_language_model(model_type: str, config_class: type[PreTrainedConfig]) -> Outcome:
    """A causal LM of this type, with a tiny ViT."""
    try:
        text = tiny_model(config_class, AutoModelForCausalLM.from_config, **FIELDS.get(model_type, {}))
    except NotTinyError as error:
        return Outcome(LMS, model_type, "not tried", UNTRIED.get(model_type) or shortened(error))
    targets = required_lora_targets(text)
    with hub_cache_with(text) as hub:
        return _try_joined(LMS, model_type, hub, vision_model(), text, targets)


def _try_joined(
    kind: str,
    model_type: str,
    hub: TinyHub,
    vision: PreTrainedModel,
    text: PreTrainedModel,
    targets: list[str] | None = None,
) -> Outcome:
    try:
        built = join(vision, text, targets)
    except ValueError as error:
        return Outcome(kind, model_type, "refused", shortened(error))
    except Exception as error:
        return Outcome(kind, model_type, "fails", f"at the join: {describe(error)}")
    outcome = run_all_steps(built, kind, model_type, hub)
    if outcome.verdict == "works" and targets:
        return replace(outcome, reason=f"lora has to name its target_modules, here {', '.join(targets)}")
    return outcome


def try_vision_model(model_type: str, config_class: type[PreTrainedConfig]) -> Outcome:
    """A ViT of this type, with a tiny Llama."""
    try:
        vision = tiny_model(config_class, MODEL_MAPPING[config_class]._from_config, **FIELDS.get(model_type, {}))
    except NotTinyError as error:
        return Outcome(VITS, model_type, "not tried", UNTRIED.get(model_type) or shortened(error))
    text = language_model()
    with hub_cache_with(text) as hub:
        return _try_joined(VITS, model_type, hub, vision, text)


@contextmanager
def hub_cache_with(text: PreTrainedModel) -> Iterator[TinyHub]:
    """A Hub cache with this language model, written before LoRA is attached."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        hub = TinyHub(Path(folder), patch)
        hub.add("tiny/text", text)
        yield hub


def join(
    vision: PreTrainedModel, text: PreTrainedModel, layers: list[str] | None = None
) -> LorgnetteForConditionalGeneration:
    """Join both, with LoRA on these layers or on the attention."""
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


def required_lora_targets(text: PreTrainedModel) -> list[str] | None:
    """Names of linear layers for LoRA if the default targets are not possible, else None.

    Leaves out Mamba's last layer, which peft refuses, and experts, which may get no token.
    """
    try:
        resolve_lora_config({}, text)
    except Exception:  # from_backbones reports the error
        pass
    else:
        return None
    try:
        read = read_layers(text) - layers_of_one_weight(linear_layers(text))
    except Exception:  # from_backbones reports the error
        read = set()
    names = {name.rsplit(".", 1)[-1] for name, layer in text.named_modules() if layer in read}
    return sorted(names - {"out_proj", "classifier", "gate_proj", "up_proj", "down_proj"}) or ["none"]


def run_all_steps(built: LorgnetteForConditionalGeneration, kind: str, model_type: str, hub: TinyHub) -> Outcome:
    """Run all steps after `from_backbones`."""
    batch, packed, step = batch_for(built), "", "loss"
    try:
        check_loss(built, batch)
        step = "training"
        train(built, batch)
        step = "generate"
        check_generation(built, batch)
        if kind == LMS:
            step = "packing"
            packed = check_packing(built)
        with tempfile.TemporaryDirectory() as scratch:
            for step in SAVE_FORMATS[::-1]:
                if step == "thin":
                    set_hub_backbones(built, hub)
                check_reload(built, batch, step, Path(scratch, step))
    except Exception as error:
        return Outcome(kind, model_type, "fails", f"{step}: {describe(error)}")
    return Outcome(kind, model_type, "works", packed=packed)


def batch_for(built: LorgnetteForConditionalGeneration, rows: int = 2) -> dict[str, torch.Tensor]:
    """Prompts of text tokens with a picture each."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, VOCABULARY, (rows, TEXT_TOKENS), generator=generator)
    image = torch.full((rows, NUM_QUERY_TOKENS), built.config.image_token_id)
    input_ids = torch.cat([text[:, :3], image, text[:, 3:]], dim=1)
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


def check_loss(built: LorgnetteForConditionalGeneration, batch: dict[str, torch.Tensor]) -> None:
    """The loss over supervised positions equals the cross entropy of all logits."""
    labels = labels_of(built, batch)
    built.eval()
    with torch.no_grad():
        logits = built(**batch).logits[:, :-1].float()
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        built.train()
        found = built(**batch, labels=labels).loss
    if not torch.isfinite(found):
        raise WrongOutputError(f"the loss is {found}")
    assert_close(found, expected, "loss of a training step", "cross entropy of the logits")


def train(built: LorgnetteForConditionalGeneration, batch: dict[str, torch.Tensor]) -> None:
    """Train two steps; every trainable weight must get a gradient."""
    built.train()
    optimizer = torch.optim.AdamW([weight for weight in built.parameters() if weight.requires_grad], lr=1e-3)
    for _ in range(2):
        loss = built(**batch, labels=labels_of(built, batch)).loss
        loss.backward()
        if not torch.isfinite(loss):
            raise WrongOutputError(f"the loss is {loss}")
        idle = [name for name, weight in built.named_parameters() if weight.requires_grad and weight.grad is None]
        if idle:
            raise WrongOutputError(f"{len(idle)} weights that train get no gradient ({idle[0]}, …)")
        optimizer.step()
        optimizer.zero_grad()
    built.eval()


def check_generation(built: LorgnetteForConditionalGeneration, batch: dict[str, torch.Tensor]) -> None:
    """Generation with the cache gives the logits of one pass without it."""
    first = {name: value[:1] for name, value in batch.items()}
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    output = built.generate(**first, **settings, output_logits=True, return_dict_in_generate=True)
    whole = first | {"input_ids": output.sequences, "attention_mask": torch.ones_like(output.sequences)}
    with torch.no_grad():
        logits = built(**whole, use_cache=False).logits[:, -5:-1]
    assert_close(torch.stack(output.logits, dim=1), logits, "logits with the cache", "those without")


def check_packing(built: LorgnetteForConditionalGeneration) -> str:
    """Packed sequences give the logits of each alone; returns "yes", or why packing is refused."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCABULARY, (1, 12), generator=generator)
    sequence_ids = torch.tensor([[0] * 5 + [1] * 7])
    with torch.no_grad():
        try:
            together = built(ids, sequence_ids=sequence_ids).logits
        except ValueError as error:
            if "cannot be packed" not in str(error):
                raise
            return "no: " + shortened(error).partition(" ")[2].replace(": it cannot be packed", "")
        alone = torch.cat([built(ids[:, :5]).logits, built(ids[:, 5:]).logits], dim=1)
    assert_close(together, alone, "logits of packed sequences", "those of each alone")
    return "yes"


def set_hub_backbones(built: LorgnetteForConditionalGeneration, hub: TinyHub) -> None:
    """Record Hub ids as the backbones' sources, so that a thin save leaves them out."""
    hub.add("tiny/vision", built.vision_model)
    for part in ("vision", "text"):
        setattr(built.config, f"{part}_backbone", f"tiny/{part}")
        setattr(built.config, f"{part}_backbone_revision", hub.snapshot(f"tiny/{part}").name)


def check_reload(built: LorgnetteForConditionalGeneration, batch: dict[str, torch.Tensor], form: str, folder: Path):
    """Save in a format, load, and compare logits."""
    built.save_pretrained(folder, save_format=form)
    loaded = LorgnetteForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        ours, theirs = built(**batch).logits, loaded(**batch).logits
    if form == "full" and not torch.allclose(ours, theirs, rtol=0, atol=1e-6):  # some depend on memory alignment
        raise WrongOutputError(f"logits after loading differ by {(ours - theirs).abs().max():.2g}")
    assert_close(ours, theirs, "logits", "those after loading")


def assert_close(first: torch.Tensor, second: torch.Tensor, what: str, other: str) -> None:
    if first.shape != second.shape:
        raise WrongOutputError(f"{what} are {tuple(first.shape)}, {other} {tuple(second.shape)}")
    scale = float(second.abs().max().clamp(min=1.0))
    if not torch.allclose(first / scale, second / scale, **CLOSE):
        raise WrongOutputError(f"{what} and {other} differ by {(first - second).abs().max():.2g}, of {scale:.2g}")


def describe(error: Exception) -> str:
    """The error, and the last line of its traceback."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = "" if isinstance(error, WrongOutputError) else f" ({Path(last.filename).name}:{last.lineno})"
    return f"{type(error).__name__}: {shortened(error)}{place}"


def shortened(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:199] + "…"


# the reason why no tiny model can be built, where the error message is misleading
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
# instead of a timm backbone
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
# fields whose sizes do not follow from their names
FIELDS: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"use_cache": False},  # its default asks for layers that its config lacks
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
    "qwen4_exp": {"text_config": _INDEXER | _PER_LAYER_WORDS},  # as published
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
