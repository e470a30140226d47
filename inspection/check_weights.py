"""Are the frozen weights what they were, is the original language model still in there, and what has LoRA become?"""

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
from .checks import Check, belongs_to_training, some, undisturbed


FROZEN = ("vision_model", "language_model")
QUESTION = "What is the capital of France?"  # any text without a picture


@dataclass(frozen=True)
class Original:
    """What the frozen parts were before training.

    Args:
        names: part to where it came from.
        digests: part to key to the SHA-256 of that tensor's bytes.
        logits: `(1, S, vocabulary)` of the bare language model on [`QUESTION`]; None where it is not known.
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
        """Load the backbones again, from where the config says that they came from or from where the caller does.

        Args:
            vision, text: Hub ids or folders, `text` also a GGUF file; by default those that the config records. A part
                of which neither is known is left out, and so is a language model that is quantised or has LoRA folded
                into it, whose weights are others on purpose.

        Raises:
            OSError, ValueError: a source that is none, see [`~lorgnette.assembly.backbones`].
        """
        config, names, digests, logits = model.config, {}, {}, None
        sources = {
            "vision_model": (vision or config.vision_backbone, None if vision else config.vision_backbone_revision),
            "language_model": (text or config.text_backbone, None if text else config.text_backbone_revision),
        }
        if _altered(model):
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
        """What the frozen parts are now: to be compared with what they are after some training."""
        names = dict.fromkeys(FROZEN, "the beginning of training")
        digests = {part: digests_of(model.get_submodule(part)) for part in FROZEN}
        return cls(names, digests, _bare_logits(model, processor))


def digests_of(part: nn.Module) -> dict[str, str]:
    """Key to SHA-256 of each tensor of a frozen part; LoRA is left out, and its base layers go by their own names."""
    return {
        key.replace(".base_layer.", "."): hashlib.sha256(
            tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()
        ).hexdigest()
        for key, tensor in part.state_dict().items()
        if "lora_" not in key
    }


def check_frozen(model: LorgnetteForConditionalGeneration, original: Original) -> Check:
    """ViT and language model are their source's, bit for bit."""
    name, title = "frozen", "Frozen weights are those of their source, bit for bit"
    compared, moved = [], []
    for part, expected in original.digests.items():
        found = digests_of(model.get_submodule(part))
        compared.append(f"{len(expected)} tensors of {part} with {original.names[part]}")
        keys = {key for key in found.keys() | expected.keys() if not is_unread(f"{part}.{key}")}
        moved += sorted(f"{part}.{key}" for key in keys if found.get(key) != expected.get(key))
    missing, altered = [part for part in FROZEN if part not in original.digests], _altered(model)
    options = {"vision_model": "--vision"} | ({} if altered else {"language_model": "--text"})
    wanted = " and ".join(options[part] for part in missing if part in options)
    advice = f"Give {wanted}: the Hub ids or folders that the backbones came from" if wanted else ""
    if not compared:
        return Check(name, title, None, "It is not known where the backbones came from", advice)
    finding = f"Compared {' and '.join(compared)}: " + (
        f"{len(moved)} differ ({some(moved)})" if moved else "none differs"
    )
    finding += f"; {' and '.join(missing)} could not be compared" if missing else ""
    finding += f": {altered}" if altered and "language_model" in missing else ""
    if moved:
        advice = (
            "Something trained the backbones, or the sources are not those that this model was made of. Nothing but "
            "the Q-Former, the projector and LoRA may be given to the optimizer; call model.freeze() after whatever "
            "changed requires_grad, and keep get_vision_features under torch.no_grad"
        )
    return Check(name, title, not moved, finding, advice, {"differing": len(moved), "first": moved[:20]})


def check_trainable(model: LorgnetteForConditionalGeneration) -> Check:
    """What has `requires_grad` is the Q-Former, the projector and the language model's LoRA."""
    wanted = {name for name, _ in model.named_parameters() if belongs_to_training(name)}
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    extra, lacking = sorted(trains - wanted), sorted(wanted - trains)
    finding, advice = f"{len(trains)} tensors train", ""
    if extra:
        finding += f"; {len(extra)} of them are to be frozen ({some(extra)})"
        advice = "Call model.freeze(), which leaves gradients to what is to train, before the optimizer is made"
    if lacking:
        finding += f"; {len(lacking)} are frozen that are to train ({some(lacking)})"
        advice = "Call model.freeze(): it thaws Q-Former, projector and LoRA as well as freezing the rest"
    title = "Q-Former, projector and LoRA train, and nothing else"
    return Check("trainable", title, not extra and not lacking, finding, advice, {"extra": extra, "lacking": lacking})


