"""Show a row of a batch as text, with its labels marked."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ..assembly.packing import PADDING
from ..modeling.modeling_checks import IGNORED
from ..processing.processing_lorgnette import LorgnetteProcessor


STYLES = {"learned": "bold green", "picture": "cyan", "prompt": "dim"}


def labelled_text(runs: Iterable[Sequence[str]], marks: tuple[str, str] = ("", "")) -> Text:
    """Runs of [`text_runs`] in colours; `marks` are put around those with labels."""
    before, after = marks
    return Text.assemble(
        *((f"{before}{text}{after}" if kind == "learned" else text, STYLES[kind]) for text, kind in runs)
    )


def text_runs(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], learned: list[bool], pictures: list[bool]
) -> list[list[str]]:
    """A row as runs of `[text, kind]`, the kinds being `prompt`, `picture` and `learned`."""
    runs: list[tuple[str, list[int]]] = []
    for token, is_learned, is_picture in zip(ids, learned, pictures, strict=True):
        kind = "learned" if is_learned else "picture" if is_picture else "prompt"
        if not runs or runs[-1][0] != kind:
            runs.append((kind, []))
        runs[-1][1].append(token)
    return [
        [f"<image> x {len(tokens)}" if kind == "picture" else tokenizer.decode(tokens), kind] for kind, tokens in runs
    ]


def rows_of(batch: Mapping[str, torch.Tensor], processor: LorgnetteProcessor) -> list[list[list[str]]]:
    """The rows of a batch as runs, without padding. In stage 1 every token of a text is learned."""
    mask = batch["attention_mask"].bool() if "attention_mask" in batch else batch["sequence_ids"] != PADDING
    if "text_ids" in batch:  # later texts repeat the prompt's last token
        texts = batch["text_ids"]
        mask = mask & ~((texts > 1) & (texts != texts.roll(1, dims=1)))
    rows = []
    for position, ids in enumerate(batch["input_ids"]):
        ids, present = ids[mask[position]], mask[position]
        if processor.is_stage1:
            tokenizer, learned, pictures = processor.qformer_tokenizer, ids == ids, ids != ids
        else:
            tokenizer, learned = processor.tokenizer, batch["labels"][position][present] != IGNORED
            pictures = ids == processor.image_token_id
        rows.append(text_runs(tokenizer, ids.tolist(), learned.tolist(), pictures.tolist()))
    return rows
