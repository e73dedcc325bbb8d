"""What the model replies before and after the training: a task's score, or some replies to look at."""

from typing import Literal

from finetune.data.shown_rows import shown_samples
from finetune.evaluation.predictions import write_predictions
from finetune.recipe import Recipe
from finetune.run.folder import RunFolder
from finetune.training.phases import Phases
from finetune.training.run_record import record_score
from finetune.training.trainer import QwenVLTrainer
from finetune.training.training_data import TrainingData


def reply_to_samples(
    trainer: QwenVLTrainer,
    recipe: Recipe,
    run: RunFolder,
    data: TrainingData,
    phases: Phases,
    when: Literal["before", "after"],
    *,
    is_main: bool,
) -> None:
    """Score the task, or reply to the first evaluation samples, on all processes together.

    Does nothing where the recipe has no evaluation. The score before training is logged as step 0.
    """
    evaluate = recipe.evaluate
    if evaluate is None:
        return
    phases.begin("evaluate")
    with trainer.computing():
        if data.task is not None:
            assert trainer.task_scorer is not None, "a run with a task has its scorer"
            score = trainer.task_scorer.score_of(trainer)
            if when == "before":
                trainer.log(score.metrics())
            if is_main:
                record_score(run, score, when)
                data.task.write_predictions(score, evaluate.predictions, run.path, when)
        elif evaluate.predictions:
            write_predictions(
                trainer.accelerator.unwrap_model(trainer.model),
                trainer.collators["eval"],
                shown_samples(data.samples["eval"], data.checked["eval"], evaluate.predictions),
                trainer.accelerator,
                run=run.path,
                when=when,
                max_new_tokens=evaluate.max_new_tokens,
            )
    trainer.accelerator.wait_for_everyone()
