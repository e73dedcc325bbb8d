"""The step whose weights are the result of a run."""

from collections.abc import Mapping
from typing import Any

from finetune.run.checkpoints import step_of


def saved_step(run: Mapping[str, Any]) -> int | None:
    """The step of the best checkpoint, which is the result, by run.json; None where the result is the last step's."""
    best = run.get("best_checkpoint")
    return step_of(best) if isinstance(best, str) else None
