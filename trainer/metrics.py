"""Metrics as `evaluate.Metric`s, by short name in `METRICS`; they need no Hub and write no files.

    Cider().compute(predictions=["a cat"], references=[["a cat", "one cat"]])  # {"cider": …, "tokenization": …, …}

A result holds figures, which are floats, and texts that describe their computation, such as `tokenization`.
"""

from collections.abc import Sequence
from itertools import zip_longest
from numbers import Integral
from typing import Any, ClassVar

import evaluate
import torch
from datasets import Features, Value
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from .cider import MAX_N, SCALE, SIGMA, cider_d
from .recall import recall_at_k
from .vqa import MIN_ANSWERS, vqa_accuracy


class _Metric(evaluate.Metric):
    """Base class: it keeps data in memory, so that several processes can measure at once."""

    features_read: ClassVar[Features]
    scale: ClassVar[str]  # from the worst to the best figure
    source: ClassVar[str]

    def __init__(self, **kwargs: Any):
        super().__init__(**({"keep_in_memory": True} | kwargs))

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__, citation=self.source, inputs_description="", features=self.features_read
        )

    def _build_data_dir(self) -> str:
        return self._data_dir_root  # evaluate would create a folder in a home that may be read-only

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Compute the metric over these and all added data.

        Raises:
            TypeError, ValueError: see [`add_batch`]; or there are no data.
        """
        if predictions is None and references is None and not len(self):
            raise ValueError("no predictions and references were given or added")
        return super().compute(predictions=predictions, references=references, **kwargs)

    def add(self, *, prediction: Any = None, reference: Any = None) -> None:
        """Add one prediction and its references."""
        self.add_batch(predictions=[prediction], references=[reference])


class TextMetric(_Metric):
    """A metric of predicted texts, each against one reference text or several."""

    features_read = Features({"predictions": Value("string"), "references": [Value("string")]})
    tokenization: ClassVar[str]

    def add_batch(self, *, predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> None:
        """Add predictions and, for each, its reference or a list of them.

        Raises:
            TypeError: a prediction or a reference that is not a string, with its number.
            ValueError: unequal counts, no data, an empty list of references, an empty reference; with the numbers.
        """
        for name, values in (("predictions", predictions), ("references", references)):
            if not _is_list(values):
                raise TypeError(f"{name} is a {type(values).__name__}; a list is needed")
        if len(predictions) != len(references) or not len(predictions):
            raise ValueError(f"{len(predictions)} predictions and {len(references)} references: one each is needed")
        for number, prediction in enumerate(predictions):
            if not isinstance(prediction, str):
                raise TypeError(f"prediction {number} is a {type(prediction).__name__}; a string is needed")
        lists = [[texts] if isinstance(texts, str) else texts for texts in references]
        self.check_references(lists)
        super().add_batch(predictions=list(predictions), references=[list(texts) for texts in lists])

    @classmethod
    def check_references(cls, references: Sequence[Sequence[str]]) -> None:
        """Raise TypeError or ValueError for references that this metric cannot use."""
        for number, texts in enumerate(references):
            if not _is_list(texts):
                raise TypeError(f"references {number} is a {type(texts).__name__}; a string or a list is needed")
            if not len(texts):
                raise ValueError(f"references {number} is an empty list")
            for position, text in enumerate(texts):
                if not isinstance(text, str):
                    raise TypeError(f"references {number}: text {position} is a {type(text).__name__}, not a string")
                if not text.strip():
                    raise ValueError(f"references {number}: text {position} is empty")


class Cider(TextMetric):
    """CIDEr-D with document frequencies of the given references, see [`cider_d`]; papers print 100 times this."""

    tokenization = "sacrebleu's 13a, lower case, without punctuation (COCO's server: Java's PTBTokenizer)"
    scale = "0 to 10"
    source = "Vedantam et al. 2015, arXiv:1411.5726"

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
        scores = cider_d(
            [words_of(text) for text in predictions], [[words_of(text) for text in texts] for texts in references]
        )
        variant = f"CIDEr-D, n-grams to {MAX_N}, sigma {SIGMA:g}, times {SCALE:g}"
        return {"cider": sum(scores) / len(scores), "variant": variant, "tokenization": self.tokenization}


class Bleu(TextMetric):
    """BLEU-1 … BLEU-4 of the corpus, by sacrebleu."""

    tokenization = "sacrebleu's 13a, lower case"
    scale = "0 to 100"
    source = "Papineni et al. 2002; Post 2018, arXiv:1804.08771"

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
        bleu = BLEU(lowercase=True)
        # sacrebleu reads the first reference of all, the second of all …
        counted = bleu.corpus_score(predictions, list(zip_longest(*references)))
        figures = {
            f"bleu_{n}": BLEU.compute_bleu(
                correct=list(counted.counts[:n]),
                total=list(counted.totals[:n]),
                sys_len=counted.sys_len,
                ref_len=counted.ref_len,
                smooth_method=bleu.smooth_method,
                max_ngram_order=n,
            ).score
            for n in range(1, bleu.max_ngram_order + 1)
        }
        return {**figures, "signature": str(bleu.get_signature()), "tokenization": self.tokenization}


class RougeL(TextMetric):
    """ROUGE-L's F1 against the best reference, averaged over the texts, by rouge_score."""

    tokenization = "rouge_score's: lower case, runs of a-z and 0-9, no stemming"
    scale = "0 to 1"
    source = "Lin 2004"

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
        # naming the default tokenizer keeps absl from setting up the root logger
        scorer = RougeScorer(["rougeL"], tokenizer=DefaultTokenizer())
        scores = [
            scorer.score_multi(texts, text)["rougeL"].fmeasure
            for text, texts in zip(predictions, references, strict=True)
        ]
        return {"rouge_l": float(sum(scores) / len(scores)), "tokenization": self.tokenization}


