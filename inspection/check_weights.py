"""Check that frozen weights and the original language model are unchanged, and measure LoRA."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..assembly.backbones import load_language_model, load_vision_model
from ..modeling.modeling_loading import is_unread
from ..modeling.modeling_lora import lora_layers
from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration
from ..processing.processing_lorgnette import LorgnetteProcessor
from .checks import Check, first_few, preserved_state, should_train


FROZEN = ("vision_model", "language_model")
QUESTION = "What is the capital of France?"  # any text without a picture


@dataclass(frozen=True)
class Original:
    """The frozen parts before training.

    Args:
        names: part to its source.
        digests: part to key to the SHA-256 of that tensor's bytes.
        logits: `(1, S, vocabulary)` of the bare language model on [`QUESTION`]; None if they are not known.
    """

    names: dict[str, str]
    digests: dict[str, dict[str, str]]
    logits: torch.Tensor | None

    @classmethod
    def from_sources(
        cls,
        model: LorgnetteForConditionalGeneration,
        processor: LorgnetteProcessor,
        vision: str | Path | None = None,
        text: str | Path | None = None,
    ) -> "Original":
        """Load the backbones again, from the config's sources or from the caller's.

        Args:
            vision, text: Hub ids or folders, `text` also a GGUF file; by default the sources in the config. Skips a
                part without a source, and a language model that is quantised or merged with LoRA, since its weights
                differ from its source's.

        Raises:
            OSError, ValueError: an invalid source, see [`~lorgnette.assembly.backbones`].
        """
        config, names, digests, logits = model.config, {}, {}, None
        sources = {
            "vision_model": (vision or config.vision_backbone, None if vision else config.vision_backbone_revision),
            "language_model": (text or config.text_backbone, None if text else config.text_backbone_revision),
        }
        if _why_modified(model):
            del sources["language_model"]
        for part, (source, revision) in sources.items():
            if source is None:
                continue
            load = load_vision_model if part == "vision_model" else load_language_model
            ours = model.get_submodule(part)
            attention = ours.config._attn_implementation
            backbone = load(source, revision, ours.dtype, attention).model.to(model.device).eval()
            names[part] = f"{source}" + (f" @ {revision[:8]}" if revision else "")
            digests[part] = digests_of(backbone)
            if part == "language_model":
                with torch.no_grad():
                    logits = backbone(**_question(processor, model.device)).logits
        return cls(names, digests, logits)

    @classmethod
    def from_model(cls, model: LorgnetteForConditionalGeneration, processor: LorgnetteProcessor) -> "Original":
        """The frozen parts as they are now, for a comparison after training."""
        names = dict.fromkeys(FROZEN, "the beginning of training")
        digests = {part: digests_of(model.get_submodule(part)) for part in FROZEN}
        return cls(names, digests, _bare_logits(model, processor))


def digests_of(part: nn.Module) -> dict[str, str]:
    """Key to SHA-256 of each tensor of a frozen part, without LoRA and without peft's `base_layer` in the names."""
    return {
        key.replace(".base_layer.", "."): hashlib.sha256(
            tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()
        ).hexdigest()
        for key, tensor in part.state_dict().items()
        if "lora_" not in key
    }


def check_frozen(model: LorgnetteForConditionalGeneration, original: Original) -> Check:
    """ViT and language model equal their sources, bit for bit."""
    name, title = "frozen", "Frozen weights are those of their source, bit for bit"
    compared, moved = [], []
    for part, expected in original.digests.items():
        found = digests_of(model.get_submodule(part))
        compared.append(f"{len(expected)} tensors of {part} with {original.names[part]}")
        keys = {key for key in found.keys() | expected.keys() if not is_unread(f"{part}.{key}")}
        moved += sorted(f"{part}.{key}" for key in keys if found.get(key) != expected.get(key))
    missing, altered = [part for part in FROZEN if part not in original.digests], _why_modified(model)
    options = {"vision_model": "--vision"} | ({} if altered else {"language_model": "--text"})
    wanted = " and ".join(options[part] for part in missing if part in options)
    advice = f"Give {wanted}: the Hub ids or folders that the backbones came from" if wanted else ""
    if not compared:
        return Check(name, title, None, "The sources of the backbones are not known", advice)
    finding = f"Compared {' and '.join(compared)}: " + (
        f"{len(moved)} differ ({first_few(moved)})" if moved else "none differs"
    )
    finding += f"; {' and '.join(missing)} could not be compared" if missing else ""
    finding += f": {altered}" if altered and "language_model" in missing else ""
    if moved:
        advice = (
            "The backbones were trained, or this model was made of other sources. Give the optimizer only the "
            "Q-Former, the projector and LoRA; call model.freeze() after code that changes requires_grad, and keep "
            "get_vision_features under torch.no_grad"
        )
    return Check(name, title, not moved, finding, advice, {"differing": len(moved), "first": moved[:20]})


