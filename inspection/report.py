"""Write an inspection as one self-contained HTML file, and as JSON."""

import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from .drawing import data_uri, matrix, overlay
from .inspector import Inspection
from .maps import Attribution


MARKS = {True: "green", False: "red", None: "not run"}


def write_html(inspection: Inspection, path: str | Path) -> None:
    """Write the report: one self-contained file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_html(inspection), encoding="utf-8")


def write_json(inspection: Inspection, path: str | Path) -> None:
    """Write all figures, including the maps', without pictures."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_json_values(inspection.as_json()), indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _json_values(value: Any) -> Any:
    """Replace NaN and infinities by strings, since JSON has none."""
    if isinstance(value, dict):
        return {key: _json_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_values(item) for item in value]
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
        attributions=[_rendered(attribution) for attribution in inspection.attributions],
    )


def human_size(count: int) -> str:
    """Bytes with a binary unit."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


def human_shape(shape: tuple[int, ...]) -> str:
    """`(197, 768)` as `197 x 768`, with the sign for times."""
    return " \u00d7 ".join(f"{size:,}" for size in shape)


def _rendered(one: Attribution) -> dict[str, Any]:
    """An attribution with its maps as data URIs."""

    def over(values: Any, size: int) -> str:
        return data_uri(overlay(one.picture, values, size))

    return {
        "name": one.name,
        "picture": data_uri(one.picture.resize(_scaled_size(one.picture, 224), Image.Resampling.BICUBIC)),
        "answer": one.answer,
        "words": [
            {
                "text": word.text.strip(),
                "probability": word.probability,
                "map": over(word.patches, 168),
                "elsewhere": max(0.0, 1 - float(word.patches.sum())) if word.patches.sum() > 0 else 0.0,
                "visual_tokens": [
                    float(share) / max(float(word.visual_tokens.max()), 1e-12) for share in word.visual_tokens
                ],
                "shares": [float(share) for share in word.visual_tokens],
            }
            for word in one.words
        ],
        "layers": [
            {
                "number": number,
                "elsewhere": float(elsewhere.mean()),
                "queries": [over(values, 84) for values in maps],
            }
            for number, maps, elsewhere in zip(one.layers, one.queries, one.elsewhere, strict=True)
        ],
    }


def _scaled_size(picture: Image.Image, size: int) -> tuple[int, int]:
    scale = size / max(picture.size)
    return max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
