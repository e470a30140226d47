"""Emoji with human-written names, each drawn in three styles, joined by code point.

- google: Noto, flat, 64 px; twitter: Twemoji, flat, 64 px; fluent: Microsoft's 3-D renderings, 256 px. All are RGBA.
- names, groups: emojibase, after Unicode's CLDR.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from .registry import Archive, fetch, read_members


NAMES = Archive(
    registry="npm",
    name="emojibase-data",
    version="17.0.0",
    filename="emojibase-data-17.0.0.tgz",
    sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    licence="MIT",
    content="names, tags and groups of emoji",
)


@dataclass(frozen=True)
class Style:
    """Where a style's pictures are: `path` is the tarball's name for the emoji of the code points `{}`."""

    archive: Archive
    path: str


STYLES = {
    "google": Style(
        Archive(
            registry="npm",
            name="emoji-datasource-google",
            version="16.0.0",
            filename="emoji-datasource-google-16.0.0.tgz",
            sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
            licence="Apache-2.0 (pictures), MIT (package)",
            content="Noto emoji, PNG of 64 px",
        ),
        "package/img/google/64/{}.png",
    ),
    "twitter": Style(
        Archive(
            registry="npm",
            name="emoji-datasource-twitter",
            version="16.0.0",
            filename="emoji-datasource-twitter-16.0.0.tgz",
            sha256="f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
            licence="CC-BY-4.0 (pictures), MIT (package)",
            content="Twemoji, PNG of 64 px",
        ),
        "package/img/twitter/64/{}.png",
    ),
    "fluent": Style(
        Archive(
            registry="npm",
            name="@lobehub/fluent-emoji-3d",
            version="1.1.0",
            filename="lobehub-fluent-emoji-3d-1.1.0.tgz",
            sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
            licence="MIT",
            content="Fluent emoji in 3-D, WebP of 256 px",
        ),
        "package/assets/{}.webp",
    ),
}

JOINER, EMOJI_STYLE, FEMALE, MALE, RIGHTWARDS = "200d", "fe0f", "2640", "2642", "27a1"
# Unicode's separate code points for a man, a woman and a person of one kind, as the one for the person
PERSON, CHILD, OLDER_PERSON = "1f9d1", "1f9d2", "1f9d3"
NEUTRAL = {
    "1f468": PERSON, "1f469": PERSON, "1f466": CHILD, "1f467": CHILD, "1f474": OLDER_PERSON, "1f475": OLDER_PERSON,
    "1f934": "1fac5", "1f478": "1fac5",  # prince, princess: person with crown
    "1f57a": "1f483",  # man dancing, woman dancing
    "1f930": "1fac4", "1fac3": "1fac4",  # pregnant woman, man: person
    "1f385": "1f9d1-1f384", "1f936": "1f9d1-1f384",  # Santa Claus, Mrs. Claus: Mx Claus
    "1f46a": "1f9d1-1f9d2",  # family
    "1f46b": "1f9d1-1f91d", "1f46c": "1f9d1-1f91d", "1f46d": "1f9d1-1f91d",  # two people holding hands
    "1f48f": "1f9d1-2764-1f48b", "1f491": "1f9d1-2764",  # kiss, couple with heart
}  # fmt: skip


@dataclass(frozen=True)
class Emoji:
    """`code`: its code points, such as "1f469-200d-1f373"; `text`: "woman cook"; `concept`: see `concept_of`."""

    code: str
    text: str
    group: str
    concept: str


def read(cache: Path) -> tuple[list[Emoji], dict[str, dict[str, Image.Image]]]:
    """All emoji that have a name, a group and a picture in every style; style -> code -> RGBA picture.

    Leaves out skin tones: emojibase names the emoji without one.
    """
    named = _names(fetch(NAMES, cache))
    cut_outs = {style: _pictures(style, fetch(STYLES[style].archive, cache), named) for style in STYLES}
    return [emoji for code, emoji in named.items() if all(code in cut_outs[style] for style in STYLES)], cut_outs


def plain(code: str) -> str:
    """The code points in lower case without the emoji variation selector, which packages use differently."""
    return "-".join(point for point in code.lower().split("-") if point != EMOJI_STYLE)


def concept_of(code: str) -> str:
    """The one code that variants by sex, number of the same, and direction share: "1f9d1-1f373" for man and woman cook.

    Variants look alike and share words, so a split between them would leak held-out concepts.
    """
    points = plain(code).split("-")
    base = [point for point in points if point not in (JOINER, FEMALE, MALE, RIGHTWARDS)] or points
    return "-".join(dict.fromkeys(part for point in base for part in NEUTRAL.get(point, point).split("-")))


def _names(tarball: Path) -> dict[str, Emoji]:
    names, groups = "package/en/data.json", "package/meta/groups.json"
    content = {name: json.loads(text) for name, text in read_members(tarball, {names, groups}.__contains__)}
    group_names = content[groups]["groups"]  # "0" -> "smileys-emotion"
    entries = [entry for entry in content[names] if "group" in entry]  # regional indicator letters have none
    return {
        code: Emoji(code, entry["label"], group_names[str(entry["group"])], concept_of(code))
        for code, entry in ((plain(entry["hexcode"]), entry) for entry in entries)
    }


def _pictures(style: str, tarball: Path, named: dict[str, Emoji]) -> dict[str, Image.Image]:
    prefix, suffix = STYLES[style].path.split("{}")

    def code_of(name: str) -> str:
        return plain(name.removeprefix(prefix).removesuffix(suffix))

    files = read_members(tarball, lambda name: name.startswith(prefix) and code_of(name) in named)
    return {
        code_of(name): Image.open(io.BytesIO(content)).convert("RGBA")
        for name, content in tqdm(files, desc=f"reading {style} emoji", unit="file")
    }
