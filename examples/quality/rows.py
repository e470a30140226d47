"""The measured rows: for each data set a headline row, and rows with one difference."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Row:
    """The training of one row; all other settings are in the data set's recipes."""

    dataset: str  # "cifar", "emoji" or "scenes"
    stage1: bool = True
    lora: bool = True
    lora_targets: str | None = None  # of peft's; None for the attention layers
    queries: int = 8
    layer: int | None = None  # of the ViT; None for its last_hidden_state
    synthetic: bool = False  # adds synthetic training pairs
    seed: int = 0
    elastic: bool = False  # trains with the first m queries, m drawn; the tests are answered with fewer, too
    bridge: str = "queries"  # a Q-Former with learned queries; "pooled": with pooled features; "pooling": these alone

    @property
    def has_stage1(self) -> bool:
        """Whether stage 1 is trained: a bridge without layers has none."""
        return self.stage1 and self.bridge != "pooling"


RECIPES = Path("recipes")
FEWER = (4, 8)  # queries with which a row of elastic queries answers, besides all
FRESH_QFORMER_LR = "5e-4"  # learning rate of a Q-Former without stage 1

# The layers were chosen on training data: on CIFAR-10 and scenes by a linear probe on the validation split, on emoji by
# retrieving the same emoji in the other training style.
HEADLINES = {
    "cifar": Row("cifar"),
    "emoji": Row("emoji", layer=-2),
    "scenes": Row("scenes", queries=16, layer=-2, bridge="pooled"),
}
VARIANTS = {
    "no-stage1": {"stage1": False},
    "no-lora": {"lora": False},
    "8-queries": {"queries": 8},
    "16-queries": {"queries": 16},
    "32-queries": {"queries": 32},
    "synthetic": {"synthetic": True},
    "queries": {"bridge": "queries"},
    "pooled": {"bridge": "pooled"},
    "pooling": {"bridge": "pooling"},
    "elastic": {"elastic": True},
    "all-linear": {"lora_targets": "all-linear"},
    "seed1": {"seed": 1},
    "seed2": {"seed": 2},
    "penultimate-layer": {"layer": -2},
    "last-layer": {"layer": None},
}
WITHOUT = {("scenes", "synthetic")}  # made of emoji on photographs already
WITHOUT |= {("cifar", "elastic"), ("emoji", "elastic")}  # of eight queries that are alike
ROWS = dict(HEADLINES)
for _dataset, _headline in HEADLINES.items():
    for _name, _changes in VARIANTS.items():
        if (_row := replace(_headline, **_changes)) != _headline and (_dataset, _name) not in WITHOUT:
            ROWS[f"{_dataset}-{_name}"] = _row


@dataclass(frozen=True)
class Task:
    """The tests of a data set's rows. `tests`: held-out splits."""

    tests: tuple[str, ...]
    metrics: tuple[str, ...]
    probe: bool  # whether the texts are classes
    pairs: int = 0  # synthetic pairs per concept
    scenes: bool = False  # whether `score_scenes` counts what the answers say


TASKS = {
    "cifar": Task(tests=("test",), metrics=("exact_match",), probe=True, pairs=125),
    "emoji": Task(tests=("test_style", "test_concept"), metrics=("exact_match", "cider"), probe=False, pairs=1),
    "scenes": Task(
        tests=("test_combination", "test_style", "test_position"),
        metrics=("exact_match", "cider"),
        probe=False,
        scenes=True,
    ),
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
    if row.lora_targets:
        lora = recipe_setting(row, "stage2", "lora")
        stage2 += ["--lora", json.dumps(lora | {"target_modules": row.lora_targets})]
    if row.elastic:
        stage2 += ["--elastic_queries", "true"]
    if not row.has_stage1:  # an untrained Q-Former can take a higher rate
        stage2 += ["--qformer_learning_rate", FRESH_QFORMER_LR]
    return {"stage1": both + bridge_option(row, "stage1"), "stage2": stage2 + bridge_option(row, "stage2")}


def bridge_option(row: Row, stage: str) -> list[str]:
    if row.bridge == HEADLINES[row.dataset].bridge:
        return []
    config = recipe_setting(row, stage, "qformer_config")
    config["use_pooled_features"] = row.bridge != "queries"
    config |= {"num_hidden_layers": 0} if row.bridge == "pooling" else {}
    return ["--qformer_config", json.dumps(config)]


def recipe_setting(row: Row, stage: str, name: str) -> Any:
    return yaml.safe_load(recipe_of(row, stage).read_text(encoding="utf-8"))[name]


def recipe_of(row: Row, stage: str) -> Path:
    return RECIPES / f"quality-{row.dataset}-{stage}.yaml"


def layer_option(row: Row) -> list[str]:
    return ["--vision_feature_layer", "null" if row.layer is None else str(row.layer)]
