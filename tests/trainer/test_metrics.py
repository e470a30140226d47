"""Metrics against implementations that this project did not write, hand-computed figures and plain loops."""

import math
import pickle
import random

import evaluate
import numpy as np
import pytest
import torch
from pycocoevalcap.cider.cider import Cider as CocoCider
from sacrebleu import corpus_bleu

from lorgnette.trainer.cider import cider_d
from lorgnette.trainer.decoding import DECODING, decoding_of
from lorgnette.trainer.metrics import (
    METRICS,
    Bleu,
    Cider,
    ExactMatch,
    Recall,
    RougeL,
    VqaAccuracy,
    figures_of,
    text_metrics,
    words_of,
)
from lorgnette.trainer.recall import recall_at_k
from lorgnette.trainer.vqa import normalize_answer, vqa_accuracy


def sentences(rng, images, longest=14, vocabulary="abcdefgh"):
    """Predictions and one to five references each, of words so few that n-grams repeat and meet."""

    def sentence(shortest):
        return " ".join(rng.choices(vocabulary, k=rng.randint(shortest, longest)))

    predictions = [sentence(0) for _ in range(images)]
    return predictions, [[sentence(1) for _ in range(rng.randint(1, 5))] for _ in range(images)]


def by_coco(predictions, references):
    gts, res = dict(enumerate(references)), {image: [text] for image, text in enumerate(predictions)}
    return CocoCider().compute_score(gts, res)


@pytest.mark.parametrize(("seed", "images"), [(0, 40), (1, 7), (2, 2), (3, 1)])
def test_cider_d_equals_coco_s_on_the_same_tokens(seed, images):
    predictions, references = sentences(random.Random(seed), images)
    predictions[0] = ""  # a model that says nothing
    mean, each = by_coco(predictions, references)
    ours = cider_d([text.split() for text in predictions], [[text.split() for text in texts] for texts in references])
    assert ours == pytest.approx(each.tolist(), rel=1e-12, abs=1e-12)
    assert Cider().compute(predictions=predictions, references=references)["cider"] == pytest.approx(mean, rel=1e-12)
    assert (mean > 0) == (images > 1)  # with one image every n-gram is in all images' references


def test_cider_d_of_captions_that_are_their_references_is_ten():
    texts = ["a cat on a mat", "two red cars drive by", "nothing to see at all"]
    assert Cider().compute(predictions=texts, references=texts)["cider"] == pytest.approx(10)


def test_the_words_that_cider_counts():
    assert words_of("A man's hat, size 3.5 - don't touch!") == ["a", "man's", "hat", "size", "3.5", "don't", "touch"]


def test_bleu_by_hand():
    found = Bleu().compute(predictions=["The cat sat on the mat"], references=["the cat is on the mat"])
    # precisions 5/6, 3/5, 1/4 and, smoothed by sacrebleu's `exp`, 1/(2 * 3); as long as the reference
    assert found["bleu_1"] == pytest.approx(100 * 5 / 6)
    assert found["bleu_2"] == pytest.approx(100 * math.sqrt(1 / 2))
    assert found["bleu_3"] == pytest.approx(50)
    assert found["bleu_4"] == pytest.approx(100 * (1 / 8 / 6) ** (1 / 4))
    # the reference that is closest in length has 3 words
    found = Bleu().compute(predictions=["the cat"], references=[["the cat sat down there", "the small cat"]])
    assert found["bleu_1"] == pytest.approx(100 * math.exp(1 - 3 / 2))


def test_bleu_4_is_sacrebleu_s_with_unequal_numbers_of_references():
    predictions, references = sentences(random.Random(4), 20)
    longest = max(map(len, references))
    streams = [[texts[n] if n < len(texts) else None for texts in references] for n in range(longest)]
    found = Bleu().compute(predictions=predictions, references=references)
    assert found["bleu_4"] == pytest.approx(corpus_bleu(predictions, streams, lowercase=True).score)
    assert "tok:13a" in found["signature"]


