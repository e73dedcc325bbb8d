"""What `run.json` says of a training run, from its start to its end."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.data.places import Places, save_places
from finetune.data.summary import count_rows, lines_left_out
from finetune.errors import Interrupted, UserError
from finetune.evaluation.task_evaluation import TaskScore
from finetune.files.atomic_writes import write_text, writing_file
from finetune.memory.run_plan import SWITCHES
from finetune.memory.switches import Switches
from finetune.model.base import Base
from finetune.recipe import Recipe
from finetune.run.environment import describe_environment
from finetune.run.folder import RunFolder
from finetune.run.left_out import LEFT_OUT, lines_of_before
from finetune.training.phases import Phases
from finetune.training.throughput import Amounts
from finetune.training.trained_model import TrainedModel
from finetune.training.training_data import PLACES, TrainingData

WEIGHTS = "weights"
"""Key of run.json: whether samples are drawn by the weights of their sources in each epoch or once for all."""
EACH_EPOCH, ONCE = "each epoch", "once"

PARTS = "parts"
"""Key of run.json: into how many parts interruptions have cut the run."""

TRAINED_ON = "trained_on"
"""Key of run.json: tokens, images and supervised tokens that the run was trained on."""

SO_FAR = ("wall_seconds", "phases")
"""Keys of run.json that go on from the parts of a run before."""


def begin_record(
    run: RunFolder,
    recipe: Recipe,
    identity: Mapping[str, Any],
    base: Base,
    data: TrainingData,
    places: Mapping[str, Places],
    switches: Switches,
    trained: TrainedModel,
    score: Mapping[str, Any] | None,
    *,
    before: Mapping[str, Any] | None = None,
    mended: Mapping[str, Collection[int]] = MappingProxyType({}),
) -> None:
    """Write recipe.yaml, run.json and the list of rows left out, when the run is ready to train.

    Args:
        places: of the rows when the run began; empty for a run that an older version began.
        score: of the parts of the run before this one; None of a new run.
        before: run.json of the parts of the run before this one, whose samples that were left out stay in the list.
            None for a new run.
        mended: of each part of the data, the samples that were left out before and are others now.
    """
    run.write_recipe(recipe.to_yaml())
    if places and before is None:
        # Before run.json, which says that it is there.
        with writing_file(run.rows_file) as partial:
            save_places(partial, dict(places))
    run.write_run(
        {
            "status": "running",
            "started": _now() if before is None else before.get("started", _now()),
            **({} if before is None else {key: before[key] for key in SO_FAR if key in before}),
            PARTS: 1 if before is None else before.get(PARTS, 1) + 1,
            "model": recipe.model.path,
            "quantized": list(base.quantized),
            "identity": dict(identity),
            "environment": describe_environment(),
            "parameters": {
                name: {"trained": count.trained, "total": count.total} for name, count in trained.parameters.items()
            },
            "rows": {name: count_rows(checked) for name, checked in data.checked.items()},
            "notes": list(trained.notes),
            WEIGHTS: EACH_EPOCH if data.checked["train"].redraws else ONCE,
            PLACES: bool(places),
            SWITCHES: {"optim": switches.optim},
            **({"score": dict(score)} if score else {}),
        }
    )
    left_out = [line for checked in data.checked.values() for line in lines_left_out(checked)]
    if before is not None:
        left_out += lines_of_before(run.path / LEFT_OUT, mended)
    write_text(run.path / LEFT_OUT, "".join(left_out))


@contextmanager
def record_failure(run: RunFolder, phases: Phases) -> Iterator[None]:
    """Note in run.json that a run was interrupted or failed."""
    try:
        yield
    except BaseException as error:
        status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
        with suppress(UserError, OSError):  # the error itself is more important than the note, on a full disk say
            run.update_run({"status": status, **_times(phases)})
        raise


class NoteTimes(TrainerCallback):
    """Notes the seconds of a run at each checkpoint: those of a part that is killed count up to there."""

    def __init__(self, run: RunFolder, phases: Phases):
        self.run, self.phases = run, phases

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.run.update_run(_times(self.phases))


def _times(phases: Phases) -> dict[str, Any]:
    return {"wall_seconds": round(phases.seconds, 1), "phases": phases.record()}


def record_score(run: RunFolder, score: TaskScore, when: str) -> None:
    """Add the task's score `before` or `after` the training."""
    so_far = (run.read_run() or {}).get("score", {})
    run.update_run({"score": score.added_to(so_far, when)})


def finish_record(
    run: RunFolder,
    phases: Phases,
    *,
    steps: int,
    trained: Amounts,
    left_out: Mapping[str, int],
    best_checkpoint: str | None,
) -> None:
    """Note that the run is finished: its result is there.

    Args:
        trained: what it was trained on.
        left_out: samples of each part of the data that were met and could not be read.
    """
    run.update_run(
        {
            "status": "finished",
            "finished": _now(),
            **_times(phases),
            "steps": steps,
            TRAINED_ON: trained.as_json(),
            "left_out": dict(left_out),
            "best_checkpoint": best_checkpoint,
        }
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
