"""The measured rows: for each data set a headline row, and rows with one difference."""

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Row:
    """The training of one row; all other settings are in the data set's recipes."""

    dataset: str  # "cifar" or "emoji"
    stage1: bool = True
    lora: bool = True
    queries: int = 8
    layer: int | None = None  # of the ViT; None for its last_hidden_state
    synthetic: bool = False  # adds synthetic training pairs
    seed: int = 0


FRESH_QFORMER_LR = "5e-4"  # learning rate of a Q-Former without stage 1

# The layers were chosen on training data: on CIFAR-10 by a linear probe on the validation split, on emoji by retrieving
# the same emoji in the other training style.
HEADLINES = {"cifar": Row("cifar"), "emoji": Row("emoji", layer=-2)}
VARIANTS = {
    "no-stage1": {"stage1": False},
    "no-lora": {"lora": False},
    "16-queries": {"queries": 16},
    "32-queries": {"queries": 32},
    "synthetic": {"synthetic": True},
    "seed1": {"seed": 1},
    "seed2": {"seed": 2},
}
LAYERS = {"cifar": {"penultimate-layer": {"layer": -2}}, "emoji": {"last-layer": {"layer": None}}}
ROWS = {
    name: row
    for dataset, headline in HEADLINES.items()
    for name, row in [
        (dataset, headline),
        *((f"{dataset}-{k}", replace(headline, **changed)) for k, changed in (VARIANTS | LAYERS[dataset]).items()),
    ]
}


@dataclass(frozen=True)
class Task:
    """The tests of a data set's rows. `tests`: held-out splits; `pairs`: synthetic pairs per concept."""

    tests: tuple[str, ...]
    metrics: tuple[str, ...]
    probe: bool  # whether the texts are classes
    pairs: int


TASKS = {
    "cifar": Task(tests=("test",), metrics=("exact_match",), probe=True, pairs=125),
    "emoji": Task(tests=("test_style", "test_concept"), metrics=("exact_match", "cider"), probe=False, pairs=1),
}


def options(row: Row) -> Mapping[str, list[str]]:
    """Options of each stage besides its recipe: the row's differences from the headline."""
    headline = HEADLINES[row.dataset]
    both = []
    if row.queries != headline.queries:
        both += ["--num_query_tokens", str(row.queries)]
    if row.layer != headline.layer:
        both += layer_option(row)
    if row.seed != headline.seed:
        both += ["--seed", str(row.seed)]
    stage2 = list(both)
    if not row.lora:
        stage2 += ["--lora", "null"]
    if not row.stage1:  # an untrained Q-Former can take a higher rate
        stage2 += ["--qformer_learning_rate", FRESH_QFORMER_LR]
    return {"stage1": both, "stage2": stage2}


def layer_option(row: Row) -> list[str]:
    return ["--vision_feature_layer", "null" if row.layer is None else str(row.layer)]
