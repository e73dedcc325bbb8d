"""A reply against the answers of its question: ANLS, relaxed accuracy, exact match.

Texts are compared in Unicode's form C (`text_form`), which the published scripts leave to the data.
"""

import math
from collections.abc import Sequence

from finetune.metrics.text_form import composed

ANLS_THRESHOLD = 0.5
"""Smaller similarities count as 0; exactly this one counts."""
RELATIVE_TOLERANCE = 0.05
"""Of relaxed accuracy, relative to the gold value."""


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity (ANLS) of one question (DocVQA, InfographicVQA).

    The maximum over the answers of 1 - distance / length, or 0 if that is below 0.5. The distance is between the texts
    in lower case with white space collapsed; the length is that of the longer text as given. So surplus white space
    costs little, as in the published script.

    Source: Biten et al. 2019, "Scene Text Visual Question Answering"; details follow the published DocVQA script.

    Returns:
        A score in [0, 1].

    Raises:
        ValueError: there is no answer.
    """
    _need_answers(answers)
    reply = composed(prediction)
    similarity = max(1 - _normalised_distance(reply, composed(answer)) for answer in answers)
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def relaxed_accuracy(prediction: str, gold: str, published_order: bool = False) -> float:
    """1.0 if the prediction is within 5 % of the gold number, or equals the gold text up to letter case (ChartQA).

    `12%` is the number 0.12. A gold value of zero has no 5 % and is compared as text: `0.0` is wrong for `0`.

    Source: Masry et al. 2022, "ChartQA", section 5.1, after Methani et al. 2020.

    Args:
        prediction, gold: surrounding white space is ignored.
        published_order: swap the two, as Qwen-VL's published script does: the 5 % are then relative to the prediction,
            and 56 is right for 53.2 (5.26 % off). As there, white space around the gold text counts.
    """
    measured, reference = composed(prediction).strip(), composed(gold)
    if published_order:
        measured, reference = reference, measured
    else:
        reference = reference.strip()
    value, target = as_number(measured), as_number(reference)
    if value is not None and target:
        return float(abs(value - target) / abs(target) <= RELATIVE_TOLERANCE)
    return float(measured.lower() == reference.lower())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction is one of the answers, up to letter case and surrounding white space.

    Raises:
        ValueError: there is no answer.
    """
    _need_answers(answers)
    reply = composed(prediction).strip().lower()
    return float(reply in {composed(answer).strip().lower() for answer in answers})


def _need_answers(answers: Sequence[str]) -> None:
    if isinstance(answers, str) or not answers:
        raise ValueError(f"answers must be a list of at least one text, not {answers!r}")


def _normalised_distance(a: str, b: str) -> float:
    length = max(len(a), len(b))
    distance = edit_distance(" ".join(a.lower().split()), " ".join(b.lower().split()))
    # Lower case may be longer ("İ"), so the quotient can exceed 1.
    return min(distance / length, 1.0) if length else 0.0


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the fewest characters inserted, deleted or replaced to turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]


def as_number(text: str) -> float | None:
    """The text as relaxed accuracy reads it: a number, with percent signs at the end a hundredth of it, else None."""
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
