"""VQA accuracy (Antol et al. 2015, arXiv:1505.00468): agreement of the model's answer with ten people's.

All answers are normalised by the rules at visualqa.org/evaluation. The lists of punctuation and contractions are those
of the challenge's script. Where the script differs from the page, this module follows the page: the script deletes a
mark instead of replacing it by a space in an answer with a space next to such a mark or with a comma inside a number,
and it normalises nothing if all people agree.
"""

import re
from collections.abc import Sequence
from itertools import product


MIN_ANSWERS = 4  # an answer is right if three *other* people gave it

_PUNCTUATION = re.compile(r"""[;/\[\]"{}()=+\\_\-><@`,?!]""")
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
_PERIOD = re.compile(r"\.(?!\d)")  # not a decimal point
_ARTICLES = {"a", "an", "the"}
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())}
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
    why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
"""
# spelling with missing apostrophes -> correct spelling
_MISSPELT = {
    "".join(part + mark for part, mark in zip(word.split("'"), [*marks, ""], strict=True)): word
    for word in _CONTRACTIONS.split()
    for marks in product(["", "'"], repeat=word.count("'"))
}


def normalize_answer(answer: str) -> str:
    """Lower case, numbers to ten as digits, no articles, apostrophes in contractions, no punctuation but `'` and `:`.

    Removes commas inside numbers and periods outside decimals; replaces other marks by a space.
    """
    answer = _PUNCTUATION.sub(" ", _COMMA_IN_NUMBER.sub("", answer.lower()))
    words = [_NUMBERS.get(word, word) for word in _PERIOD.sub("", answer).split()]
    return " ".join(_MISSPELT.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """min(1, people who gave this answer / 3), averaged over leaving out each person once.

    Raises:
        ValueError: fewer than four people's answers, with which no answer can score 1.
    """
    if len(people) < MIN_ANSWERS:
        raise ValueError(f"{len(people)} answers of people; VQA accuracy needs {MIN_ANSWERS} (exact match needs one)")
    answer = normalize_answer(answer)
    gave_it = [normalize_answer(given) == answer for given in people]
    return sum(min(1.0, (sum(gave_it) - left_out) / 3) for left_out in gave_it) / len(people)
