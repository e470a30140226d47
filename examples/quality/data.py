"""The data sets for measuring quality: `python -m examples.quality.data cifar|emoji|scenes`.

Each is saved by `save_to_disk`, a `datasets.DatasetDict` with the columns `image` and `text` at least; a
held-out split shares no picture with `train` and `validation`.
"""

import hashlib
import sys
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from ..sources import cifar, emoji
from ..sources.registry import scratch_directory
from . import scenes


CIFAR_TRAIN, CIFAR_VALIDATION, CIFAR_TEST = 3000, 500, 1000
CIFAR_FEATURES = Features({"image": Image(), "text": Value("string")})

# Training has a flat and a 3-D drawing of each concept; the held-out third style is flat too. With one of the other two
# held out, training would lack one kind of drawing.
HELD_OUT_STYLE = "twitter"
TEST_SHARE, VALIDATION_SHARE = 0.1, 0.025  # of the concepts
EMOJI_FEATURES = Features({"image": Image(), **{n: Value("string") for n in ("text", "style", "concept", "group")}})
SCENE_FEATURES = Features({
    "image": Image(),
    "text": Value("string"),
    "style": Value("string"),
    "objects": [{"name": Value("string"), "count": Value("int32")}],
    "relations": [[Value("string")]],
    "boxes": [{"name": Value("string"), "box": [Value("int32")]}],
})  # fmt: skip


def build_cifar(cache: Path) -> DatasetDict:
    """CIFAR-10's first photographs with their class' name (ten classes), in the packages' order, 32 x 32 RGB.

    `train`: 3,000 of the first training batch, `validation`: the next 500; `test`: 1,000 of the test batch.
    """
    training, held_out = cifar.read(cache)
    return DatasetDict(
        train=_photographs(*training, slice(0, CIFAR_TRAIN)),
        validation=_photographs(*training, slice(CIFAR_TRAIN, CIFAR_TRAIN + CIFAR_VALIDATION)),
        test=_photographs(*held_out, slice(0, CIFAR_TEST)),
    )


def build_emoji(cache: Path, seed: int = 0) -> DatasetDict:
    """Emoji on white with their human-written names, in two training styles and a held-out one.

    Columns: `image` (RGB, 64 or 256 px a side), `text`, `style`, `concept` (see `emoji.concept_of`), `group`.

    - `train`: two styles of seven eighths of the concepts; `validation`: the same styles of one fortieth of them.
    - `test_style`: the held-out style of `train`'s concepts.
    - `test_concept`: the training styles of the remaining tenth of the concepts.
    """
    known, cut_outs = emoji.read(cache)
    rows = {"train": [], "validation": [], "test_style": [], "test_concept": []}
    for style, pictures in cut_outs.items():
        for one in known:
            split = split_of(one.concept, seed)
            if style == HELD_OUT_STYLE:
                split = "test_style" if split == "train" else None
            if split is not None:
                columns = {"text": one.text, "style": style, "concept": one.concept, "group": one.group}
                rows[split].append({"image": on_white(pictures[one.code]), **columns})
    return DatasetDict({split: Dataset.from_list(row, features=EMOJI_FEATURES) for split, row in rows.items()})


def build_scenes(cache: Path, seed: int = 0) -> DatasetDict:
    """Emoji of some 60 concepts on plain colours and photographs, with captions that say what is where.

    Columns and splits: see `scenes.make`. `test_style` has the held-out style, all else the two training styles.
    Backgrounds of held-out pictures are of CIFAR-10's test batch.
    """
    known, cut_outs = emoji.read(cache)
    (training, _), (held_out, _) = cifar.read(cache)
    by_name = {style: {one.text: pictures[one.code] for one in known} for style, pictures in cut_outs.items()}
    trained = sorted(style for style in cut_outs if style != HELD_OUT_STYLE)
    rows = scenes.make(
        by_name,
        {split: training if split == "train" else held_out for split in scenes.SCENES},
        {split: [HELD_OUT_STYLE] if split == "test_style" else trained for split in scenes.SCENES},
        seed,
    )
    return DatasetDict({split: Dataset.from_list(row, features=SCENE_FEATURES) for split, row in rows.items()})


def split_of(concept: str, seed: int = 0) -> str:
    """The split of a concept in the training styles, by its hash, independent of other concepts."""
    digest = hashlib.sha256(f"{seed}:{concept}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64  # uniform in [0, 1)
    if share < TEST_SHARE:
        return "test_concept"
    return "validation" if share < TEST_SHARE + VALIDATION_SHARE else "train"


def on_white(picture: PILImage.Image) -> PILImage.Image:
    """An RGBA picture as RGB, on white."""
    return PILImage.alpha_composite(PILImage.new("RGBA", picture.size, "white"), picture).convert("RGB")


def save(splits: DatasetDict, folder: Path) -> None:
    """Save the data set and print its splits.

    Raises FileExistsError if the folder exists.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: name another folder, or delete it")
    with scratch_directory(folder) as unfinished:
        splits.save_to_disk(unfinished / "data")
        (unfinished / "data").rename(folder)
    sys.stdout.write(f"{folder}: {describe(splits)}\n")


def describe(splits: DatasetDict) -> str:
    """The number of rows of each split, as text."""
    return ", ".join(f"{name} {len(rows):,}" for name, rows in splits.items())


def _photographs(pictures: np.ndarray, labels: np.ndarray, part: slice) -> Dataset:
    """Raises ValueError if the batch is shorter than `part`."""
    if len(pictures) < part.stop:
        raise ValueError(f"photographs {part.start} to {part.stop} are wanted, the batch has {len(pictures)}")
    columns = {
        "image": [PILImage.fromarray(picture) for picture in pictures[part]],
        "text": [cifar.CLASSES[label] for label in labels[part]],
    }
    return Dataset.from_dict(columns, features=CIFAR_FEATURES)


BUILDERS = {"cifar": build_cifar, "emoji": build_emoji, "scenes": build_scenes}


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python -m examples.quality.data", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=BUILDERS)
    parser.add_argument("--output_dir", type=Path, required=True, help="where the data set is written")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where downloads are kept")
    args = parser.parse_args(argv)
    save(BUILDERS[args.name](args.cache), args.output_dir)


if __name__ == "__main__":
    main(sys.argv[1:])