def check_lora_place(model: LorgnetteForConditionalGeneration) -> Check:
    """LoRA is in the language model alone, and is there where the config has it."""
    inside = sorted(lora_layers(model.language_model))
    everywhere = sorted(name for name, module in model.named_modules() if hasattr(module, "lora_A"))
    outside = [name for name in everywhere if not name.startswith("language_model.")]
    title, advice = "LoRA is in the language model and nowhere else", ""
    finding = f"{len(inside)} layers of the language model have LoRA"
    wanted = model.config.lora_config is not None and model.config.saved_form != "merged"
    if outside:
        finding += f"; {len(outside)} layers elsewhere have it too ({some(outside)})"
        advice = (
            "A LoRA that was attached to the whole model matches layers by the ends of their names, and a ViT's are "
            "often called as an LM's. Let from_backbones(lora=…) attach it"
        )
    elif wanted and not inside:
        finding += ", and lora_config describes one"
        advice = "Load the model by from_pretrained, or make it by from_backbones(lora=…), which attach it"
    passed = not outside and (bool(inside) or not wanted)
    return Check("lora_place", title, passed, finding, advice, {"inside": len(inside), "outside": outside})


@torch.no_grad()
def check_lora_size(model: LorgnetteForConditionalGeneration) -> Check:
    """LoRA's update BA is neither nothing nor as large as the weights that it is added to.

    Size is ‖s·BA‖ / ‖W‖ (Frobenius, s LoRA's scale). The effective rank is exp of the entropy of the singular values'
    shares (Roy & Vetterli 2007, definition 1): between 1 and r.
    """
    name, title = "lora_size", "LoRA has learned something, and has not outgrown the weights that it adapts"
    layers, sizes, ranks, updates = lora_layers(model.language_model), {}, {}, {}
    for key, layer in layers.items():
        for adapter, a in layer.lora_A.items():
            a, b = a.weight.float(), layer.lora_B[adapter].weight.float()  # (r, in), (out, r)
            if not (a.isfinite().all() and b.isfinite().all()):
                updates[key], ranks[key] = float("inf"), 0.0
                continue
            # the singular values of BA are those of the small product of both triangles
            values = torch.linalg.svdvals(torch.linalg.qr(b)[1] @ torch.linalg.qr(a.T)[1].T) * layer.scaling[adapter]
            updates[key] = values.norm().item()
            base = getattr(layer.base_layer, "weight", None)
            if base is not None and base.is_floating_point():  # a quantised one tells no size
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
        finding += f"; {len(idle)} have an update of 0 ({some(idle)})"
        advice = (
            "LoRA begins at 0 and has not moved there: the model is not trained yet, LoRA was not given to the "
            "optimizer, or what was trained was not saved"
        )
    if wild:
        finding += f"; {len(wild)} are as large as the weights, or not finite ({some(wild)})"
        advice = "Lower the learning rate or lora_alpha, and see that gradients are clipped (max_grad_norm)"
    figures = {"r": r, "sizes": sizes, "effective_ranks": ranks, "by_kind": _by_kind(sizes), "idle": idle, "wild": wild}
    return Check(name, title, not idle and not wild, finding, advice, figures)


def check_text_only(
    model: LorgnetteForConditionalGeneration, processor: LorgnetteProcessor, original: Original
) -> Check:
    """Without a picture and with LoRA off, logits are the original language model's, bit for bit."""
    name, title = "text_only", "With LoRA off and no picture, the language model is the original one"
    if original.logits is None and _altered(model):
        return Check(name, title, None, f"The language model is not the original one: {_altered(model)}", "")
    if original.logits is None:
        advice = "Give --text: the Hub id, folder or GGUF file that the language model came from"
        return Check(name, title, None, "The original language model is not known", advice)
    theirs, ours = original.logits, _bare_logits(model, processor)
    equal = ours.shape == theirs.shape and torch.equal(ours, theirs)
    apart = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else float("inf")
    asked = f"{QUESTION!r}, against {original.names['language_model']}"
    finding = f"Logits on {asked}: " + ("equal, bit for bit" if equal else f"up to {apart:.3g} apart")
    advice = (
        "The language model's own weights have moved, or LoRA is not off when it should be: see the check of frozen "
        "weights, and use model.disable_adapter()"
    )
    return Check(name, title, equal, finding, "" if equal else advice, {"largest_difference": apart})


def _altered(model: LorgnetteForConditionalGeneration) -> str:
    """Why the language model's weights are others than its source's on purpose; nothing where they should not be."""
    if getattr(model.language_model, "is_quantized", False):
        return "it is quantised"
    return "LoRA is folded into it" if model.config.saved_form == "merged" else ""


def _bare_logits(model: LorgnetteForConditionalGeneration, processor: LorgnetteProcessor) -> torch.Tensor:
    inputs = _question(processor, model.device)
    with undisturbed(model), torch.no_grad():
        if lora_layers(model.language_model):
            with model.disable_adapter():
                return model(**inputs).logits
        return model(**inputs).logits


def _question(processor: LorgnetteProcessor, device: torch.device) -> dict[str, torch.Tensor]:
    ids = torch.tensor([processor.encode_example(None, query=QUESTION, num_images=0)[0]], device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _by_kind(sizes: dict[str, float]) -> dict[str, float]:
    """Mean size of layers of the same kind: `self_attn.q_proj` to a share of the weights'."""
    kinds = defaultdict(list)
    for key, size in sizes.items():
        kinds[".".join(key.split(".")[-2:])].append(size)
    return {kind: _mean(values) for kind, values in sorted(kinds.items())}


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
