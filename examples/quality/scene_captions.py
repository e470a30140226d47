"""Captions of scenes: the concepts, the grammar, and the parser of captions and of answers like them.

a cat left of a pizza
two cats above a pizza and three stars to the right
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


# emojibase's names of things that a passer-by would name alike, and that look different from each other
CONCEPTS = (
    "airplane", "anchor", "avocado", "balloon", "banana", "basketball", "bell", "bicycle", "birthday cake", "bus",
    "butterfly", "cactus", "camel", "carrot", "cat", "chair", "cow", "crab", "croissant", "crown", "dog", "doughnut",
    "duck", "elephant", "frog", "guitar", "hamburger", "hammer", "helicopter", "horse", "key", "lemon", "light bulb",
    "mushroom", "octopus", "owl", "palm tree", "panda", "penguin", "pig", "pineapple", "pizza", "rabbit", "rainbow",
    "rocket", "rose", "sailboat", "snail", "snowman", "soccer ball", "star", "strawberry", "sunflower", "teddy bear",
    "tractor", "trophy", "turtle", "umbrella", "watermelon", "whale",
)  # fmt: skip
COUNTS = ("a", "two", "three")
LEFT, ABOVE = "left of", "above"
Relation = tuple[str, str, str]  # (first, LEFT or ABOVE, second): the first is left of, or above, the second
# direction of one object from another -> the relation of the two, and whether the other one is its first
DIRECTIONS = {"left": (LEFT, False), "right": (LEFT, True), "above": (ABOVE, False), "below": (ABOVE, True)}
IRREGULAR = {"snowman": "snowmen"}

# what stands between the objects of a caption; its group is the direction, None for "and" and punctuation
_BETWEEN = re.compile(r"\b(?:(?:to|on) the )?(left|right|above|below)(?: of)?\b|\band\b|[,;.\n]")
_NUMBERS = {"a": 1, "an": 1, "the": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5}


@dataclass(frozen=True)
class Scene:
    """What is in a picture, or what an answer says: the objects by name with their counts, and their relations.

    In a picture every two objects have one relation. An answer can leave relations out, can contradict itself, and can
    name what is no concept; a count of 0 is one that it does not say.
    """

    objects: dict[str, int]
    relations: frozenset[Relation]


def plural(name: str) -> str:
    """ "cats", "strawberries", "buses"."""
    if name in IRREGULAR:
        return IRREGULAR[name]
    if name.endswith("y") and name[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}es" if name.endswith(("s", "x", "ch", "sh")) else f"{name}s"


_SINGULAR = {plural(name): name for name in CONCEPTS}


def phrase(name: str, count: int) -> str:
    """ "a cat", "an owl", "two owls"."""
    if count == 1:
        return f"an {name}" if name[0] in "aeiou" else f"a {name}"
    return f"{COUNTS[count - 1]} {plural(name)}"


def caption(groups: Sequence[tuple[str, int]], relation: str, place: str | None = None) -> str:
    """The caption of two or three groups of one concept each.

    Args:
        groups: (name, count); the first is left of, or above, the second.
        relation: LEFT or ABOVE.
        place: the direction of the third group from both others.
    """
    first, second, *third = [phrase(*group) for group in groups]
    text = f"{first} {relation} {second}"
    if not third:
        return text
    return f"{text} and {third[0]} {place if place in (ABOVE, 'below') else f'to the {place}'}"


def relation_of(one: str, direction: str, other: str) -> Relation:
    """The relation of `one`, which is in this direction from `other`; "b right of a" is "a left of b"."""
    relation, swapped = DIRECTIONS[direction]
    return (other, relation, one) if swapped else (one, relation, other)


def parse(text: str) -> Scene:
    """What a caption says, or an answer, which may be malformed.

    Objects are what stands between directions, "and" and punctuation; what is no concept is an object too. One that is
    named twice has the sum of its counts. A direction between two objects is the relation of these two; one that no
    object follows is the relation to all objects before.
    """
    parts = _BETWEEN.split(text.lower())  # objects, and the directions between them
    objects, directions = [_object(part) for part in parts[::2]], [*parts[1::2], None]
    counts: Counter[str] = Counter()
    relations = set()
    for number, (found, direction) in enumerate(zip(objects, directions, strict=True)):
        if found is None:
            continue
        name, count = found
        if direction is not None:
            following = objects[number + 1]
            others = list(counts) if following is None else [following[0]]
            relations |= {relation_of(name, direction, other) for other in others if other != name}
        counts[name] += count
    return Scene(dict(counts), frozenset(relations))


def _object(part: str) -> tuple[str, int] | None:
    """Name and count, 0 if it is not said, of a part such as "two cats"; None if it has no name."""
    count, words = 0, re.findall(r"[^\W_]+", part)
    if words and (words[0] in _NUMBERS or words[0].isdecimal()):
        number = words.pop(0)
        count = _NUMBERS[number] if number in _NUMBERS else int(number)
    name = " ".join(words)
    return (_SINGULAR.get(name, name), count) if name else None
