"""Scenes: captions are true of what is drawn, held-out scenes are, and figures count what answers say."""

import colorsys
import json
from functools import cache as once

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny_sources import cifar_archive, emoji_archives

from examples.quality import data, measure, scene_figures, scenes
from examples.quality.measure import score, score_shuffled
from examples.quality.rows import TASKS
from examples.quality.scene_captions import CONCEPTS, Scene, caption, parse, phrase, plural
from examples.quality.scene_figures import pooled, probe_objects, scenes_of, score_scenes


SPLITS = {"train": 300, "validation": 10, "test_combination": 30, "test_style": 30, "test_position": 30}
STYLES = {split: ["flat"] if split == "test_style" else ["deep", "round"] for split in SPLITS}
# clear colours, which no pale background has
COLOURS = {n: [round(255 * c) for c in colorsys.hsv_to_rgb(i / len(CONCEPTS), 1, 0.8)] for i, n in enumerate(CONCEPTS)}


def cut_outs(side: int) -> dict[str, Image.Image]:
    """A square of each concept's colour, with a margin on one side."""
    pictures = {}
    for name, colour in COLOURS.items():
        pictures[name] = Image.new("RGBA", (side, side))
        pictures[name].paste((*colour, 255), (side // 4, side // 4, side, side))
    return pictures


def make(
    seed: int = 0, drawn: dict[str, dict[str, Image.Image]] | None = None, splits: dict[str, int] = SPLITS
) -> dict[str, list[dict]]:
    drawn = {"flat": cut_outs(16), "deep": cut_outs(64), "round": cut_outs(16)} if drawn is None else drawn
    photographs = np.full((2, 32, 32, 3), 128, np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "SCENES", splits)
        return scenes.make(drawn, dict.fromkeys(SPLITS, photographs), STYLES, seed)


@once
def made() -> dict[str, list[dict]]:
    return make()


def directions(one: np.ndarray, other: np.ndarray) -> str:
    """Where `one` is from `other`, by the axis along which their centres are further apart."""
    x, y = one - other
    if abs(x) > abs(y):
        return "left" if x < 0 else "right"
    return "above" if y < 0 else "below"


@pytest.mark.parametrize("split", SPLITS)
def test_a_caption_is_true_of_the_boxes(split):
    for row in made()[split]:
        centres = {}
        for each in row["boxes"]:
            left, top, right, bottom = each["box"]
            assert 0 <= left < right <= 112
            assert 0 <= top < bottom <= 112
            low, high = {2: (36, 56), 3: (30, 44), 4: (27, 37)}[len(row["boxes"])]
            assert low <= max(right - left, bottom - top) <= high
            centres.setdefault(each["name"], []).append(np.array([left + right, top + bottom]) / 2)
        names = list(centres)
        main, *third = row["text"].split(" and ")
        between = {"left": " left of ", "above": " above "}[directions(centres[names[0]][0], centres[names[1]][0])]
        assert main == between.join(phrase(n, len(centres[n])) for n in names[:2])
        places = {"left": "to the left", "right": "to the right"}
        wanted = set()
        for name in names[2:]:
            for other in names[:2]:
                wanted |= {directions(a, b) for a in centres[name] for b in centres[other]}
        assert third == [f"{phrase(names[2], len(centres[names[2]]))} {places.get(w, w)}" for w in wanted]
        for name, other in ((a, b) for a in names for b in names if a != b):
            assert len({directions(a, b) for a in centres[name] for b in centres[other]}) == 1


def test_boxes_are_where_the_pictures_are_and_do_not_overlap():
    for row in made()["train"][:60]:
        pixels = np.asarray(row["image"]).astype(int)
        assert pixels.shape == (112, 112, 3)
        free = np.ones((112, 112), bool)
        for each in row["boxes"]:
            a, b, c, d = each["box"]
            assert free[b:d, a:c].all()
            free[b:d, a:c] = False
            assert np.abs(pixels[b + 2 : d - 2, a + 2 : c - 2] - COLOURS[each["name"]]).max() <= 2  # no margin
        assert pixels[free].min() >= 127  # pale


def test_columns_say_what_the_caption_says():
    for rows in made().values():
        columns = {name: [row[name] for row in rows] for name in ("text", "objects", "relations")}
        assert scenes_of(columns) == [parse(text) for text in columns["text"]]
        counts = [sum(each["count"] for each in objects) for objects in columns["objects"]]
        assert set(counts) == {2, 3, 4}
        assert counts == [len(row["boxes"]) for row in rows]


def test_held_out_scenes_are_held_out():
    relations = {split: [list(map(tuple, row["relations"])) for row in rows] for split, rows in made().items()}
    seen = {relation for each in relations["train"] for relation in each}
    pairs = {frozenset((first, second)) for first, _, second in seen}

    def pair(relation):
        return frozenset((relation[0], relation[2]))

    assert not any(pair(each[0]) in pairs for each in relations["test_combination"])
    for first, relation, second in (each[0] for each in relations["test_position"]):
        assert (second, relation, first) in seen
        assert not {(first, "left of", second), (first, "above", second)} & seen
    assert all(pair(relation) in pairs for each in relations["test_style"] for relation in each)
    # of all other pairs training may have the same
    others = [relation for found in relations.values() for each in found for relation in each[1:]]
    firsts = [each[0] for split in ("train", "validation", "test_style") for each in relations[split]]
    assert all(scenes.is_trained(relation, 0) for relation in others + firsts)
    assert {split: {row["style"] for row in rows} for split, rows in made().items()} == {
        split: set(styles) for split, styles in STYLES.items()
    }
    assert {split: len(rows) for split, rows in made().items()} == SPLITS


def test_a_tenth_of_the_pairs_is_held_out_and_a_tenth_has_one_order():
    pairs = [(a, b) for a in CONCEPTS for b in CONCEPTS if a < b]
    orders = [scenes.order_of(a, b, 0) for a, b in pairs]
    assert orders == [scenes.order_of(b, a, 0) for a, b in pairs]
    assert orders.count("held out") / len(pairs) == pytest.approx(0.1, abs=0.025)
    for place in (0, 1):  # which of the two is first
        found = sum(order == pair[place] for order, pair in zip(orders, pairs, strict=True))
        assert found / len(pairs) == pytest.approx(0.05, abs=0.015)


def same(one: list[dict], other: list[dict]) -> bool:
    return all(
        a["image"].tobytes() == b["image"].tobytes() and {**a, "image": None} == {**b, "image": None}
        for a, b in zip(one, other, strict=True)
    )


def test_a_seed_makes_the_same_pictures_in_any_order_of_cut_outs():
    few = {"train": 60, "validation": 10}
    drawn = {"round": cut_outs(16), "deep": cut_outs(64), "flat": cut_outs(16)}
    one, again = make(splits=few), make(drawn={k: dict(reversed(v.items())) for k, v in drawn.items()}, splits=few)
    assert all(same(one[split], again[split]) for split in few)
    assert not same(one["validation"], make(seed=1, splits=few)["validation"])


def test_styles_are_scaled_to_one_size():
    assert {scenes.trim(cut_outs(side)["cat"]).size for side in (16, 64, 256)} == {(64, 64)}
    wide = Image.new("RGBA", (40, 40))
    wide.paste("red", (4, 10, 36, 26))
    assert scenes.trim(wide).size == (64, 32)


def test_a_concept_without_a_picture_is_an_error():
    drawn = {"flat": cut_outs(16), "deep": cut_outs(16), "round": {n: p for n, p in cut_outs(16).items() if n != "cat"}}
    with pytest.raises(ValueError, match="no emoji of style round is called 'cat'"):
        make(drawn=drawn)


def test_scenes_are_built_of_the_registries_archives(tmp_path, monkeypatch):
    entries = [{"hexcode": f"{0x1F400 + i:X}", "label": name, "group": 0} for i, name in enumerate(CONCEPTS)]
    emoji_archives(tmp_path, entries)
    photographs = cifar_archive(tmp_path, [0] * 12)
    monkeypatch.setattr(
        scenes, "SCENES", SPLITS | dict.fromkeys(("test_style", "test_combination", "test_position"), 4)
    )
    asked = []
    monkeypatch.setattr(scenes, "background", lambda given, rng: asked.append(given) or Image.new("RGB", (112, 112)))
    splits = data.build_scenes(tmp_path)
    assert {split: set(rows["style"]) for split, rows in splits.items()} == {
        split: {"twitter"} if split == "test_style" else {"fluent", "google"} for split in splits
    }
    assert {split: len(rows) for split, rows in splits.items()} == scenes.SCENES
    row = splits["train"][0]
    assert row["image"].size == (112, 112)
    assert scenes_of(splits["train"][:1]) == [parse(row["text"])]
    assert np.array_equal(asked[0], photographs)


def test_backgrounds_are_plain_a_gradient_or_a_photograph():
    photographs = np.zeros((3, 32, 32, 3), np.uint8)
    kinds = set()
    for seed in range(20):
        pixels = np.asarray(scenes.background(photographs, np.random.default_rng(seed))).astype(int)
        steps = [np.abs(np.diff(pixels, axis=axis)).max() for axis in (0, 1)]
        assert max(steps) <= 8  # no edge
        kinds.add("photograph" if pixels.max() <= 128 else "plain" if not any(steps) else "gradient")
        assert pixels.min() >= 127
    assert kinds == {"plain", "gradient", "photograph"}


def test_words_of_captions():
    assert [plural(name) for name in ("cat", "bus", "butterfly", "key", "snowman", "light bulb")] == [
        "cats", "buses", "butterflies", "keys", "snowmen", "light bulbs",
    ]  # fmt: skip
    assert caption([("cat", 1), ("owl", 1)], "left of") == "a cat left of an owl"
    assert caption([("cat", 2), ("bus", 3)], "above") == "two cats above three buses"
    groups = [("cat", 1), ("pizza", 1), ("star", 2)]
    assert caption(groups, "left of", "below") == "a cat left of a pizza and two stars below"
    assert caption(groups, "above", "right") == "a cat above a pizza and two stars to the right"


CAT_PIZZA_STARS = "a cat left of a pizza and two stars above"
RELATIONS = {("cat", "left of", "pizza"), ("star", "above", "cat"), ("star", "above", "pizza")}


@pytest.mark.parametrize(
    ("text", "objects", "relations"),
    [
        (CAT_PIZZA_STARS, {"cat": 1, "pizza": 1, "star": 2}, RELATIONS),
        (" A cat left of a pizza, 2 stars above.", {"cat": 1, "pizza": 1, "star": 2}, RELATIONS),
        ("a pizza to the right of one cat and two stars above", {"cat": 1, "pizza": 1, "star": 2}, RELATIONS),
        ("a key below two soccer balls", {"key": 1, "soccer ball": 2}, {("soccer ball", "above", "key")}),
        ("", {}, set()),
        ("left of above and", {}, set()),
        ("above a cat", {"cat": 1}, set()),
        ("a cat left of", {"cat": 1}, set()),
        ("cats", {"cat": 0}, set()),
        ("two cat", {"cat": 2}, set()),
        ("a cat and a pizza", {"cat": 1, "pizza": 1}, set()),
        ("a cat left of a cat", {"cat": 2}, set()),
        ("a flying saucer above a cat", {"flying saucer": 1, "cat": 1}, {("flying saucer", "above", "cat")}),
        ("a cat a pizza above a key", {"cat a pizza": 1, "key": 1}, {("cat a pizza", "above", "key")}),
        ("a cat above a key above a cat", {"cat": 2, "key": 1}, {("cat", "above", "key"), ("key", "above", "cat")}),
    ],
)  # fmt: skip
def test_answers_are_parsed(text, objects, relations):
    assert parse(text) == Scene(objects, frozenset(relations))


def figures(*answers: str) -> dict[str, float]:
    return score_scenes(answers, [parse(CAT_PIZZA_STARS)] * len(answers))


def test_figures_of_answers():
    names = ("objects_f1", "counts", "pairs_named", "relations", "axes", "orders")
    assert figures(CAT_PIZZA_STARS) == dict.fromkeys(names, 1.0)
    assert figures("") == dict.fromkeys(names, 0.0)
    # two names of three right, one wrong; one pair of three; its relation is the other way round
    found = figures("two cats right of a pizza and a key above")
    assert tuple(found[name] for name in names) == (4 / 6, 1 / 2, 1 / 3, 0.0, 1.0, 0.0)
    assert figures("a pizza right of a cat")["relations"] == 1.0
    assert figures("a cat above a pizza")["axes"] == 0.0
    assert figures("a cat and a pizza")["relations"] == 0.0  # says nothing
    assert figures("a cat left of a pizza left of a cat")["relations"] == 0.0  # says both
    # pictures are pooled: 3 + 1 right of 3 + 1 named and of 6
    found = figures(CAT_PIZZA_STARS, "a star")
    assert tuple(found[name] for name in names) == (8 / 10, 3 / 4, 3 / 6, 1.0, 1.0, 1.0)
    found = figures(CAT_PIZZA_STARS, "a pizza left of a cat")  # of four pairs one is in the other order
    assert (found["relations"], found["axes"], found["orders"]) == (3 / 4, 1.0, 3 / 4)


def test_figures_of_shuffled_pictures_are_lower():
    rows = made()["train"][:100]
    texts = [row["text"] for row in rows]
    truths = scenes_of({name: [row[name] for row in rows] for name in ("objects", "relations")})
    metrics = ["exact_match", "cider"]
    right, shuffled = score(metrics, texts, texts, truths), score_shuffled(metrics, texts, texts, truths)
    assert right.keys() == shuffled.keys() == {
        "exact_match", "cider", "objects_f1", "counts", "pairs_named", "relations", "axes", "orders",
    }  # fmt: skip
    assert all(shuffled[name] < right[name] for name in right)
    assert shuffled["objects_f1"] < 0.15
    assert all(right[name] == 1.0 for name in right if name != "cider")


def picture_features(truths: list[Scene], seed: int) -> np.ndarray:
    """(N, 5, 60) of noise in which one patch tells each object."""
    rng = np.random.default_rng(seed)
    found = rng.normal(size=(len(truths), 5, len(CONCEPTS))).astype(np.float16)
    for row, truth in enumerate(truths):
        for name in truth.objects:
            found[row, rng.integers(1, 5), CONCEPTS.index(name)] += 9
    return found


def test_a_linear_probe_finds_objects_that_are_in_one_patch():
    rng = np.random.default_rng(0)
    known = CONCEPTS[:8]
    drawn = [Scene(dict.fromkeys(rng.choice(known, 2, replace=False), 1), frozenset()) for _ in range(260)]
    parts = {"train": drawn[:200], "validation": drawn[200:230], "test": drawn[230:]}
    given = {split: (picture_features(truths, seed), truths) for seed, (split, truths) in enumerate(parts.items())}
    noise = (np.zeros_like(given["test"][0]), parts["test"])
    found = probe_objects(given["train"], given["validation"], {"test": given["test"], "noise": noise})
    assert found["test"]["objects_f1"] > 0.95
    assert found["noise"]["objects_f1"] < 0.5
    assert found["test"]["C"] in scene_figures.STRENGTHS
    assert found["test"]["threshold"] in scene_figures.THRESHOLDS
    assert found["test"]["validation"] > 0.95


def test_features_are_pooled_by_mean_and_maximum():
    found = pooled(np.array([[[9, 8], [1, 4], [3, 2]]], np.float16))
    assert found.dtype == np.float32
    assert found.tolist() == [[9, 8, 2, 3, 3, 4]]


def test_scenes_are_measured_beside_the_plain_methods(tmp_path, monkeypatch):
    rows = {split: made()[split][:30] for split in ("train", "validation", "test_style")}
    truths = {split: [parse(row["text"]) for row in found] for split, found in rows.items()}
    columns = {
        split: {name: [row[name] for row in found] for name in ("text", "objects", "relations")}
        | {"vision_features": picture_features(truths[split], 0).tolist()}
        for split, found in rows.items()
    }
    monkeypatch.setattr(measure, "load_cache", lambda folder, split: Dataset.from_dict(columns[split]))
    monkeypatch.setattr(measure, "feature_opener", lambda folder: lambda value, number: torch.tensor(value))
    lines = [json.dumps({"prediction": text}) for text in columns["test_style"]["text"]]
    (tmp_path / "predictions.jsonl").write_text("\n".join(lines))
    found = measure.measure(TASKS["scenes"], tmp_path, {"test_style": tmp_path})["test_style"]
    assert found["pictures"] == 30
    assert found["model"]["objects_f1"] == found["model"]["relations"] == found["model"]["exact_match"] == 1.0
    assert found["shuffled"]["objects_f1"] < 0.5
    assert found["nearest"].keys() == {"CLS", "patch mean", "both"}
    assert all(figures.keys() == found["model"].keys() for figures in found["nearest"].values())
    assert 0 < found["probe"]["objects_f1"] <= 1
