"""Do the soft tokens say anything, and do the answers depend on the picture?"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..modeling.modeling_checks import IGNORED
from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration
from .check_words import PICTURE_KEYS
from .checks import Check, undisturbed


COLLAPSED = 0.99  # mean cosine between two soft tokens of a picture, from which on they say the same
FAINT, LOUD = 0.05, 100.0  # soft tokens' norm in word embeddings' norms
CHANCE = 0.01  # p-value below which answers are taken to depend on the picture
GAP = 0.02  # least share of the loss that right pictures take off: what is surely not nothing may still be little
FEWEST = 8  # rows: with fewer the p-value cannot be that small
ENOUGH = 32  # rows: with fewer a small difference may not show
FLIPS = 10_000


@torch.no_grad()
def soft_tokens(
    model: LorgnetteForConditionalGeneration, batches: Sequence[Mapping[str, torch.Tensor]]
) -> torch.Tensor | None:
    """`(N, Q, M)` float32 of all pictures in the batches; None where there are none."""
    keys = (*PICTURE_KEYS, "image_rows", "qformer_input_ids", "qformer_attention_mask")
    with undisturbed(model):
        seen = [
            model.get_image_features(**{key: batch[key] for key in keys if key in batch}).pooler_output.float()
            for batch in batches
        ]
    return torch.cat(seen) if seen else None


@torch.no_grad()
def check_soft_norm(model: LorgnetteForConditionalGeneration, soft: torch.Tensor | None) -> Check:
    """Soft tokens are of a size that the language model can read.

    Args:
        soft: `(N, Q, M)`.
    """
    name, title = "soft_norm", "Soft tokens are about as large as the language model's word embeddings"
    if soft is None:
        return Check(name, title, None, "There are no pictures", "Give --image or --dataset")
    table = model.get_input_embeddings()
    count = min(table.num_embeddings, 4096)
    ids = torch.linspace(0, table.num_embeddings - 1, count, device=model.device).long()
    words = table(ids).float().norm(dim=-1).median().item()  # called, not read: some scale what they look up
    pictures = soft.norm(dim=-1).median().item()
    ratio = pictures / words
    passed = FAINT < ratio < LOUD
    finding = f"Median norm {pictures:.3g}, of word embeddings {words:.3g}: {ratio:.3g} times"
    advice = (
        "What is far smaller is drowned by the words around it, what is far larger drowns them: lower the learning "
        "rate of the projector, or begin from its initialisation again"
    )
    figures = {"soft_tokens": pictures, "words": words, "ratio": ratio}
    return Check(name, title, passed, finding, "" if passed else advice, figures)


def check_queries(soft: torch.Tensor | None) -> Check:
    """A picture's soft tokens differ from each other.

    Args:
        soft: `(N, Q, M)`.
    """
    name, title = "queries", "Queries have not collapsed into one"
    if soft is None:
        return Check(name, title, None, "There are no pictures", "Give --image or --dataset")
    if soft.shape[1] < 2:
        return Check(name, title, None, "There is one query", "")
    if not soft.isfinite().all():
        finding = f"{int((~soft.isfinite()).any(-1).sum())} of {soft[..., 0].numel()} soft tokens are not finite"
        return Check(name, title, False, finding, "Look for weights that are not finite: the loss was not, either")
    directions = torch.nn.functional.normalize(soft, dim=-1)
    cosines = (directions @ directions.transpose(1, 2)).mean(0)  # (Q, Q)
    pairs = ~torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)
    mean = cosines[pairs].mean().item()
    values = torch.linalg.svdvals(soft) ** 2  # (N, min(Q, M)); shares of the picture's energy
    rank = torch.special.entr(values / values.sum(-1, keepdim=True)).sum(-1).exp().mean().item()
    finding = (
        f"Mean cosine between two of a picture's {soft.shape[1]} soft tokens {mean:.3f}, effective rank {rank:.1f}"
    )
    figures: dict[str, Any] = {"mean_cosine": mean, "effective_rank": rank, "cosines": cosines.tolist()}
    if len(soft) > 1:
        across = directions.transpose(0, 1) @ directions.permute(1, 2, 0)  # (Q, N, N)
        others = ~torch.eye(len(soft), dtype=torch.bool, device=soft.device)
        figures["between_pictures"] = across[:, others].mean().item()
        finding += f"; between the same one of two pictures {figures['between_pictures']:.3f}"
    passed = mean < COLLAPSED
    advice = (
        f"The language model is given one soft token {soft.shape[1]} times. See that query_tokens were not filled with "
        "one value, begin from a stage-1 model or a BERT (qformer=), and lower the learning rate. Where the right "
        "pictures take much off the loss all the same, outputs ask for no more than one thing of a picture"
    )
    return Check(name, title, passed, finding, "" if passed else advice, figures)


def check_sees(
    model: LorgnetteForConditionalGeneration, batches: Sequence[Mapping[str, torch.Tensor]], seed: int = 0
) -> Check:
    """Outputs are likelier beside their own picture than beside another row's.

    The loss of each row (mean nats a token of its output) is measured with its own picture, that of a row with another
    output, mean grey (0 after normalisation) and noise. The p-value is of a paired sign-flip test of the differences
    between the first two (Phipson & Smyth 2010, equation 2): the chance of such a mean where pictures do not matter.

    Args:
        batches: with `labels` and one image a row, on the model's device.
    """
    name, title = "sees", "Answers depend on the picture"
    batches = [_spread(batch) for batch in batches]
    rows = sum(len(batch["input_ids"]) for batch in batches)
    if rows < FEWEST:
        finding = f"{rows} rows with outputs; with fewer than {FEWEST} nothing can be said"
        return Check(name, title, None, finding, "Give --dataset, and more --rows")
    if any(_images(batch) != len(batch["input_ids"]) for batch in batches):
        return Check(name, title, None, "Rows with several images, or none, cannot change them", "")
    learned = [zip(batch["input_ids"], batch["labels"] != IGNORED, strict=True) for batch in batches]
    outputs = [tuple(ids[mask].tolist()) for pairs in learned for ids, mask in pairs]
    partners = strangers(outputs, seed)
    moved = np.array([outputs[row] != outputs[partner] for row, partner in enumerate(partners)])
    if moved.sum() < FEWEST:
        finding = f"{len(set(outputs))} different outputs in {rows} rows: there are no other pictures to compare with"
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
    chance = sign_flip(gaps, seed)
    means = {kind: float(values[moved].mean()) for kind, values in losses.items()}
    gap = 1 - means["right"] / means["shuffled"] if means["shuffled"] else 0.0  # sure of it beside any picture
    passed = gap > GAP and chance < CHANCE
    finding = ", ".join(f"{kind} {mean:.3f}" for kind, mean in means.items())
    finding = f"Loss on {moved.sum()} rows, by picture: {finding} nats a token"
    finding += f"; the right ones take off {gap:.1%}, p = {chance:.2g}"
    advice = (
        "The model speaks without looking. See that pictures and texts of the training rows belong together, that the "
        "other checks are green, and train longer, from a stage-1 Q-Former"
    )
    if moved.sum() < ENOUGH:
        advice += f". Or {moved.sum()} rows are too few to tell: give more --rows"
    return Check(
        name, title, passed, finding, "" if passed else advice, {"losses": means, "gap": gap, "p_value": chance}
    )


def strangers(outputs: Sequence[Any], seed: int) -> np.ndarray:
    """For each row another one, no row twice, whose output is another where that can be for all."""
    order = np.random.default_rng(seed).permutation(len(outputs))
    ranks = {output: rank for rank, output in enumerate(dict.fromkeys(outputs))}
    order = order[np.argsort([ranks[outputs[row]] for row in order], kind="stable")]  # like outputs side by side
    most = max(np.bincount([ranks[output] for output in outputs]))
    partners = np.empty(len(outputs), dtype=int)
    partners[order] = np.roll(order, most)
    return partners


def sign_flip(differences: np.ndarray, seed: int = 0) -> float:
    """p-value of a mean above 0, by flipping the signs of `(rows,)` differences at random."""
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (FLIPS, len(differences)))
    return float(1 + ((signs * differences).mean(1) >= differences.mean()).sum()) / (1 + FLIPS)


def _row_losses(
    model: LorgnetteForConditionalGeneration,
    batches: Sequence[Mapping[str, torch.Tensor]],
    shown: Mapping[str, torch.Tensor],
) -> np.ndarray:
    """`(rows,)` mean nats a token of each row's output, with these pictures in the rows' order."""
    losses, first = [], 0
    with undisturbed(model), torch.no_grad():
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


def _spread(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with a picture for each image, also where several are one."""
    spread = dict(batch)
    rows = spread.pop("image_rows", None)
    if rows is not None:
        spread |= {key: spread[key][rows] for key in PICTURE_KEYS if key in spread}
    return spread


def _images(batch: Mapping[str, torch.Tensor]) -> int:
    return next((len(batch[key]) for key in PICTURE_KEYS if key in batch), 0)
