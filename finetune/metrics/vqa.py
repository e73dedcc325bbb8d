"""The VQA score (VQAv2, TextVQA, OK-VQA), with the official normalisation of answers.

Source: Antol et al. 2015, "VQA: Visual Question Answering", and the official evaluation code. Its peculiarities are
part of the scores that papers report, and are kept; comments name each.
"""

import re
from collections.abc import Sequence

from finetune.metrics.text_form import composed

FEWEST_ANSWERS = 4
"""With fewer, no leave-one-out set has the three matches of a full score, so that even a right answer scores less."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
# Also removes the period of "3." and of "No. 5": a period is kept only directly before a digit.
_PERIOD = re.compile(r"\.(?!\d)")
# The official code passes the flag re.UNICODE, 32, to `sub` as its count.
_MOST_PERIODS = 32
_ARTICLES = {"a", "an", "the"}
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}

# Restored in words that lack one of the apostrophes. The official list without entries that have no effect: those that
# are their own replacement, and those in capitals, which never match lower-case words.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_RESTORED = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # this one the official list has the wrong way round


def vqa_score(prediction: str, answers: Sequence[str]) -> float:
    """Agreement with the answers of several people: the mean over leave-one-out sets of min(1, matches / 3).

    The prediction is normalised in full. The answers only lose their punctuation, and not even that if all are equal:
    in the official data they are normalised already. So `the cat` never matches the answer `the cat`. All are compared
    in Unicode's form C.

    Args:
        prediction: the reply.
        answers: of several people, ten in the published data.

    Returns:
        A score in [0, 1].

    Raises:
        ValueError: fewer than four answers, with which even a right prediction cannot score 1.
    """
    if isinstance(answers, str) or len(answers) < FEWEST_ANSWERS:
        count = 1 if isinstance(answers, str) else len(answers)
        raise ValueError(
            f"the VQA score needs the answers of at least {FEWEST_ANSWERS} people, not {count}; "
            "for single answers use exact_match or anls"
        )
    given = normalise_vqa_answer(composed(prediction))
    matches = [answer == given for answer in _compared(answers)]
    total = sum(matches)
    return sum(min(1.0, (total - match) / 3) for match in matches) / len(answers)


def can_match(answers: Sequence[str]) -> bool:
    """Whether a reply can match any of the answers: one that is not normalised, such as `Paris`, never matches."""
    return any(answer == normalise_vqa_answer(answer) for answer in _compared(answers))


def _compared(answers: Sequence[str]) -> list[str]:
    """The answers as they are compared with a normalised prediction."""
    given = [composed(answer) for answer in answers]
    return [_without_punctuation(answer) for answer in given] if len(set(given)) > 1 else given


def normalise_vqa_answer(answer: str) -> str:
    """Normalise an answer as the official evaluation does.

    White space and punctuation, then lower case, number words as digits, articles removed, apostrophes restored.
    """
    answer = _without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip())
    words = [_DIGITS.get(word, word) for word in answer.lower().split()]
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """Remove marks that are next to a space, or all if a comma is between digits; replace the others by spaces."""
    kept = text
    has_digit_comma = _DIGIT_COMMA.search(text) is not None
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if beside_space or has_digit_comma else " ")
    return _PERIOD.sub("", kept, count=_MOST_PERIODS)
