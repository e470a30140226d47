"""Check that visual tokens are informative, and that answers depend on the picture."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..modeling.modeling_checks import IGNORED
from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration
from .check_text import PICTURE_KEYS
from .checks import Check, preserved_state


MAX_MEAN_COSINE = 0.99  # mean cosine between two visual tokens of a picture; from here on they count as equal
MIN_NORM_RATIO, MAX_NORM_RATIO = 0.05, 100.0  # norm of visual tokens over norm of word embeddings
MAX_P_VALUE = 0.01  # below it, answers depend on the picture
MIN_GAP = 0.02  # the least relative drop of the loss by the right pictures: a significant drop may still be small
MIN_ROWS = 8  # with fewer the p-value cannot fall below MAX_P_VALUE
RELIABLE_ROWS = 32  # with fewer a small difference may not be significant
SIGN_FLIPS = 10_000


@torch.no_grad()
def visual_tokens(
    model: LorgnetteForConditionalGeneration, batches: Sequence[Mapping[str, torch.Tensor]]
) -> torch.Tensor | None:
    """`(N, Q, M)` float32 visual tokens of all pictures in the batches; None without batches."""
    keys = (*PICTURE_KEYS, "image_rows", "qformer_input_ids", "qformer_attention_mask")
    with preserved_state(model):
        outputs = [
            model.get_image_features(**{key: batch[key] for key in keys if key in batch}).pooler_output.float()
            for batch in batches
        ]
    return torch.cat(outputs) if outputs else None


@torch.no_grad()
def check_visual_norm(model: LorgnetteForConditionalGeneration, visual: torch.Tensor | None) -> Check:
    """The norm of visual tokens is in the range of the language model's word embeddings.

    Args:
        visual: `(N, Q, M)`.
    """
    name, title = "visual_norm", "Visual tokens have about the norm of the language model's word embeddings"
    if visual is None:
        return Check(name, title, None, "There are no pictures", "Give --image or --dataset")
    table = model.get_input_embeddings()
    count = min(table.num_embeddings, 4096)
    ids = torch.linspace(0, table.num_embeddings - 1, count, device=model.device).long()
    words = table(ids).float().norm(dim=-1).median().item()  # called, since some scale their output
    pictures = visual.norm(dim=-1).median().item()
    ratio = pictures / words
    passed = MIN_NORM_RATIO < ratio < MAX_NORM_RATIO
    finding = f"Median norm {pictures:.3g}, of word embeddings {words:.3g}: {ratio:.3g} times"
    advice = (
        "Visual tokens that are far smaller than the text's embeddings are ignored, and far larger ones dominate: "
        "lower the learning rate of the projector, or initialise it again"
    )
    figures = {"visual_tokens": pictures, "words": words, "ratio": ratio}
    return Check(name, title, passed, finding, "" if passed else advice, figures)


def check_queries(visual: torch.Tensor | None) -> Check:
    """A picture's visual tokens differ from each other.

    Args:
        visual: `(N, Q, M)`.
    """
    name, title = "queries", "Queries have not collapsed"
    if visual is None:
        return Check(name, title, None, "There are no pictures", "Give --image or --dataset")
    if visual.shape[1] < 2:
        return Check(name, title, None, "There is one query", "")
    if not visual.isfinite().all():
        finding = f"{int((~visual.isfinite()).any(-1).sum())} of {visual[..., 0].numel()} visual tokens are not finite"
        return Check(name, title, False, finding, "Find the weights that are not finite; the loss was not, either")
    directions = torch.nn.functional.normalize(visual, dim=-1)
    cosines = (directions @ directions.transpose(1, 2)).mean(0)  # (Q, Q)
    pairs = ~torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)
    mean = cosines[pairs].mean().item()
    values = torch.linalg.svdvals(visual) ** 2  # (N, min(Q, M)); shares of the picture's energy
    rank = torch.special.entr(values / values.sum(-1, keepdim=True)).sum(-1).exp().mean().item()
    finding = (
        f"Mean cosine between two of a picture's {visual.shape[1]} visual tokens {mean:.3f}, effective rank {rank:.1f}"
    )
    figures: dict[str, Any] = {"mean_cosine": mean, "effective_rank": rank, "cosines": cosines.tolist()}
    if len(visual) > 1:
        across = directions.transpose(0, 1) @ directions.permute(1, 2, 0)  # (Q, N, N)
        others = ~torch.eye(len(visual), dtype=torch.bool, device=visual.device)
        figures["between_pictures"] = across[:, others].mean().item()
        finding += f"; between two pictures, at the same query, {figures['between_pictures']:.3f}"
    passed = mean < MAX_MEAN_COSINE
    advice = (
        f"All {visual.shape[1]} visual tokens are nearly equal. Check that query_tokens do not hold one value, "
        "start from a stage-1 model or a BERT (qformer=), and lower the learning rate. If the right pictures still "
        "lower the loss much, the outputs need only one feature of a picture"
    )
    return Check(name, title, passed, finding, "" if passed else advice, figures)


def check_sees(
    model: LorgnetteForConditionalGeneration, batches: Sequence[Mapping[str, torch.Tensor]], seed: int = 0
) -> Check:
    """Outputs have a lower loss with their own picture than with another row's.

    Measures each row's loss (mean nats a token of its output) with its own picture, with that of a row with another
    output, with mean grey (0 after normalisation) and with noise. The p-value comes from a paired sign-flip test of the
    differences between the first two (Phipson & Smyth 2010, equation 2).

    Args:
        batches: with `labels` and one image a row, on the model's device.
    """
    name, title = "sees", "Answers depend on the picture"
    batches = [_with_picture_per_row(batch) for batch in batches]
    rows = sum(len(batch["input_ids"]) for batch in batches)
    if rows < MIN_ROWS:
        finding = f"{rows} rows with outputs; at least {MIN_ROWS} are needed"
        return Check(name, title, None, finding, "Give --dataset, and more --rows")
    if any(_images(batch) != len(batch["input_ids"]) for batch in batches):
        return Check(name, title, None, "Rows need exactly one image each, so that rows can exchange them", "")
    learned = [zip(batch["input_ids"], batch["labels"] != IGNORED, strict=True) for batch in batches]
    outputs = [tuple(ids[mask].tolist()) for pairs in learned for ids, mask in pairs]
    partners = other_rows(outputs, seed)
    moved = np.array([outputs[row] != outputs[partner] for row, partner in enumerate(partners)])
    if moved.sum() < MIN_ROWS:
        finding = f"{len(set(outputs))} different outputs in {rows} rows: too few to exchange pictures"
        return Check(name, title, None, finding, "Give rows whose texts differ")
    generator = torch.Generator().manual_seed(seed)
    keys = [key for key in PICTURE_KEYS if key in batches[0]]
    pool = {key: torch.cat([batch[key] for batch in batches]) for key in keys}
    kinds = {"right": pool, "shuffled": {key: value[partners] for key, value in pool.items()}}
    if "pixel_values" in pool:
        pixels = pool["pixel_values"]
        noise = torch.randn(pixels.shape, generator=generator).to(pixels)
        kinds |= {kind: pool | {"pixel_values": shown} for kind, shown in
                  {"blank": torch.zeros_like(pixels), "noise": noise}.items()}  # fmt: skip
    losses = {kind: _row_losses(model, batches, shown) for kind, shown in kinds.items()}
    gaps = (losses["shuffled"] - losses["right"])[moved]
    p_value = sign_flip(gaps, seed)
    means = {kind: float(values[moved].mean()) for kind, values in losses.items()}
    gap = 1 - means["right"] / means["shuffled"] if means["shuffled"] else 0.0  # a loss of 0 with any picture
    passed = gap > MIN_GAP and p_value < MAX_P_VALUE
    finding = ", ".join(f"{kind} {mean:.3f}" for kind, mean in means.items())
    finding = f"Loss on {moved.sum()} rows, by picture: {finding} nats a token"
    finding += f"; the right ones lower it by {gap:.1%}, p = {p_value:.2g}"
    advice = (
        "The answers do not depend on the picture. Check that pictures and texts of the training rows match, that the "
        "other checks are green, and train longer, from a stage-1 Q-Former"
    )
    if moved.sum() < RELIABLE_ROWS:
        advice += f". Or {moved.sum()} rows are too few: give more --rows"
    return Check(
        name, title, passed, finding, "" if passed else advice, {"losses": means, "gap": gap, "p_value": p_value}
    )


def other_rows(outputs: Sequence[Any], seed: int) -> np.ndarray:
    """A permutation of the rows: each row gets a row with another output, if that is possible for all."""
    order = np.random.default_rng(seed).permutation(len(outputs))
    ranks = {output: rank for rank, output in enumerate(dict.fromkeys(outputs))}
    order = order[np.argsort([ranks[outputs[row]] for row in order], kind="stable")]  # sorted by output
    most = max(np.bincount([ranks[output] for output in outputs]))
    partners = np.empty(len(outputs), dtype=int)
    partners[order] = np.roll(order, most)
    return partners


def sign_flip(differences: np.ndarray, seed: int = 0) -> float:
    """p-value of a mean above 0, by flipping the signs of `(rows,)` differences at random."""
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (SIGN_FLIPS, len(differences)))
    return float(1 + ((signs * differences).mean(1) >= differences.mean()).sum()) / (1 + SIGN_FLIPS)


def _row_losses(
    model: LorgnetteForConditionalGeneration,
    batches: Sequence[Mapping[str, torch.Tensor]],
    shown: Mapping[str, torch.Tensor],
) -> np.ndarray:
    """`(rows,)` mean nats a token of each row's output, with the given pictures in the rows' order."""
    losses, first = [], 0
    with preserved_state(model), torch.no_grad():
        for batch in batches:
            last = first + len(batch["input_ids"])
            labels = batch["labels"][:, 1:]
            inputs = {key: value for key, value in batch.items() if key not in ("labels", *PICTURE_KEYS)}
            logits = model(**inputs, **{key: value[first:last] for key, value in shown.items()}).logits
            nats = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
            )
            losses.append(nats.sum(1) / (labels != IGNORED).sum(1))
            first = last
    return torch.cat(losses).double().cpu().numpy()


def _with_picture_per_row(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with one picture entry per image, also where images share an entry."""
    spread = dict(batch)
    rows = spread.pop("image_rows", None)
    if rows is not None:
        spread |= {key: spread[key][rows] for key in PICTURE_KEYS if key in spread}
    return spread


def _images(batch: Mapping[str, torch.Tensor]) -> int:
    return next((len(batch[key]) for key in PICTURE_KEYS if key in batch), 0)
