"""The data that quality is measured on: what is held out stays out, and made-up pairs are marked and capped."""

import numpy as np
import pytest
from datasets import load_from_disk
from tiny_sources import cifar_archive, emoji_archives

from examples.quality import __main__ as quality
from examples.quality import data, synthetic
from examples.quality.rows import ROWS
from examples.sources import emoji


PEOPLE = [f"1F9D1-200D-{0x1F300 + i:X}" for i in range(60)]
NAMED = [
    {"hexcode": code.replace("1F9D1", who), "label": f"{name} of trade {i}", "group": 1}
    for i, code in enumerate(PEOPLE)
    for who, name in (("1F9D1", "person"), ("1F468", "man"), ("1F469", "woman"))
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CIFAR_TRAIN", 6)
    monkeypatch.setattr(data, "CIFAR_VALIDATION", 3)
    monkeypatch.setattr(data, "CIFAR_TEST", 4)
    monkeypatch.setattr(synthetic, "CIFAR_TRAIN", 6)
    monkeypatch.setattr(synthetic, "CIFAR_VALIDATION", 3)
    emoji_archives(tmp_path, NAMED)
    return tmp_path


def test_photographs_of_the_splits_are_disjoint(cache, monkeypatch):
    pictures = cifar_archive(cache, [i % 10 for i in range(12)])
    splits = data.build_cifar(cache)
    wanted = {"train": pictures[:6], "validation": pictures[6:9], "test": pictures[:4]}  # of another batch
    for name, photographs in wanted.items():
        found = np.stack([np.asarray(image) for image in splits[name]["image"]])
        assert np.array_equal(found, photographs)
    assert splits["validation"]["text"][:] == ["frog", "horse", "ship"]
    monkeypatch.setattr(data, "CIFAR_TRAIN", 10)
    with pytest.raises(ValueError, match="photographs 10 to 13 are wanted, the batch has 12"):
        data.build_cifar(cache)


def test_no_held_out_style_and_no_held_out_concept_is_trained_on(cache):
    splits = data.build_emoji(cache)
    concepts = {name: set(rows["concept"]) for name, rows in splits.items()}
    assert all(len(rows) > 0 for rows in splits.values())
    assert concepts["test_style"] == concepts["train"]
    assert not concepts["test_concept"] & concepts["train"]
    assert not concepts["validation"] & (concepts["train"] | concepts["test_concept"])
    assert {name: set(rows["style"]) for name, rows in splits.items()} == {
        "train": {"google", "fluent"},
        "validation": {"google", "fluent"},
        "test_concept": {"google", "fluent"},
        "test_style": {"twitter"},
    }
    # man, woman and person of a trade stay together, in each style
    assert all(len(rows) % 3 == 0 for rows in splits.values())
    assert len(splits["train"]) == 2 * len(splits["test_style"])
    assert sum(map(len, concepts.values())) - len(concepts["test_style"]) == len(PEOPLE)


def test_a_concept_has_its_split_for_good_and_a_tenth_is_held_out():
    concepts = [f"{number:x}" for number in range(20_000)]
    splits = [data.split_of(concept) for concept in concepts]
    assert splits == [data.split_of(concept) for concept in concepts] != [data.split_of(c, 1) for c in concepts]
    assert splits.count("test_concept") / len(splits) == pytest.approx(data.TEST_SHARE, abs=0.01)
    assert splits.count("validation") / len(splits) == pytest.approx(data.VALIDATION_SHARE, abs=0.01)


def test_cut_outs_lie_on_white(cache):
    row = data.build_emoji(cache)["test_style"][0]
    assert row["image"].getpixel((0, 0)) == (255, 255, 255)
    assert row["image"].getpixel((3, 3)) == (0, 128, 0)


def test_an_existing_folder_is_left_alone(cache, capsys):
    splits = data.build_emoji(cache)
    data.save(splits, cache / "emoji")
    assert f"train {len(splits['train'])}" in capsys.readouterr().out
    assert load_from_disk(cache / "emoji")["train"]["text"][:] == splits["train"]["text"][:]
    with pytest.raises(FileExistsError, match="exists already"):
        data.save(splits, cache / "emoji")


def test_made_up_pairs_are_marked_capped_and_of_training_concepts(cache):
    cifar_archive(cache, [0] * 12)
    splits = data.build_emoji(cache)
    real = len(splits["train"])
    larger = synthetic.add_pairs(splits, cache, templates=["one sees a {name}"], pairs=5, cap=0.2)
    made_up = larger["train"].filter(lambda row: row["synthetic"])
    assert len(made_up) == int(0.25 * real) == len(larger["train"]) - real
    assert len(made_up) / len(larger["train"]) <= 0.2
    assert set(made_up["concept"]) <= set(splits["train"]["concept"])
    assert data.HELD_OUT_STYLE not in set(made_up["style"])
    assert all(text.startswith("one sees a ") for text in made_up["text"])
    assert {image.size for image in made_up["image"]} == {(112, 112)}
    assert not any(flag for name in larger if name != "train" for flag in larger[name]["synthetic"])

    name = splits["train"]["text"][0]
    named = synthetic.add_pairs(splits, cache, concepts=[name], templates=["{name}"], pairs=3)
    assert named["train"]["text"][real:] == [name] * 3


def test_a_row_with_made_up_pairs_makes_them_and_looks_at_them(cache):
    cifar_archive(cache, [0] * 12)
    commands = {}

    class Told:
        def run(self, name, command):
            commands[name] = command
            return cache / name

    quality.take_steps(ROWS["emoji-synthetic"], Told(), dict.fromkeys(quality.BACKBONES, "b"), cache)
    for name, module in (("data", data), ("synthetic", synthetic)):
        module.main([*commands[name][2:], "--output_dir", str(cache / name)])
    real, larger = (load_from_disk(cache / name)["train"] for name in ("data", "synthetic"))
    made_up = larger.filter(lambda row: row["synthetic"])
    assert len(larger) - len(real) == len(made_up) == int(len(real) / 3)  # a quarter of all
    assert set(made_up["text"]) <= set(real["text"])  # by the template: the bare name
    assert commands["features"][commands["features"].index("--dataset") + 1] == str(cache / "synthetic")


def test_held_out_and_unknown_concepts_are_refused(cache):
    cifar_archive(cache, [0] * 12)
    splits = data.build_emoji(cache)
    with pytest.raises(ValueError, match="no emoji is called 'bicycle'"):
        synthetic.add_pairs(splits, cache, concepts=["bicycle"])
    held_out = splits["test_concept"]["text"][0]
    with pytest.raises(ValueError, match=f"no text of the training split is called '{held_out}'"):
        synthetic.add_pairs(splits, cache, concepts=[held_out])
    with pytest.raises(ValueError, match=r"cap is 1\.0"):
        synthetic.add_pairs(splits, cache, cap=1.0)
    with pytest.raises(ValueError, match=r"\d+ concepts, 1 pairs of each and a cap of 0\.0 on \d+ rows make no pair"):
        synthetic.add_pairs(splits, cache, cap=0.0)


def test_a_cut_out_is_whole_and_before_the_photograph():
    cut_out = emoji.Image.new("RGBA", (16, 16), "red")
    picture = np.asarray(synthetic.compose(cut_out, np.zeros((32, 32, 3), np.uint8), np.random.default_rng(0)))
    red = (picture[..., 0] > 200).sum() ** 0.5
    assert picture.shape == (112, 112, 3)
    assert 0.4 * 112 - 1 <= red <= 0.9 * 112 + 1
