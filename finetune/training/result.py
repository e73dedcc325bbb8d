"""The result of a run: the adapter or the model, the report, and the lines at the end."""

from pathlib import Path

from peft import PeftModel

from finetune.evaluation.task_evaluation import TaskEvaluation, score_line
from finetune.files.checkpoint_folder import complete_trained_folder
from finetune.model.adapters import write_plain_config
from finetune.model.base import Base
from finetune.report.report import write_report
from finetune.run.checkpoints import writing
from finetune.run.folder import RunFolder
from finetune.run.left_out import LEFT_OUT, describe_left_out
from finetune.terminal import Say
from finetune.training.best_checkpoint import describe_ties, metric_key
from finetune.training.run_record import PARTS
from finetune.training.sharded_model import gather
from finetune.training.summary import summary
from finetune.training.throughput import Amounts
from finetune.training.trainer import QwenVLTrainer
from finetune.training.zero import gather_from_zero
from qwenvl.checkpoint.record import ModelRecord, write_record


def save_result(
    trainer: QwenVLTrainer,
    run: RunFolder,
    base: Base,
    record: ModelRecord | None,
    *,
    is_main: bool,
) -> Path:
    """Write the adapter in PEFT's format; or, trained in full, the whole checkpoint. The record is beside either.

    Returns:
        Its folder.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    is_adapter = isinstance(model, PeftModel)
    result = run.adapter if is_adapter else run.path / "model"
    # Of a model that processes share, each has a part; what is saved is the same.
    values = None
    if trainer.accelerator.is_fsdp2:
        values = gather(model, is_main=is_main, trained_only=is_adapter, rounds_to=trainer.rounds_to)
    elif trainer.is_deepspeed_enabled:
        values = gather_from_zero(model, is_main=is_main, trained_only=is_adapter)
    if is_main:
        with writing(result) as partial, trainer.computing():  # masters are rounded once, here or as gathered
            model.save_pretrained(partial, state_dict=values)
            assert record is not None, "the main process reads the base"
            write_record(partial, record)
            if is_adapter:
                write_plain_config(partial)
            else:
                base.processor.save_pretrained(partial)
                complete_trained_folder(partial, base.path, trainer.rounds_to or model.dtype)
    trainer.accelerator.wait_for_everyone()
    return result


def report_result(
    trainer: QwenVLTrainer,
    run: RunFolder,
    result: Path,
    task: TaskEvaluation | None,
    trained: Amounts,
    seconds: float,
    say: Say,
) -> None:
    """Write the report, and print the result of the run and what can be done next.

    Args:
        trained, seconds: of all parts of the run.
    """
    report = write_report(run.path)
    history = trainer.state.log_history
    facts = run.read_run() or {}
    lines = summary(
        history if task is None else task.without_scores(history),
        wall_seconds=seconds,
        run=run.path,
        parts=facts.get(PARTS, 1),
        tokens=trained.tokens,
        images=trained.images,
        supervised=trained.supervised,
        saved_step=trainer.state.best_global_step if trainer.args.load_best_model_at_end else None,
    )
    for label, text in lines.items():
        say(label, text)
    if said := describe_left_out(facts["rows"], trainer.left_out.counts()):
        say("left out", f"{'; '.join(said)}: {run.path / LEFT_OUT} lists them")
    if task is not None:
        say(*score_line(facts["score"]))
    is_adapter = result == run.adapter
    say("adapter" if is_adapter else "model", f"{result}{_of_which_step(trainer)}")
    say("report", report)
    say("Next:")
    say("  look", "open the report in a browser")
    say("  use", f"finetune chat {run.path} --image IMAGE")
    if is_adapter:
        say("  merge", f"finetune merge {run.path} --to MODEL")
    say("  go on", "copy the recipe, put your own data and checkpoint in, and run it the same way")


def _of_which_step(trainer: QwenVLTrainer) -> str:
    """`, of step 800: the best eval_anls, tied with step 400: the later`; empty for the last step, tied with none."""
    state, arguments = trainer.state, trainer.args
    best, metric = state.best_global_step, arguments.metric_for_best_model
    if not arguments.load_best_model_at_end or best is None or metric is None:
        return ""
    ties = describe_ties(state.log_history, best, metric_key(metric))
    if best == state.global_step and not ties:
        return ""
    return f", of step {best}: the best {metric_key(metric)}{ties}"
