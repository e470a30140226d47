"""An inspection as one HTML file that needs nothing else, and as JSON."""

import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from .drawing import data_uri, matrix, overlay
from .inspector import Inspection
from .maps import Look


MARKS = {True: "green", False: "red", None: "not run"}


def write_html(inspection: Inspection, path: str | Path) -> None:
    """Write the report; all pictures are in the file, and nothing is fetched when it is opened."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_html(inspection), encoding="utf-8")


def write_json(inspection: Inspection, path: str | Path) -> None:
    """Write all figures, the maps' included, and no pictures."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_spelt(inspection.as_json()), indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _spelt(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they are written as words."""
    if isinstance(value, dict):
        return {key: _spelt(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spelt(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def as_html(inspection: Inspection) -> str:
    """The report's text."""
    environment = Environment(
        loader=PackageLoader("lorgnette.inspection", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"thousands": lambda number: f"{number:,}", "size": human_size, "shape": human_shape}
    figures = {check.name: check.figures for check in inspection.checks if check.figures}
    cosines = figures.get("queries", {}).get("cosines")
    return environment.get_template("report.html.jinja").render(
        inspection=inspection,
        counts={mark: sum(MARKS[check.passed] == mark for check in inspection.checks) for mark in MARKS.values()},
        marks=MARKS,
        figures=figures,
        cosines=data_uri(matrix(cosines, -0.2, 1.0), lossless=True) if cosines else None,
        looks=[_drawn(seen) for seen in inspection.looks],
    )


def human_size(count: int) -> str:
    """Bytes as people write them."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


def human_shape(shape: tuple[int, ...]) -> str:
    """`(197, 768)` as `197 x 768`, with the sign for times."""
    return " \u00d7 ".join(f"{size:,}" for size in shape)


def _drawn(seen: Look) -> dict[str, Any]:
    """A look with its maps as pictures."""

    def over(values: Any, size: int) -> str:
        return data_uri(overlay(seen.picture, values, size))

    return {
        "name": seen.name,
        "picture": data_uri(seen.picture.resize(_longest(seen.picture, 224), Image.Resampling.BICUBIC)),
        "answer": seen.answer,
        "words": [
            {
                "text": word.text.strip(),
                "probability": word.probability,
                "map": over(word.patches, 168),
                "elsewhere": max(0.0, 1 - float(word.patches.sum())) if word.patches.sum() > 0 else 0.0,
                "soft": [float(share) / max(float(word.soft.max()), 1e-12) for share in word.soft],
                "shares": [float(share) for share in word.soft],
            }
            for word in seen.words
        ],
        "layers": [
            {
                "number": number,
                "elsewhere": float(elsewhere.mean()),
                "queries": [over(values, 84) for values in maps],
            }
            for number, maps, elsewhere in zip(seen.layers, seen.queries, seen.elsewhere, strict=True)
        ],
    }


def _longest(picture: Image.Image, size: int) -> tuple[int, int]:
    scale = size / max(picture.size)
    return max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
