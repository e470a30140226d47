"""Write the tables of what was measured into docs/quality.md: `python -m examples.quality.table`, from the repository.

It reads only results/quality/*.json; a row without a file is "not run".
"""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .rows import FRESH_QFORMER_LR, HEADLINES, ROWS, Row


BEGIN, END = "<!-- quality:begin -->", "<!-- quality:end -->"
RESULTS, PAGE = Path("results/quality"), Path("docs/quality.md")
CIFAR = ("row", "different", "right answers", "best linear probe", "bridge efficiency", "pictures shuffled",
         "LM's perplexity", "minutes")  # fmt: skip
EMOJI = ("row", "different", "unseen style: CIDEr (exact)", "shuffled", "nearest neighbour",
         "unseen concepts: CIDEr (exact)", "shuffled", "nearest neighbour", "LM's perplexity", "minutes")  # fmt: skip
SCENES = ("row", "different", "unseen", "objects' F1", "counts", "relations (of the pairs named)", "exact",
          "CIDEr", "shuffled: F1", "nearest neighbour: F1, relations", "linear probe's F1", "LM's perplexity",
          "minutes")  # fmt: skip
UNSEEN = {"test_combination": "combinations", "test_style": "style", "test_position": "positions"}


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The existing results, by row."""
    return {n: json.loads((folder / f"{n}.json").read_text("utf-8")) for n in ROWS if (folder / f"{n}.json").exists()}


def render(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The three tables in Markdown, all rows in each; a row of scenes has a line for each test."""
    tables = []
    for dataset, header, lines_of in (
        ("cifar", CIFAR, cifar_lines),
        ("emoji", EMOJI, emoji_lines),
        ("scenes", SCENES, scenes_lines),
    ):
        lines = [header, ("---",) * len(header)]
        for name, row in ROWS.items():
            if row.dataset == dataset:
                found = lines_of(results[name]) if name in results else [["not run"] + [""] * (len(header) - 3)]
                lines += [[f"`{name}`", different(row), *cells] for cells in found]
        tables.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(tables)


_BRIDGES = {
    "queries": "learned queries alone",
    "pooled": "queries begin and end with pooled features",
    "pooling": f"no Q-Former: average pooling and an MLP (and so no stage 1), at {FRESH_QFORMER_LR}",
}


def different(row: Row) -> str:
    """A row's difference from its data set's headline, as text."""
    headline = HEADLINES[row.dataset]
    layer = "the ViT's last layer" if row.layer is None else f"the ViT's layer {row.layer}"
    descriptions = {
        "stage1": f"no stage 1; the Q-Former at {FRESH_QFORMER_LR}",
        "lora": "no LoRA",
        "lora_targets": "LoRA on all linear layers",
        "elastic": "elastic queries",
        "queries": f"{row.queries} queries",
        "layer": layer,
        "synthetic": "made-up pairs added",
        "seed": f"seed {row.seed}",
        "bridge": _BRIDGES[row.bridge],
    }
    changed = [words for name, words in descriptions.items() if getattr(row, name) != getattr(headline, name)]
    return ", ".join(changed) or f"{row.queries} queries, {layer}, seed {row.seed}"


def bridge_efficiency(test: Mapping[str, Any]) -> float:
    """The fraction of right answers over that of the best probe on the test pictures."""
    return test["model"]["exact_match"] / best(test["probe"], "exact_match")


def best(views: Mapping[str, Mapping[str, float]], figure: str) -> float:
    """The figure of the best view."""
    return max(figures[figure] for figures in views.values())


def cifar_lines(result: Mapping[str, Any]) -> list[list[str]]:
    test = result["tests"]["test"]
    shares = (test["model"]["exact_match"], best(test["probe"], "exact_match"))
    efficiency, shuffled = bridge_efficiency(test), test["shuffled"]["exact_match"]
    return [[*(f"{share:.1%}" for share in shares), f"**{efficiency:.3f}**", f"{shuffled:.1%}", *last_cells(result)]]


def emoji_lines(result: Mapping[str, Any]) -> list[list[str]]:
    cells = []
    for split in ("test_style", "test_concept"):
        test = result["tests"][split]
        nearest = {figure: best(test["nearest"], figure) for figure in test["model"]}
        cells += [f"**{pair(test['model'])}**", pair(test["shuffled"]), pair(nearest)]
    return [[*cells, *last_cells(result)]]


def scenes_lines(result: Mapping[str, Any]) -> list[list[str]]:
    lines = []
    for split, unseen in UNSEEN.items():
        test = result["tests"][split]
        model, shuffled, probe = (test[part] for part in ("model", "shuffled", "probe"))
        nearest = max(test["nearest"].values(), key=lambda figures: figures["objects_f1"])
        cells = [unseen, f"**{model['objects_f1']:.3f}**", f"{model['counts']:.1%}", f"**{relations(model)}**"]
        cells += [f"{model['exact_match']:.1%}", f"{model['cider']:.2f}", f"{shuffled['objects_f1']:.3f}"]
        cells += [f"{nearest['objects_f1']:.3f}, {relations(nearest)}", f"{probe['objects_f1']:.3f}"]
        lines.append([*cells, *last_cells(result)])
    for m, splits in result.get("fewer", {}).items():  # baselines are the same
        for split, unseen in UNSEEN.items():
            model = splits[split]
            cells = [f"{unseen}, {m} queries", f"**{model['objects_f1']:.3f}**", f"{model['counts']:.1%}"]
            cells += [f"**{relations(model)}**", f"{model['exact_match']:.1%}", f"{model['cider']:.2f}"]
            lines.append([*cells, *[""] * 5])
    return lines


def relations(figures: Mapping[str, float]) -> str:
    """Few pairs say little: how many there are stands beside the share."""
    return f"{figures['relations']:.1%} of {figures['pairs_named']:.1%}"


def pair(figures: Mapping[str, float]) -> str:
    return f"{figures['cider']:.2f} ({figures['exact_match']:.1%})"


def last_cells(result: Mapping[str, Any]) -> list[str]:
    text = result["plain_text"]
    perplexity = f"{text['perplexity_trained']:.2f} (was {text['perplexity_original']:.2f})"
    return [perplexity, f"{sum(result['seconds'].values()) / 60:.0f}"]


def between_markers(page: str) -> str:
    """The text between the markers. Raises ValueError unless the page has each marker once."""
    for marker in (BEGIN, END):
        if page.count(marker) != 1:
            raise ValueError(f"{marker} stands {page.count(marker)} times in the page; once is wanted")
    return page.partition(BEGIN)[2].partition(END)[0].strip("\n")


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python -m examples.quality.table", description=__doc__.splitlines()[0])
    parser.parse_args(argv)
    page = PAGE.read_text(encoding="utf-8")
    between_markers(page)
    before, _, rest = page.partition(BEGIN)
    table = render(load(RESULTS))
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    sys.stdout.write(f"{table}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
