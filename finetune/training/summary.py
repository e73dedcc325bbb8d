"""The lines at the end of a run, from the trainer's log."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.quantities import format_bytes, format_count, format_duration, format_loss, is_number
from finetune.report.logged_scores import parts_of_scores


def summary(
    log_history: Sequence[Mapping[str, Any]],
    *,
    wall_seconds: float,
    run: str | os.PathLike,
    parts: int = 1,
    tokens: int | None = None,
    images: int | None = None,
    supervised: int | None = None,
    saved_step: int | None = None,
) -> dict[str, str]:
    """The lines at the end of a run: label -> text. What is not known has no line.

        steps       1000 in 2h 04m
        trained on  12.3M tokens (1.8M supervised), 48.2k images
        loss        2.3104 -> 0.8412
        eval loss   1.4210 -> 0.9876 at step 800 (best), 0.9912 at the end
        eval anls   0.4120 -> 0.7831
        peak memory 5.3 GB
        run         runs/docvqa

    Args:
        log_history: the trainer's (`state.log_history`): dicts as `Progress` reads them, with `step`.
        wall_seconds: of all parts of the run.
        run: the run folder.
        parts: into which interruptions have cut the run.
        tokens: trained on, all of them.
        images: seen, repetitions counted.
        supervised: tokens in the loss; None takes those that were logged.
        saved_step: whose weights are the result, where it is not the last; its scores are stated too.
    """
    series: dict[str, list[tuple[int, float]]] = {}
    for record in log_history:
        for key, value in record.items():
            if is_number(value):
                series.setdefault(key, []).append((record.get("step", 0), value))
    steps = max((step for step, _ in series.get("step", [])), default=0)
    in_parts = f", in {parts} parts" if parts > 1 else ""
    lines = {"steps": f"{steps} in {format_duration(wall_seconds)}{in_parts}"}
    if supervised is None:
        supervised = int(sum(value for _, value in series.get("supervised_tokens", [])))
    amounts = []
    if tokens is not None:
        amounts.append(
            f"{format_count(tokens)} tokens" + (f" ({format_count(supervised)} supervised)" if supervised else "")
        )
    elif supervised:
        amounts.append(f"{format_count(supervised)} supervised tokens")
    if images is not None:
        amounts.append(f"{format_count(images)} images")
    if amounts:
        lines["trained on"] = ", ".join(amounts)
    if "loss" in series:
        lines["loss"] = _first_to_last(series["loss"])
    if "eval_loss" in series:
        text, saved = _first_to_best(series["eval_loss"]), _of_saved(series["eval_loss"], saved_step)
        lines["eval loss"] = text if f" at step {saved_step} (best)" in text else text + saved
        if any(count for _, count in series.get("eval_long_samples", [])):
            lines["eval loss"] += "; with stretched positions beyond seq_length, which training does without"
    for key, own in parts_of_scores(series).items():
        if key != "eval_loss":
            each = ", ".join(f"{name} {_first_to_last(series[part])}" for part, name in own.items())
            text = _first_to_last(series[key]) + (f" ({each})" if each else "")
            lines[key.replace("_", " ")] = text + _of_saved(series[key], saved_step)
    if "peak_memory_bytes" in series:
        lines["peak memory"] = format_bytes(max(value for _, value in series["peak_memory_bytes"]))
    lines["run"] = os.fspath(run)
    return lines


def _first_to_last(values: list[tuple[int, float]]) -> str:
    return " -> ".join(format_loss(value) for _, value in (values if len(values) == 1 else [values[0], values[-1]]))


def _first_to_best(values: list[tuple[int, float]]) -> str:
    """The first loss, the lowest, and the last if it is another; of pairs (step, loss)."""
    finite = [(step, value) for step, value in values if math.isfinite(value)]
    if len(values) == 1 or not finite:
        return _first_to_last(values)
    best_step, best = min(finite, key=lambda pair: pair[1])
    text = f"{format_loss(values[0][1])} -> {format_loss(best)} at step {best_step} (best)"
    return text if values[-1][0] == best_step else f"{text}, {format_loss(values[-1][1])} at the end"


def _of_saved(values: list[tuple[int, float]], saved_step: int | None) -> str:
    """`, 0.4120 at step 800, which is saved`; empty where that is the last one."""
    if saved_step is None or values[-1][0] == saved_step:
        return ""
    saved = [value for step, value in values if step == saved_step]
    return f", {format_loss(saved[-1])} at step {saved_step}, which is saved" if saved else ""
