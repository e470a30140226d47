"""The demo's own parts, without its downloads: what it fetches, measures, draws, and whom it asks."""

import numpy as np
import pytest
import tiny
import tiny_models
from datasets import Dataset
from PIL import Image
from saved import build
from tiny import picture
from tiny_sources import cifar_archive
from tiny_training import write_backbones

from examples.demo import __main__ as demo
from examples.demo import data, prerequisites, report
from examples.demo.evaluation import permutation_test, share_right
from examples.sources import cifar
from lorgnette import LorgnetteCollator
from lorgnette.trainer.decoding import decoding_of
from lorgnette.trainer.generation import generate_texts


CLASSES = ["airplane", "automobile", "frog", "horse", "ship"]
TRUTHS = CLASSES * 60


def test_right_answers_depend_on_the_picture():
    answers = [truth if i % 5 else "cat" for i, truth in enumerate(TRUTHS[::-1])][::-1]
    verdict = permutation_test(answers, TRUTHS, permutations=2000)
    assert verdict.exact_match == np.mean([a == t for a, t in zip(answers, TRUTHS, strict=True)])
    assert verdict.shuffled == pytest.approx(verdict.exact_match / 4, abs=0.05)
    assert verdict.p_value == pytest.approx(1 / 2001)
    assert verdict.depends_on_picture


@pytest.mark.parametrize(
    "answers",
    [["frog"] * 300, list(np.random.default_rng(1).choice(CLASSES, 300)), [""] * 300],
    ids=["always the same", "at random", "nothing"],
)
def test_answers_that_ignore_the_picture_fail(answers):
    verdict = permutation_test(answers, TRUTHS, permutations=2000)
    assert verdict.p_value > 0.001
    assert not verdict.depends_on_picture


def test_few_pictures_prove_nothing_and_unequal_lists_are_refused():
    assert not permutation_test(TRUTHS[:199], TRUTHS[:199], permutations=2000).depends_on_picture
    with pytest.raises(ValueError, match="got 3 and 300"):
        permutation_test(TRUTHS[:3], TRUTHS)
    with pytest.raises(ValueError, match="got 0 and 0"):
        permutation_test([], [])


def test_share_right_is_by_class_and_ignores_white_space():
    assert share_right([" frog", "ship", "ship"], ["frog", "frog", "ship"]) == {"frog": 0.5, "ship": 1.0}


def test_photographs_are_read_row_by_row_and_split_evenly(monkeypatch, tmp_path):
    labels = [cifar.CLASSES.index(name) for name in data.CLASSES for _ in range(3)]
    pictures = cifar_archive(tmp_path, labels)
    for name, count in {"TRAIN": 2, "VALIDATION": 1, "HELD_OUT": 2}.items():
        monkeypatch.setattr(data, name, count)

    splits = data.build(tmp_path, tmp_path / "pictures")
    assert splits["train"]["text"][:] == [*data.SENTENCES.values()] * 2
    assert splits["validation"]["text"][:] == [*data.SENTENCES.values()]
    third_of_each = pictures[2::3]
    assert all(
        np.array_equal(np.asarray(row["image"]), wanted)
        for row, wanted in zip(splits["validation"], third_of_each, strict=True)
    )
    with pytest.raises(ValueError, match="4 pictures of class 'airplane' are wanted, the batch has 3"):
        data.balanced(np.array(labels), 4)


def test_the_contact_sheet_shows_what_was_wrong(tmp_path):
    pytest.importorskip("matplotlib")
    pictures, truths = [Image.new("RGB", (32, 32), "gray")] * 6, ["cat"] * 6

    def reds(answers: list[str]) -> int:
        report.contact_sheet(pictures, truths, answers, tmp_path / "sheet.png", columns=3)
        pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
        red, green, blue = pixels.astype(int).transpose(2, 0, 1)
        return int((red - np.maximum(green, blue) > 100).sum())

    assert reds(["cat"] * 6) == 0 < reds(["cat"] * 5 + ["$ a dog \n" * 9]) < reds([""] * 6)
    with pytest.raises(ValueError, match="6 pictures, 6 truths and 5 answers"):
        reds(["cat"] * 5)


def test_the_report_holds_the_figures(tmp_path):
    verdict = permutation_test(TRUTHS, TRUTHS, permutations=2000)
    text = report.markdown(
        verdict, {"frog": 0.5}, [("a ViT", "PyPI", "MIT")], ["make demo"], {"train": 61.2, "rest": 2.0}, {"seed": 0}
    )
    assert str(verdict) in text
    for line in ("| frog | 50% |", "| a ViT | PyPI | MIT |", "make demo", "| all | 63 s |", "| seed | 0 |"):
        assert line in text.splitlines()
    report.curves({"stage1": [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.0}]}, tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").width > 400


@pytest.mark.slow
def test_from_beginning_to_end_on_tiny_parts(tmp_path, monkeypatch, capfd):
    """All that `make demo` starts runs and fits together; that tiny parts learn nothing of 40 pictures is told."""
    vision, text = write_backbones(tmp_path)
    for part in (tiny_models.bert(vocab_size=len(tiny.bert_tokenizer())), tiny.bert_tokenizer()):
        part.save_pretrained(tmp_path / "bert")
    cifar_archive(tmp_path, [cifar.CLASSES.index(name) for name in data.CLASSES for _ in range(12)])
    for name, count in {"TRAIN": 7, "VALIDATION": 5, "HELD_OUT": 8}.items():  # a whole batch of each, in stage 1
        monkeypatch.setattr(data, name, count)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    out = tmp_path / "out"
    options = ["--cache", tmp_path, "--output", out, "--vision", vision, "--text", text, "--qformer", tmp_path / "bert"]
    assert demo.main([*map(str, options), "--max_steps", "2"]) == 1
    output, errors = capfd.readouterr()
    assert len(output.splitlines()) + len(errors.splitlines()) <= 100, "the log fits on two screens"
    assert "{'" not in output + errors, "figures are lines"
    assert "the answers without lorgnette equal the evaluation's on 40 of 40 pictures" in output
    assert "FAILED: at least twice the shuffled exact match" in output.splitlines()[-1]
    assert {path.name for path in (out / "report").iterdir()} == {"report.md", "contact_sheet.png", "loss_curve.png"}
    assert "steps" in (out / "report" / "report.md").read_text()
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in (out / "export").iterdir()}


@pytest.mark.slow
def test_a_process_without_lorgnette_answers_as_the_evaluation_does(tmp_path):
    model, processor = build()
    for name, parameter in model.named_parameters():  # so that, untrained, it tells pictures apart
        if "crossattention" in name or "projector" in name:
            parameter.data *= 30
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    rows = Dataset.from_list([{"image": picture(seed), "text": "a cat", "index": seed} for seed in range(3)])
    collator, decoding = LorgnetteCollator(processor), decoding_of("greedy", max_new_tokens=8)
    answers = [text for _, text in generate_texts(model, collator, rows, decoding=decoding, batch_size=3)]
    assert len(set(answers)) > 1
    assert [answer.strip() for answer in demo.caption_without_lorgnette(tmp_path / "model", rows)] == answers


def test_each_missing_prerequisite_gets_a_line(monkeypatch):
    assert prerequisites.missing(need_npm=False) == []
    monkeypatch.setattr(prerequisites.shutil, "which", lambda name: None)
    monkeypatch.setattr(prerequisites.sys, "version_info", (3, 9, 2))
    old, npm = prerequisites.missing(need_npm=True)
    assert "3.11" in old
    assert npm.startswith("npm")
