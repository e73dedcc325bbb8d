"""Scores of published benchmarks as pure functions: texts, boxes and captions in, numbers out."""

from finetune.metrics.answers import anls, exact_match, relaxed_accuracy
from finetune.metrics.boxes import box_iou, click_accuracy, first_box, grounding_accuracy
from finetune.metrics.choices import choice_letter, multiple_choice_accuracy, read_choice
from finetune.metrics.cider import cider_d
from finetune.metrics.ptb import ptb_tokens
from finetune.metrics.vqa import normalise_vqa_answer, vqa_score

__all__ = [
    "anls",
    "box_iou",
    "choice_letter",
    "cider_d",
    "click_accuracy",
    "exact_match",
    "first_box",
    "grounding_accuracy",
    "multiple_choice_accuracy",
    "normalise_vqa_answer",
    "ptb_tokens",
    "read_choice",
    "relaxed_accuracy",
    "vqa_score",
]