def check_trainable(model: LorgnetteForConditionalGeneration) -> Check:
    """Exactly the Q-Former, the projector and the language model's LoRA have `requires_grad`."""
    wanted = {name for name, _ in model.named_parameters() if should_train(name)}
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    extra, lacking = sorted(trains - wanted), sorted(wanted - trains)
    finding, advice = f"{len(trains)} tensors train", ""
    if extra:
        finding += f"; {len(extra)} of them should be frozen ({first_few(extra)})"
        advice = "Call model.freeze() before you create the optimizer"
    if lacking:
        finding += f"; {len(lacking)} are frozen but should train ({first_few(lacking)})"
        advice = "Call model.freeze(): it makes Q-Former, projector and LoRA trainable, and freezes the rest"
    title = "Q-Former, projector and LoRA train, and nothing else"
    return Check("trainable", title, not extra and not lacking, finding, advice, {"extra": extra, "lacking": lacking})


def check_lora_place(model: LorgnetteForConditionalGeneration) -> Check:
    """LoRA is only in the language model, and it is there if the config has it."""
    inside = sorted(lora_layers(model.language_model))
    everywhere = sorted(name for name, module in model.named_modules() if hasattr(module, "lora_A"))
    outside = [name for name in everywhere if not name.startswith("language_model.")]
    title, advice = "LoRA is in the language model and nowhere else", ""
    finding = f"{len(inside)} layers of the language model have LoRA"
    wanted = model.config.lora_config is not None and model.config.saved_form != "merged"
    if outside:
        finding += f"; {len(outside)} layers outside of it have LoRA too ({first_few(outside)})"
        advice = (
            "peft matches layers by the ends of their names, and a ViT's names often equal an LM's. Let "
            "from_backbones(lora=…) attach LoRA"
        )
    elif wanted and not inside:
        finding += ", but lora_config is set"
        advice = "Load the model with from_pretrained, or build it with from_backbones(lora=…)"
    passed = not outside and (bool(inside) or not wanted)
    return Check("lora_place", title, passed, finding, advice, {"inside": len(inside), "outside": outside})


