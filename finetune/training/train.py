"""A training run, from recipe to report."""

import contextlib
from pathlib import Path

from finetune.recipe import Recipe
from finetune.run.folder import RunFolder
from finetune.run.launch import is_main_process
from finetune.run.left_out import LeftOut
from finetune.run.log_file import RunLog, run_log
from finetune.run.meeting import meeting_of
from finetune.terminal import Say, say, say_nothing
from finetune.training.extension import FollowLongerSchedule, pending
from finetune.training.folder_of_run import take_over_result
from finetune.training.interrupts import StopOnSignal
from finetune.training.model_record import record_of_run
from finetune.training.opened_run import open_run
from finetune.training.parallel import own_launch, refuse_impossible, require_applied, settle_parallel
from finetune.training.phases import Phases
from finetune.training.processes import closing_process_group
from finetune.training.progress import Progress
from finetune.training.result import report_result, save_result
from finetune.training.run_record import (
    begin_record,
    finish_record,
    record_failure,
    say_new_masters,
)
from finetune.training.sample_replies import reply_to_samples
from finetune.training.start import Finished, Fresh, Resume
from finetune.training.trackers import trackers_in
from finetune.training.trained_model import load_trained_model
from finetune.training.trainer_setup import OwnOptimizer, encode_images, make_trainer
from finetune.training.training_plan import plan_training, settle_arguments


def train(recipe: Recipe, say: Say = say, optimizer: OwnOptimizer | None = None, *, extend: bool = False) -> Path:
    """Train as the recipe says, or resume a run that was interrupted.

    Args:
        recipe: the resolved recipe.
        say: prints a line; called by the main process of a distributed run only.
        optimizer: makes an optimizer for the model, in place of the one that `train.optim` names and with the same
            schedule; for an optimizer that has no name there.
        extend: make the run in the output folder longer, by the recipe's epochs or steps.

    Returns:
        The run folder.

    Raises:
        InputError: the input is wrong; the message says what to do.
        RunLocked: another process holds the run folder.
        Interrupted: SIGTERM or SIGINT; the state is saved if training had begun.
        Failed: a conversation does not fit into the memory, or the loss is not finite.
    """
    is_main = is_main_process()
    if not is_main:
        say = say_nothing
    parallel = settle_parallel(recipe.train, own_launch())
    refuse_impossible(recipe, parallel)
    run = RunFolder(Path(recipe.output))
    with contextlib.ExitStack() as stack:
        log = RunLog()
        meeting = stack.enter_context(meeting_of("train"))
        if is_main:
            log = stack.enter_context(run_log())
            say = log.heard(say)
            stack.enter_context(run.lock())
        stack.enter_context(trackers_in(run.path))
        stack.enter_context(closing_process_group())
        stop = stack.enter_context(StopOnSignal())
        phases = Phases("read")

        opened = open_run(recipe, parallel, run, meeting, stack, say, extend=extend)
        recipe, run, start, data = opened.recipe, opened.run, opened.start, opened.data
        if isinstance(start, Finished):
            say(
                "finished",
                f"{run.path} is finished: its result and report are there. To train again, give another output",
            )
            return run.path
        if is_main:
            log.open(run.log_file)
        phases.go_on_after((opened.before or {}).get("phases"))
        phases.begin("load")
        plan = plan_training(opened, say)
        # This opens the process group of a distributed run, whose processes load and encode images together.
        arguments = settle_arguments(opened, plan, say, own_optimizer=optimizer is not None)
        require_applied(parallel, arguments)
        trained = load_trained_model(opened, plan.switches, arguments, say)
        say_new_masters(opened, trained, say)
        if is_main:
            stack.enter_context(record_failure(run, phases))
            begin_record(opened, plan.switches, trained)
        record = None
        if opened.base_identity is not None:
            record = record_of_run(recipe, opened.base, opened.base_identity, data.checked["train"])
        left_out = LeftOut(run.path, recipe.data.on_bad_row, resumes=opened.resumes)
        cache = encode_images(opened, trained, phases, left_out, say)
        progress = Progress(checkpoints=run.checkpoints, log=log.write if is_main else None)
        trainer = make_trainer(
            opened,
            plan,
            trained,
            arguments,
            cache,
            record,
            left_out,
            stop=stop,
            progress=progress,
            phases=phases,
            optimizer=optimizer,
        )

        if isinstance(start, Resume) and pending(start.extensions, start.step):
            trainer.add_callback(FollowLongerSchedule(say))
        if isinstance(start, Fresh):
            reply_to_samples(trainer, recipe, run, data, phases, "before", is_main=is_main)
        try:
            trainer.train(resume_from_checkpoint=str(start.checkpoint) if isinstance(start, Resume) else None)
        finally:
            progress.close()
        stop.raise_if_received()
        if trainer.takes_over_result:
            take_over_result(trainer)

        phases.begin("save")
        result = save_result(trainer, run, opened.base, record, is_main=is_main)
        reply_to_samples(trainer, recipe, run, data, phases, "after", is_main=is_main)
        trainer.gather_left_out()
        amounts = trainer.throughput.totals()
        if is_main:
            finish_record(
                run,
                phases,
                steps=trainer.state.global_step,
                trained=amounts,
                left_out=left_out.counts(),
                best_checkpoint=trainer.state.best_model_checkpoint if arguments.load_best_model_at_end else None,
            )
            report_result(trainer, run, result, data.task, amounts, phases.seconds, say)
    return run.path
