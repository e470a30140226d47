"""Scenes: two to four emoji on a background, with captions that say what and where; see `scene_captions`.

A picture has two or three groups, each of one concept. A relation is true of two groups if it is of each cut-out of one
with each of the other: their centres are at least MARGIN apart along one axis, and DOMINANCE times as far as along the
other. So of every two groups one relation is true, and a picture has one caption: the first group is left of, or above,
the second; a third is beside both along the other axis.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from .scene_captions import ABOVE, CONCEPTS, DIRECTIONS, LEFT, Relation, caption, relation_of


SIDE = 112  # px
EDGE, GAP = 2, 2  # px at least around the picture, and between two boxes
MARGIN, DOMINANCE = 20, 1.5
SIZES = {2: (36, 56), 3: (30, 44), 4: (27, 37)}  # px of a cut-out's longer side, by the number of cut-outs
COUNTS = {2: [(1, 1)], 3: [(1, 2), (2, 1), (1, 1, 1)], 4: [(1, 3), (3, 1), (2, 2), (1, 1, 2), (1, 2, 1), (2, 1, 1)]}
PROPOSALS, DRAWS = 500, 10_000
LARGEST_CUT_OUT = 64  # px: what the smaller styles have

SCENES = {"train": 4000, "validation": 200, "test_combination": 300, "test_style": 300, "test_position": 300}
COMBINATION_SHARE, POSITION_SHARE = 0.1, 0.1  # of the pairs of concepts


@dataclass(frozen=True)
class Plan:
    """A scene without places. `groups`: (name, count); `place`: the direction of a third group from both others."""

    groups: tuple[tuple[str, int], ...]
    relation: str
    place: str | None

    @property
    def names(self) -> list[str]:
        """A name for each cut-out."""
        return [name for name, count in self.groups for _ in range(count)]

    @property
    def relations(self) -> list[Relation]:
        """That of the first two groups first."""
        first, second, *third = [name for name, _ in self.groups]
        return [
            (first, self.relation, second),
            *(relation_of(c, self.place, n) for c in third for n in (first, second)),
        ]


def make(
    cut_outs: Mapping[str, Mapping[str, Image.Image]],
    photographs: Mapping[str, np.ndarray],
    styles: Mapping[str, Sequence[str]],
    seed: int = 0,
) -> dict[str, list[dict[str, Any]]]:
    """The rows of each split: `image` (RGB, 112 x 112), `text`, `style`, `objects`, `relations`, `boxes`.

    - `train`, `validation`: no pair of concepts that is held out, and some pairs in one order alone (see `order_of`).
    - `test_style`: every pair of concepts is one of `train`.
    - `test_combination`: the first two concepts are a pair that is held out.
    - `test_position`: the first two concepts have an order that `train` has the other way round alone.

    Other pairs in the last two are as in `train`.

    Args:
        cut_outs: style -> concept -> RGBA picture, of any size.
        photographs: split -> (N, H, W, 3) uint8, for backgrounds.
        styles: split -> the styles that it takes in turn; a picture has one.

    Raises:
        ValueError: a concept without a cut-out.
    """
    trimmed = {}
    for style in sorted({style for names in styles.values() for style in names}):
        if missing := [name for name in CONCEPTS if name not in cut_outs[style]]:
            raise ValueError(f"no emoji of style {style} is called {', '.join(map(repr, missing))}")
        trimmed[style] = {name: trim(cut_outs[style][name]) for name in CONCEPTS}
    rows, seen = {}, set()
    for number, (split, count) in enumerate(SCENES.items()):
        rows[split], pairs = [], {frozenset((first, second)) for first, _, second in seen}
        for index in range(count):
            rng = np.random.default_rng((seed, number, index))
            plan = next(plan for plan in plans(rng) if belongs(plan, split, seen, pairs, seed))
            style = styles[split][index % len(styles[split])]
            rows[split].append(render(plan, trimmed[style], photographs[split], rng) | {"style": style})
            if split == "train":
                seen |= set(plan.relations)
    return rows


def plans(rng: np.random.Generator) -> Iterator[Plan]:
    """Random plans; raises ValueError after DRAWS of which none was taken."""
    for _ in range(DRAWS):
        shapes = COUNTS[int(rng.integers(2, 5))]
        counts = shapes[rng.integers(len(shapes))]
        names = [CONCEPTS[n] for n in rng.choice(len(CONCEPTS), len(counts), replace=False)]
        relation = (LEFT, ABOVE)[rng.integers(2)]
        directions = [direction for direction, (along, _) in DIRECTIONS.items() if along != relation]
        place = directions[rng.integers(2)] if len(counts) == 3 else None
        yield Plan(tuple(zip(names, counts, strict=True)), relation, place)
    raise ValueError(f"none of {DRAWS} random scenes was one of this split: too few scenes, or concepts, in `train`")


def belongs(plan: Plan, split: str, seen: set[Relation], pairs: set[frozenset[str]], seed: int) -> bool:
    """Whether a plan is one of this split; `seen`: the relations of `train`; `pairs`: of which concepts they are."""
    main = plan.relations[0]
    trained = [is_trained(relation, seed) for relation in plan.relations]
    if split == "test_combination":
        return order_of(main[0], main[2], seed) == "held out" and all(trained[1:])
    if split == "test_position":
        return not trained[0] and main[::-1] in seen and all(trained[1:])
    known = split != "test_style" or all(frozenset((first, second)) in pairs for first, _, second in plan.relations)
    return known and all(trained)


def is_trained(relation: Relation, seed: int) -> bool:
    """Whether training may have a relation."""
    order = order_of(relation[0], relation[2], seed)
    return order == "any" or order == relation[0]


@cache
def order_of(one: str, other: str, seed: int) -> str:
    """How training has a pair: "any", "held out", or the concept that is always left of, or above, the other.

    By the pair's hash, independent of other pairs.
    """
    first, second = sorted((one, other))
    digest = hashlib.sha256(f"{seed}:{first}:{second}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64  # uniform in [0, 1)
    if share < COMBINATION_SHARE:
        return "held out"
    if share < COMBINATION_SHARE + POSITION_SHARE:
        return (first, second)[digest[8] % 2]
    return "any"


def trim(picture: Image.Image) -> Image.Image:
    """An RGBA picture without its transparent margins, its longer side LARGEST_CUT_OUT px."""
    opaque = picture.getchannel("A").point(lambda alpha: 255 * (alpha > 16))
    return scaled(picture.crop(opaque.getbbox()), LARGEST_CUT_OUT)


def scaled(picture: Image.Image, side: int) -> Image.Image:
    """With a longer side of `side` px."""
    width, height = (max(1, round(side * length / max(picture.size))) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def render(
    plan: Plan, cut_outs: Mapping[str, Image.Image], photographs: np.ndarray, rng: np.random.Generator
) -> dict[str, Any]:
    """A plan's row: `image`, `text`, `objects`, `relations`, and `boxes` (name, and left, top, right, bottom in px)."""
    names, boxes = plan.names, None
    while boxes is None:
        low, high = SIZES[len(names)]
        pictures = [scaled(cut_outs[name], int(rng.integers(low, high + 1))) for name in names]
        boxes = places(plan, [picture.size for picture in pictures], rng)
    image = background(photographs, rng)
    for picture, box in zip(pictures, boxes, strict=True):
        image.paste(picture, tuple(box[:2]), mask=picture)
    return {
        "image": image,
        "text": caption(plan.groups, plan.relation, plan.place),
        "objects": [{"name": name, "count": count} for name, count in plan.groups],
        "relations": [list(relation) for relation in plan.relations],
        "boxes": [{"name": name, "box": box} for name, box in zip(names, boxes, strict=True)],
    }