def test_rouge_l_by_hand():
    one = RougeL().compute(predictions=["the cat sat on the mat."], references=["The cat is on the mat"])
    assert one["rouge_l"] == pytest.approx(5 / 6)  # longest common subsequence 5 of 6 and 6 words
    # precision 2/2 and recall 2/4 against the better reference, nothing against the other
    several = RougeL().compute(predictions=["red car"], references=[["a dog", "a red sports car"]])
    assert several["rouge_l"] == pytest.approx(2 / 3)


def test_exact_match_takes_any_of_the_references():
    references = [["a cat", "cat"], "dog", "bird"]
    found = ExactMatch().compute(predictions=["cat", " dog\n", "Bird"], references=references)
    assert found["exact_match"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [
        ("Yes.", "yes"),
        ("The two dogs", "2 dogs"),
        ("none", "0"),
        ("100,978", "100978"),
        ("2:50 pm", "2:50 pm"),
        ("3.5 m.", "3.5 m"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("girl's", "girl's"),
        ("its a well", "its well"),
        ("black-and/or white?", "black and or white"),
        ("an apple, a pear\nand\tthe rest!", "apple pear and rest"),
        ("U.S.A.", "usa"),
        ("'twas, twas", "'twas 'twas"),
        (" ", ""),
    ],
)
def test_answers_are_normalised_as_the_vqa_challenge_says(answer, normalized):
    assert normalize_answer(answer) == normalized
    assert normalize_answer(normalized) == normalized


def test_vqa_accuracy_is_the_mean_over_nine_of_ten_people():
    def loop(answer, people):
        shares = []
        for left_out in range(len(people)):
            others = [given for person, given in enumerate(people) if person != left_out]
            shares.append(min(1, others.count(answer) / 3))
        return sum(shares) / len(shares)

    for agree in range(11):
        people = ["2"] * agree + ["3"] * (10 - agree)
        assert vqa_accuracy("Two.", people) == pytest.approx(loop("2", people))
    assert vqa_accuracy("2", ["2"] * 3 + ["3"] * 7) == pytest.approx(0.9)
    found = VqaAccuracy().compute(predictions=["yes", "a cat"], references=[["Yes"] * 10, ["the dog"] * 10])
    assert found["vqa_accuracy"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="references 1 has 1 answers; VQA accuracy needs 4"):
        VqaAccuracy().compute(predictions=["a", "b"], references=[["a"] * 10, "b"])


def recall_by_loops(scores, right, k):
    """Share of the queries (rows) with a right candidate before all but k - 1 of the wrong ones."""
    hits = 0
    for row, candidates in zip(scores.tolist(), right, strict=True):
        best = max(row[candidate] for candidate in candidates)
        before = sum(score >= best for candidate, score in enumerate(row) if candidate not in candidates)
        hits += before < k
    return hits / len(right)


def test_recall_equals_a_plain_loop_both_ways():
    rng = random.Random(5)
    scores = torch.tensor([[rng.randint(0, 9) for _ in range(30)] for _ in range(8)]).float()  # many ties
    owners = [rng.randrange(8) for _ in range(22)] + list(range(8))
    texts_of = [[text for text, owner in enumerate(owners) if owner == image] for image in range(8)]
    found = Recall().compute(predictions=scores, references=texts_of, ks=(1, 3, 40))
    for k in (1, 3, 40):
        assert found[f"image_to_text_recall@{k}"] == pytest.approx(recall_by_loops(scores, texts_of, k))
        by_text = recall_by_loops(scores.T, [[owner] for owner in owners], k)
        assert found[f"text_to_image_recall@{k}"] == pytest.approx(by_text)
    assert recall_by_loops(scores, texts_of, 40) == 1.0


def test_recall_gives_nothing_for_one_score_for_all_and_leaves_out_texts_of_no_image():
    same = recall_at_k(np.zeros((2, 2)), [[0], [1]], ks=(1,))
    assert same == {"image_to_text_recall@1": 0.0, "text_to_image_recall@1": 0.0}
    distracted = recall_at_k(np.array([[0.9, 0.1, 0.5], [0.2, 0.8, 1.0]]), [[0], [1]], ks=(1,))
    assert distracted == {"image_to_text_recall@1": 0.5, "text_to_image_recall@1": 1.0}


@pytest.mark.parametrize(
    ("scores", "right", "message"),
    [
        ([[0.1, 0.2]], [[0], [1]], r"shape \(1, 2\) and 2 lists"),
        ([0.1, 0.2], [[0], [1]], r"shape \(2,\)"),
        ([[0.1, float("nan")]], [[0]], "image 0 and text 1"),
        ([[0.1, 0.2]], [[]], "image 0 has no right text"),
        ([[0.1, 0.2]], [[2]], "there is no text 2, only 2"),
    ],
)
def test_recall_names_what_is_wrong(scores, right, message):
    with pytest.raises(ValueError, match=message):
        Recall().compute(predictions=scores, references=right)


@pytest.mark.parametrize("name", [name for name in METRICS if name != "recall"])
@pytest.mark.parametrize(
    ("predictions", "references", "error", "message"),
    [
        (["a", "b"], [["a"] * 4], ValueError, "2 predictions and 1 references"),
        ([], [], ValueError, "0 predictions and 0 references"),
        (None, None, ValueError, "no predictions and references"),
        (["a"], None, TypeError, "references is a NoneType"),
        ("a", "a", TypeError, "predictions is a str"),
        (["a", 1], [["a"] * 4] * 2, TypeError, "prediction 1 is a int"),
        (["a", "b"], [["a"] * 4, []], ValueError, "references 1 is an empty list"),
        (["a", "b"], [["a"] * 4, None], TypeError, "references 1 is a NoneType"),
        (["a"], [["a", None, "a", "a"]], TypeError, "references 0: text 1 is a NoneType"),
        (["a"], [["a", "a", " ", "a"]], ValueError, "references 0: text 2 is empty"),
    ],
)
def test_bad_input_is_an_error_with_the_numbers(name, predictions, references, error, message):
    with pytest.raises(error, match=message):
        METRICS[name]().compute(predictions=predictions, references=references)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_an_evaluate_metric_that_writes_nothing(name, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "file" / "no-folder-can-be-made-here")
    metric = METRICS[name]()
    assert isinstance(metric, evaluate.Metric)
    one = {"prediction": "two dogs", "reference": ["two dogs"] * 4}
    other = {"prediction": "a cat", "reference": ["the bird"] * 4}
    if name == "recall":
        one, other = {"prediction": [1.0, 0.0], "reference": [0]}, {"prediction": [1.0, 0.0], "reference": [1]}
    at_once = metric.compute(
        predictions=[one["prediction"], other["prediction"]], references=[one["reference"], other["reference"]]
    )
    assert all(math.isfinite(figure) for figure in figures_of(at_once).values())
    assert figures_of(at_once)
    assert isinstance(at_once["tokenization"], str)
    metric = pickle.loads(pickle.dumps(METRICS[name]()))
    metric.add(**one)
    metric.add(**other)
    assert metric.compute() == at_once  # and by pieces


def test_measuring_leaves_random_numbers_as_they_were():
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    for metric in text_metrics(["cider", "bleu", "rouge_l", "exact_match", "vqa_accuracy"]).values():
        metric.compute(predictions=["a cat"], references=[["a cat"] * 4])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]


@pytest.mark.parametrize(
    ("names", "message"),
    [([], r"metrics is \[\]"), (["bleu", "bleu"], "different ones"), (["cidre"], "'cidre'"), (["recall"], "'recall'")],
)
def test_metrics_that_cannot_be_taken_of_texts(names, message):
    with pytest.raises(ValueError, match=message):
        text_metrics(names)


def test_decoding_presets_limit_new_tokens_and_draw_nothing():
    for name in DECODING:
        assert {"max_new_tokens", "do_sample"} <= DECODING[name].keys()
        assert "max_length" not in DECODING[name]
        assert DECODING[name]["do_sample"] is False
    assert decoding_of("short_answer", 3) == DECODING["short_answer"] | {"max_new_tokens": 3}
    with pytest.raises(ValueError, match="there is no decoding 'beam'; there are caption, short_answer, greedy"):
        decoding_of("beam")
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        decoding_of("greedy", 0)
