"""What `run.json` says of a training run, from its start to its end."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.data.places import save_places
from finetune.data.summary import count_rows, lines_left_out, note_on_long
from finetune.errors import Interrupted, UserError
from finetune.evaluation.task_evaluation import TaskScore
from finetune.files.atomic_writes import write_text, writing_file
from finetune.memory.run_plan import SWITCHES
from finetune.memory.switches import Switches
from finetune.run.environment import describe_environment
from finetune.run.folder import RunFolder
from finetune.run.launch import launched_processes
from finetune.run.left_out import LEFT_OUT, lines_of_before
from finetune.terminal import Say
from finetune.training.extension import EXTENSIONS
from finetune.training.opened_run import OpenedRun
from finetune.training.phases import Phases
from finetune.training.start import Resume
from finetune.training.step_samples import STEP, StepSamples
from finetune.training.throughput import Amounts
from finetune.training.trained_model import TrainedModel
from finetune.training.training_data import EACH_EPOCH, ONCE, PLACES, WEIGHTS, TrainingData

MASTERS = "masters"
"""Key of run.json: the dtype of trained weights that are computed in 16 bits."""
PARTS = "parts"
"""Key of run.json: into how many parts interruptions have cut the run."""

TRAINED_ON = "trained_on"
"""Key of run.json: tokens, images and supervised tokens that the run was trained on."""

SO_FAR = ("wall_seconds", "phases")
"""Keys of run.json that go on from the parts of a run before."""


def begin_record(opened: OpenedRun, switches: Switches, trained: TrainedModel) -> None:
    """Write recipe.yaml, run.json and the list of rows left out, when the run is ready to train."""
    run, data, before, start = opened.run, opened.data, opened.before, opened.start
    run.write_recipe(opened.recipe.to_yaml())
    # Of a run that goes on: as they were when it began; none where an older version began it.
    places = opened.places.then if opened.resumes else opened.places.now
    if places and before is None:
        # Before run.json, which says that it is there.
        with writing_file(run.rows_file) as partial:
            save_places(partial, dict(places))
    score = {} if before is None else before.get("score")
    extensions = start.extensions if isinstance(start, Resume) else ()
    run.write_run(
        {
            "status": "running",
            "started": _now() if before is None else before.get("started", _now()),
            **({} if before is None else {key: before[key] for key in SO_FAR if key in before}),
            PARTS: 1 if before is None else before.get(PARTS, 1) + 1,
            "model": opened.recipe.model.path,
            "quantized": list(opened.base.quantized),
            "identity": dict(opened.identity),
            "environment": describe_environment(),
            "parameters": {
                name: {"trained": count.trained, "total": count.total} for name, count in trained.parameters.items()
            },
            "rows": {name: count_rows(checked) for name, checked in data.checked.items()},
            "notes": [*trained.notes, *notes_on_long(data, opened.base.seq_length)],
            WEIGHTS: EACH_EPOCH if data.checked["train"].redraws else ONCE,
            PLACES: bool(places),
            STEP: StepSamples.of(opened.stepped, launched_processes()).to_json(),
            SWITCHES: {"optim": switches.optim},
            **({MASTERS: "float32"} if trained.has_masters else {}),
            **({"score": dict(score)} if score else {}),
            **({EXTENSIONS: list(extensions)} if extensions else {}),
        }
    )
    left_out = [line for checked in data.checked.values() for line in lines_left_out(checked)]
    if before is not None:
        mended = {name: part.mended for name, part in opened.places.aligned.items()}
        left_out += lines_of_before(run.path / LEFT_OUT, mended)
    write_text(run.path / LEFT_OUT, "".join(left_out))


def say_new_masters(opened: OpenedRun, trained: TrainedModel, say: Say) -> None:
    """Say of a run that goes on that it had no float32 masters when it began, with an older version."""
    if opened.resumes and trained.has_masters and MASTERS not in (opened.stored or {}):
        say(
            "masters",
            "this run trained its 16-bit weights themselves when it began, which loses small updates; from here on it "
            "trains them in float32. To train all of it so, give another output",
        )


def notes_on_long(data: TrainingData, seq_length: int) -> list[str]:
    """For readers of the evaluation's loss: it is not the training objective on samples beyond `seq_length`."""
    note = note_on_long(data.checked["eval"], seq_length) if "eval" in data.checked else ""
    return [note] if note else []


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
        best_checkpoint: whose weights are the result; None where they are the last step's.
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
