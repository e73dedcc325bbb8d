"""What `run.json` says of a training run, from its start to its end."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

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
from finetune.terminal import Say
from finetune.training.phases import Phases
from finetune.training.step_samples import STEP, StepSamples
from finetune.training.trained_model import TrainedModel
from finetune.training.training_data import PLACES, TrainingData

WEIGHTS = "weights"
"""Key of run.json: whether samples are drawn by the weights of their sources in each epoch or once for all."""
EACH_EPOCH, ONCE = "each epoch", "once"

MASTERS = "masters"
"""Key of run.json: the dtype of trained weights that are computed in 16 bits."""


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
    step_samples: StepSamples,
    *,
    resumes: bool = False,
    mended: Mapping[str, Collection[int]] = MappingProxyType({}),
) -> None:
    """Write recipe.yaml, run.json and the list of rows left out, when the run is ready to train.

    Args:
        places: of the rows when the run began; empty for a run that an older version began.
        score: of the parts of the run before this one; None of a new run.
        step_samples: of this part of the run.
        resumes: the run goes on: samples that it has left out before stay in the list.
        mended: of each part of the data, the samples that were left out before and are others now.
    """
    run.write_recipe(recipe.to_yaml())
    if places and not resumes:
        # Before run.json, which says that it is there.
        with writing_file(run.rows_file) as partial:
            save_places(partial, dict(places))
    run.write_run(
        {
            "status": "running",
            "started": _now(),
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
            STEP: step_samples.to_json(),
            SWITCHES: {"optim": switches.optim},
            **({MASTERS: "float32"} if trained.has_masters else {}),
            **({"score": dict(score)} if score else {}),
        }
    )
    left_out = [line for checked in data.checked.values() for line in lines_left_out(checked)]
    if resumes:
        left_out += lines_of_before(run.path / LEFT_OUT, mended)
    write_text(run.path / LEFT_OUT, "".join(left_out))


def say_new_masters(stored: Mapping[str, Any] | None, trained: TrainedModel, say: Say) -> None:
    """Say of a run that goes on that it had no float32 masters when it began, with an older version.

    Args:
        stored: run.json, as it was before this part of the run.
    """
    if trained.has_masters and MASTERS not in (stored or {}):
        say(
            "masters",
            "this run trained its 16-bit weights themselves when it began, which loses small updates; from here on it "
            "trains them in float32. To train all of it so, give another output",
        )


@contextmanager
def record_failure(run: RunFolder, phases: Phases) -> Iterator[None]:
    """Note in run.json that a run was interrupted or failed."""
    try:
        yield
    except BaseException as error:
        status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
        with suppress(UserError, OSError):  # the error itself is more important than the note, on a full disk say
            run.update_run({"status": status, "phases": phases.record()})
        raise


def record_score(run: RunFolder, score: TaskScore, when: str) -> None:
    """Add the task's score `before` or `after` the training."""
    so_far = (run.read_run() or {}).get("score", {})
    run.update_run({"score": score.added_to(so_far, when)})


def finish_record(
    run: RunFolder,
    phases: Phases,
    *,
    seconds: float,
    steps: int,
    left_out: Mapping[str, int],
    best_checkpoint: str | None,
) -> None:
    """Note that the run is finished: its result is there.

    Args:
        left_out: samples of each part of the data that were met and could not be read.
    """
    run.update_run(
        {
            "status": "finished",
            "finished": _now(),
            "wall_seconds": round(seconds, 1),
            "phases": phases.record(),
            "steps": steps,
            "left_out": dict(left_out),
            "best_checkpoint": best_checkpoint,
        }
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
