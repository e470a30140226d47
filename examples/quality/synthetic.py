"""Synthetic pairs for named concepts: emoji cut-outs in front of photographs, with template captions.

    python -m examples.quality.synthetic DATASET --output_dir LARGER --concepts frog "red apple" --pairs 20 --cap 0.25

LARGER gets DATASET with the pairs added to `train`, and in every split a column `synthetic` that marks them.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk
from PIL import Image
from tqdm import tqdm

from ..sources import cifar, emoji
from .data import CIFAR_TRAIN, CIFAR_VALIDATION, HELD_OUT_STYLE, save


SIDE = 112  # px
SCALE = (0.4, 0.9)  # size of the emoji, relative to the picture's side
TEMPLATES = ("{name}", "a picture of {name}", "{name} in front of a photograph")


def add_pairs(
    splits: DatasetDict,
    cache: Path,
    concepts: Sequence[str] | None = None,
    templates: Sequence[str] = TEMPLATES,
    pairs: int = 1,
    cap: float = 0.25,
    seed: int = 0,
) -> DatasetDict:
    """`splits` with up to `pairs` synthetic rows per concept in `train`, and the column `synthetic` (bool) in all.

    An emoji represents a concept if its name is the concept's; by default all texts of `train` that name an emoji are
    used. A concept must be among `train`'s texts, and the held-out style is not used, so that held-out data stay
    unseen. The number of pairs is limited to the fraction `cap` of `train`, evenly over the concepts. The photographs
    are CIFAR-10's, without those of `build_cifar`.

    Raises ValueError for a concept without an emoji or not in `train`, for a cap outside [0, 1), and if there would be
    no pair.
    """
    if not 0 <= cap < 1:
        raise ValueError(f"cap is {cap}; a share of the data set below 1 is wanted")
    known, cut_outs = emoji.read(cache)
    by_name, texts = {one.text: one for one in known}, set(splits["train"]["text"])
    concepts = [one.text for one in known if one.text in texts] if concepts is None else list(dict.fromkeys(concepts))
    for place, names in (("no emoji is", by_name), ("no text of the training split is", texts)):
        if unknown := [name for name in concepts if name not in names]:
            raise ValueError(f"{place} called {', '.join(map(repr, unknown))}")

    rng = np.random.default_rng(seed)
    (photographs, _), _ = cifar.read(cache)
    backgrounds = photographs[CIFAR_TRAIN + CIFAR_VALIDATION :]
    styles = [style for style in cut_outs if style != HELD_OUT_STYLE]
    count = min(len(concepts) * pairs, int(cap / (1 - cap) * len(splits["train"])))
    if not count:
        given = f"{len(concepts)} concepts, {pairs} pairs of each and a cap of {cap} on {len(splits['train'])} rows"
        raise ValueError(f"{given} make no pair at all")
    rng.shuffle(concepts)
    rows = []
    for number in tqdm(range(count), desc="composing", unit="pair"):
        one, style = by_name[concepts[number % len(concepts)]], str(rng.choice(styles))
        row = {"style": style, "concept": one.concept, "group": one.group, "synthetic": True}
        row["image"] = compose(cut_outs[style][one.code], rng.choice(backgrounds), rng)
        row["text"] = str(rng.choice(templates)).format(name=one.text)
        rows.append(row)

    marked = DatasetDict({k: rows.add_column("synthetic", np.zeros(len(rows), bool)) for k, rows in splits.items()})
    features = marked["train"].features
    made_up = Dataset.from_list([{name: row[name] for name in features} for row in rows], features=features)
    marked["train"] = concatenate_datasets([marked["train"], made_up])
    return marked


def compose(cut_out: Image.Image, background: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """The RGBA `cut_out`, at a random position in front of the (H, W, 3) uint8 `background`: RGB, 112 px a side."""
    picture = Image.fromarray(background).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    width = round(SIDE * rng.uniform(*SCALE))
    front = cut_out.resize((width, width), Image.Resampling.LANCZOS)
    picture.paste(front, tuple(rng.integers(0, SIDE - width + 1, 2).tolist()), mask=front)
    return picture


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python -m examples.quality.synthetic", description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path, help="what `python -m examples.quality.data` wrote")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the larger data set is written")
    parser.add_argument("--concepts", nargs="+", help="names as emojibase has them; left out, all of `train`")
    parser.add_argument("--templates", nargs="+", default=TEMPLATES, help="captions, {name} in place of the name")
    parser.add_argument("--pairs", type=int, default=1, help="made-up pairs a concept")
    parser.add_argument("--cap", type=float, default=0.25, help="the largest share of the training split they may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where downloads are kept")
    args = vars(parser.parse_args(argv))
    folder, real = args.pop("output_dir"), load_from_disk(args.pop("dataset"))
    splits = add_pairs(real, **args)
    save(splits, folder)
    made_up, rows = len(splits["train"]) - len(real["train"]), len(splits["train"])
    sys.stdout.write(f"made up: {made_up:,} of {rows:,} training rows, {made_up / rows:.1%}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