class ExactMatch(TextMetric):
    """The share of texts that equal one of their references."""

    tokenization = "none; surrounding white space is ignored"
    scale = "0 to 1"
    source = ""

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
        right = [
            text.strip() in {reference.strip() for reference in texts}
            for text, texts in zip(predictions, references, strict=True)
        ]
        return {"exact_match": sum(right) / len(right), "tokenization": self.tokenization}


class VqaAccuracy(TextMetric):
    """VQA accuracy against the answers of several people, see [`vqa_accuracy`]."""

    tokenization = "none; answers normalised as visualqa.org/evaluation says"
    scale = "0 to 1"
    source = "Antol et al. 2015, arXiv:1505.00468"

    @classmethod
    def check_references(cls, references: Sequence[Sequence[str]]) -> None:
        super().check_references(references)
        for number, texts in enumerate(references):
            if len(texts) < MIN_ANSWERS:
                raise ValueError(
                    f"references {number} has {len(texts)} answers; VQA accuracy needs {MIN_ANSWERS} or more, from "
                    "different people; for fewer use exact_match"
                )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
        scores = [vqa_accuracy(text, texts) for text, texts in zip(predictions, references, strict=True)]
        return {"vqa_accuracy": sum(scores) / len(scores), "tokenization": self.tokenization}


class Recall(_Metric):
    """Recall@k of retrieval: `predictions` is the `(I, T)` score matrix, `references` each image's right columns.

    `compute(…, ks=(1, 5, 10))`; see [`recall_at_k`] for figures and errors.
    """

    features_read = Features({"predictions": [Value("float64")], "references": [Value("int64")]})
    scale = "0 to 1"
    source = ""

    def add_batch(self, *, predictions: Any, references: Sequence[Sequence[int]]) -> None:
        """Add images: their rows of scores, as a tensor, an array or lists, and for each the columns of its texts.

        Raises:
            ValueError, TypeError: the scores are not a matrix, or the right texts not one list of integers per image.
        """
        scores = torch.as_tensor(predictions)
        if scores.ndim != 2 or len(scores) != len(references) or not len(scores):
            raise ValueError(f"scores of shape {tuple(scores.shape)} and {len(references)} lists of right texts: "
                             "a matrix with a row for each list is needed")  # fmt: skip
        for image, texts in enumerate(references):
            if not _is_list(texts) or not all(isinstance(text, Integral) for text in texts):
                raise TypeError(f"the right texts of image {image} have to be a list of integers, not {texts!r}")
        super().add_batch(predictions=scores.double().cpu().numpy(), references=[list(texts) for texts in references])

    def _compute(
        self, predictions: list[list[float]], references: list[list[int]], ks: Sequence[int] = (1, 5, 10)
    ) -> dict[str, Any]:
        return {**recall_at_k(predictions, references, ks), "tokenization": "none: scores are ranked, not words"}


METRICS: dict[str, type[_Metric]] = {
    "cider": Cider,
    "bleu": Bleu,
    "rouge_l": RougeL,
    "exact_match": ExactMatch,
    "vqa_accuracy": VqaAccuracy,
    "recall": Recall,
}


def text_metrics(names: Sequence[str]) -> dict[str, TextMetric]:
    """The metrics of generated texts that go by these short names.

    Raises:
        ValueError: none named, one twice, an unknown name, or `recall`, which ranks scores; with those there are.
    """
    text_metric_names = [name for name, metric in METRICS.items() if issubclass(metric, TextMetric)]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"metrics is {list(names)}; one or more different ones are needed of {', '.join(text_metric_names)}"
        )
    if unknown := [name for name in names if name not in text_metric_names]:
        raise ValueError(f"{unknown[0]!r} is no metric of generated texts; these are: {', '.join(text_metric_names)}")
    return {name: METRICS[name]() for name in names}


def figures_of(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of a metric's result, without the words."""
    return {name: value for name, value in result.items() if isinstance(value, float)}


def words_of(text: str) -> list[str]:
    """The words that CIDEr-D counts: tokens of mteval's 13a, in lower case, without those that are punctuation."""
    return [token for token in _tokenize(text.lower()).split() if any(map(str.isalnum, token))]


def _is_list(values: Any) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, (str, bytes))


_tokenize = Tokenizer13a()