def places(plan: Plan, sizes: Sequence[tuple[int, int]], rng: np.random.Generator) -> list[list[int]] | None:
    """Boxes (left, top, right, bottom) of these sizes (width, height) of which all relations are true, without overlap.

    None if PROPOSALS random ones have none.
    """
    names, extents = plan.names, np.array(sizes)
    shares = rng.random((PROPOSALS, *extents.shape))  # (P, cut-outs, 2): 0 is left, or the top
    # the order that the plan wants, since few random ones have it
    along, pair = (0 if plan.relation == LEFT else 1), sum(count for _, count in plan.groups[:2])
    shares[:, :pair, along] = np.sort(shares[:, :pair, along], axis=1)
    if plan.place is not None:
        after = plan.place in ("right", "below")
        ordered = np.sort(shares[..., 1 - along], axis=1)[:, :: 1 if after else -1]
        shares[..., 1 - along] = np.concatenate([rng.permuted(ordered[:, :pair], axis=1), ordered[:, pair:]], axis=1)
    starts = (EDGE + shares * (SIDE - 2 * EDGE - extents)).round().astype(int)
    ends = starts + extents

    right = np.ones(PROPOSALS, bool)
    for i, j in combinations(range(len(names)), 2):
        gaps = np.maximum(starts[:, i] - ends[:, j], starts[:, j] - ends[:, i])
        right &= (gaps >= GAP).any(axis=1)
    for first, relation, second in plan.relations:
        for i, j in product(*([k for k, other in enumerate(names) if other == name] for name in (first, second))):
            right &= is_true(relation, (starts + ends)[:, i] / 2, (starts + ends)[:, j] / 2)
    found = np.concatenate([starts, ends], axis=2)[right]
    return found[0].tolist() if len(found) else None


def is_true(relation: str, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whether LEFT or ABOVE is true of centres (…, 2), in x and y."""
    apart = second - first
    along, across = (0, 1) if relation == LEFT else (1, 0)
    return (apart[..., along] >= MARGIN) & (apart[..., along] >= DOMINANCE * np.abs(apart[..., across]))


def background(photographs: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """A plain pale colour, a gradient between two, or a photograph, blurred and lightened; RGB, SIDE px a side."""
    kind = rng.choice(["plain", "gradient", "photograph"], p=[0.25, 0.25, 0.5])
    if kind == "photograph":
        picture = Image.fromarray(photographs[rng.integers(len(photographs))]).resize((SIDE, SIDE), Image.BICUBIC)
        picture = picture.filter(ImageFilter.GaussianBlur(6))
        return Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.5)
    colours = rng.integers(150, 250, (2, 3))
    if kind == "plain":
        return Image.new("RGB", (SIDE, SIDE), tuple(colours[0].tolist()))
    slope = rng.uniform(-1, 1, 2)
    across = np.add.outer(*(s * np.linspace(-1, 1, SIDE) for s in slope))
    share = (across - across.min()) / np.ptp(across)  # 0 to 1
    return Image.fromarray((colours[0] + share[..., None] * (colours[1] - colours[0])).astype(np.uint8))
