"""What Qwen-VL's published evaluation scripts do otherwise than these metrics, for scores to be compared with theirs.

Source: `eval_mm` of the public repository QwenLM/Qwen-VL (evaluate_vqa.py, evaluate_grounding.py). Relaxed accuracy
has its difference as an argument, `published_order`.
"""

import re
from collections.abc import Sequence

import numpy as np

from finetune.metrics.boxes import IOU_THRESHOLD

_COORDINATES = 999
# Both points in brackets on one line, with nothing but a comma between them.
_POINTS = re.compile(r"\(([^\n]*?)\),\(([^\n]*?)\)")
_GQA_LEAD_INS = ("is ", "are ", "a ", "an ", "the ")


def published_gqa_answer(answer: str) -> str:
    """The thing that a sentence names, found by letters instead of by words: `banana tree` -> `tree`.

    The text before the first period, comma or exclamation mark, in lower case; then, for each of "is ", "are ", "a ",
    "an ", "the " in turn, what stands between its first and second place; then the text before " of".
    """
    for mark in ".,!":
        answer = answer.split(mark)[0]
    answer = answer.lower()
    for lead_in in _GQA_LEAD_INS:
        if lead_in in answer:
            answer = answer.split(lead_in)[1]
    return answer.split(" of")[0].strip()


def published_box(reply: str, image_size: tuple[int, int]) -> tuple[float, float, float, float] | None:
    """The first box of a reply in pixels, as n / 999 * size; None if its first two points are not four numbers.

    Corners stay in the order in which they are written, and coordinates beyond 999 are kept. The numbers are float32.
    """
    points = _POINTS.search(reply)
    numbers = [number for point in points.groups() for number in point.split(",")] if points else []
    if len(numbers) != 4 or points is None or points[1].count(",") != 1:
        return None
    try:
        corners = [float(number) for number in numbers]
    except ValueError:
        return None
    with np.errstate(over="ignore"):
        scaled = np.array(corners, dtype=np.float32) / np.float32(_COORDINATES)
        x1, y1, x2, y2 = (scaled * np.array([*image_size, *image_size], dtype=np.float32)).tolist()
    return x1, y1, x2, y2


def published_grounding_accuracy(reply: str, gold: Sequence[float], image_size: tuple[int, int]) -> float:
    """1.0 if the first box has an IoU of at least 0.5 with the gold box, computed in float32.

    A box with its corners the wrong way round has no area in common with any other, and is wrong.

    Args:
        reply, image_size: as in `published_box`.
        gold: x1, y1, x2, y2 in pixels.
    """
    found = published_box(reply, image_size)
    if found is None:
        return 0.0
    box, target = np.array(found, dtype=np.float32), np.array(gold, dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = np.maximum(box[:2], target[:2]), np.minimum(box[2:], target[2:])
        shared = np.prod(np.clip(high - low, 0, None))
        union = np.prod(box[2:] - box[:2]) + np.prod(target[2:] - target[:2]) - shared
        return float(bool(shared > 0) and bool(shared / union >= IOU_THRESHOLD))