@torch.no_grad()
def check_lora_size(model: LorgnetteForConditionalGeneration) -> Check:
    """LoRA's update BA is neither zero nor as large as the weights that it is added to.

    Size is ‖s·BA‖ / ‖W‖ (Frobenius, s LoRA's scale). The effective rank is exp of the entropy of the singular values'
    shares (Roy & Vetterli 2007, definition 1): between 1 and r.
    """
    name, title = "lora_size", "LoRA's updates are not zero, and smaller than the weights that they adapt"
    layers, sizes, ranks, updates = lora_layers(model.language_model), {}, {}, {}
    for key, layer in layers.items():
        for adapter, a in layer.lora_A.items():
            a, b = a.weight.float(), layer.lora_B[adapter].weight.float()  # (r, in), (out, r)
            if not (a.isfinite().all() and b.isfinite().all()):
                updates[key], ranks[key] = float("inf"), 0.0
                continue
            # BA has the singular values of the product of both R factors
            values = torch.linalg.svdvals(torch.linalg.qr(b)[1] @ torch.linalg.qr(a.T)[1].T) * layer.scaling[adapter]
            updates[key] = values.norm().item()
            base = getattr(layer.base_layer, "weight", None)
            if base is not None and base.is_floating_point():  # no norm for quantised weights
                sizes[key] = updates[key] / base.float().norm().item()
            shares = values / values.sum()
            ranks[key] = torch.special.entr(shares).sum().exp().item() if updates[key] > 0 else 0.0
    if not updates:
        return Check(
            name,
            title,
            None,
            "The language model has no LoRA in linear layers",
            "from_backbones(lora={'r': 16}) attaches one",
        )
    r = model.config.lora_config.get("r", 8)
    idle = sorted(key for key, size in updates.items() if size == 0)
    wild = sorted(key for key in updates if updates[key] == float("inf") or sizes.get(key, 0) >= 1)
    finding = f"{len(layers)} layers: mean effective rank {_mean(ranks.values()):.1f} of {r}"
    if sizes:
        finding += f", mean size {_mean(sizes.values()):.2%} of the weights', largest {max(sizes.values()):.2%}"
    advice = ""
    if idle:
        finding += f"; {len(idle)} have an update of 0 ({first_few(idle)})"
        advice = (
            "LoRA's update is still 0 there: the model is not trained yet, the optimizer did not get LoRA, or the "
            "trained weights were not saved"
        )
    if wild:
        finding += f"; {len(wild)} are as large as the weights, or not finite ({first_few(wild)})"
        advice = "Lower the learning rate or lora_alpha, and clip gradients (max_grad_norm)"
    figures = {"r": r, "sizes": sizes, "effective_ranks": ranks, "by_kind": _by_kind(sizes), "idle": idle, "wild": wild}
    return Check(name, title, not idle and not wild, finding, advice, figures)


def check_text_only(
    model: LorgnetteForConditionalGeneration, processor: LorgnetteProcessor, original: Original
) -> Check:
    """Without a picture and with LoRA off, logits are the original language model's, bit for bit."""
    name, title = "text_only", "With LoRA off and no picture, the language model is the original one"
    if original.logits is None and _why_modified(model):
        return Check(name, title, None, f"The language model is not the original one: {_why_modified(model)}", "")
    if original.logits is None:
        advice = "Give --text: the Hub id, folder or GGUF file that the language model came from"
        return Check(name, title, None, "The original language model is not known", advice)
    theirs, ours = original.logits, _bare_logits(model, processor)
    equal = ours.shape == theirs.shape and torch.equal(ours, theirs)
    apart = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else float("inf")
    asked = f"{QUESTION!r}, against {original.names['language_model']}"
    finding = f"Logits on {asked}: " + ("equal, bit for bit" if equal else f"they differ by up to {apart:.3g}")
    advice = (
        "The language model's own weights changed, or LoRA stays active: see the check of frozen weights, and use "
        "model.disable_adapter()"
    )
    return Check(name, title, equal, finding, "" if equal else advice, {"largest_difference": apart})


def _why_modified(model: LorgnetteForConditionalGeneration) -> str:
    """Why the language model's weights differ from its source's on purpose; empty if they should not."""
    if getattr(model.language_model, "is_quantized", False):
        return "it is quantised"
    return "LoRA is merged into it" if model.config.saved_form == "merged" else ""


def _bare_logits(model: LorgnetteForConditionalGeneration, processor: LorgnetteProcessor) -> torch.Tensor:
    inputs = _question(processor, model.device)
    with preserved_state(model), torch.no_grad():
        if lora_layers(model.language_model):
            with model.disable_adapter():
                return model(**inputs).logits
        return model(**inputs).logits


def _question(processor: LorgnetteProcessor, device: torch.device) -> dict[str, torch.Tensor]:
    ids = torch.tensor([processor.encode_example(None, query=QUESTION, num_images=0)[0]], device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _by_kind(sizes: dict[str, float]) -> dict[str, float]:
    """Mean relative size by kind of layer: `self_attn.q_proj` to a number."""
    kinds = defaultdict(list)
    for key, size in sizes.items():
        kinds[".".join(key.split(".")[-2:])].append(size)
    return {kind: _mean(values) for kind, values in sorted(kinds.items())}


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
