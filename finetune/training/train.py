"""A training run, from recipe to report."""

import contextlib
import os
from pathlib import Path

from finetune.files.base_identity import identify
from finetune.model.base import embeddings_by_auto, find_base
from finetune.model.computing import choose_backends
from finetune.recipe import Recipe
from finetune.run.folder import RunFolder
from finetune.run.left_out import LeftOut
from finetune.run.log_file import RunLog, run_log
from finetune.terminal import Say, say, say_nothing
from finetune.training.arguments import trainer_arguments
from finetune.training.interrupts import StopOnSignal
from finetune.training.model_record import record_of_run
from finetune.training.phases import Phases
from finetune.training.processes import closing_process_group
from finetune.training.progress import Progress
from finetune.training.result import report_result, save_result
from finetune.training.run_record import EACH_EPOCH, WEIGHTS, begin_record, finish_record, record_failure
from finetune.training.sample_replies import reply_to_samples
from finetune.training.start import Finished, Fresh, Resume, find_start, run_identity
from finetune.training.trackers import trackers_in
from finetune.training.trained_model import load_trained_model
from finetune.training.trainer_setup import OwnOptimizer, encode_images, make_trainer
from finetune.training.training_data import data_as_it_was, find_places, read_data
from finetune.training.training_plan import plan_training


def train(recipe: Recipe, say: Say = say, optimizer: OwnOptimizer | None = None) -> Path:
    """Train as the recipe says, or resume a run that was interrupted.

    Args:
        recipe: the resolved recipe.
        say: prints a line; called by the main process of a distributed run only.
        optimizer: makes an optimizer for the model, in place of the one that `train.optim` names and with the same
            schedule; for an optimizer that has no name there.

    Returns:
        The run folder.

    Raises:
        InputError: the input is wrong; the message says what to do.
        RunLocked: another process holds the run folder.
        Interrupted: SIGTERM or SIGINT; the state is saved if training had begun.
        Failed: a conversation does not fit into the memory, or the loss is not finite.
    """
    is_main = os.environ.get("RANK", "0") == "0"
    if not is_main:
        say = say_nothing
    run = RunFolder(Path(recipe.output))
    with contextlib.ExitStack() as stack:
        log = RunLog()
        if is_main:
            log = stack.enter_context(run_log())
            say = log.heard(say)
            stack.enter_context(run.lock())
        stack.enter_context(trackers_in(run.path))
        stack.enter_context(closing_process_group())
        stop = stack.enter_context(StopOnSignal())
        phases = Phases("read")

        base = find_base(recipe.model)
        computing = choose_backends(recipe.model)
        say("model", f"{recipe.model.path}: {computing}{base.taken_for}")
        data = read_data(recipe, base.processor, say, show_progress=is_main, seq_length=base.seq_length)

        # Only now, with the data known to be right: for a hub id this downloads the weights.
        # All of it is read, by one process of each machine.
        reads_base = is_main or os.environ.get("LOCAL_RANK", "0") == "0"
        base_identity = identify(base.path, page_cache=True) if reads_base else None
        identity = run_identity(recipe, data.samples, base_identity, embeddings_by_auto(recipe, base))
        stored = run.read_run()
        places = find_places(data, identity["data"], run, stored)
        start = find_start(run, recipe, identity, stored, say, is_main=is_main, aligned=places.aligned)
        if isinstance(start, Finished):
            say(
                "finished",
                f"{run.path} is finished: its result and report are there. To train again, give another output",
            )
            return run.path

        if is_main:
            log.open(run.log_file)
        resumes = isinstance(start, Resume)
        if resumes:
            data = data_as_it_was(data, places)
            phases.go_on_after((stored or {}).get("phases"))
            if stored is not None and stored.get(WEIGHTS) != EACH_EPOCH:
                # The run began before each epoch had its own draw.
                if data.checked["train"].epochs(recipe.seed) is not None:
                    say(
                        "weights",
                        "this run drew its samples once for all epochs when it began, and goes on with those",
                    )
                data = data.drawn_once()
        phases.begin("load")
        plan = plan_training(recipe, base.path, data.checked["train"], stored, say)
        trained = load_trained_model(recipe, base, computing, plan.switches, data.checked["train"], say)
        if is_main:
            score_so_far = stored.get("score") if stored is not None and isinstance(start, Resume) else None
            stack.enter_context(record_failure(run, phases))
            begin_record(
                run,
                recipe,
                identity,
                base,
                data,
                places.then if resumes else places.now,  # of a run that goes on: as they were when it began
                plan.switches,
                trained,
                score_so_far,
                before=stored if resumes else None,
                mended={name: part.mended for name, part in places.aligned.items()},
            )
        record = None
        if base_identity is not None:
            record = record_of_run(recipe, base, base_identity, data.checked["train"])
        # This opens the process group of a distributed run, whose processes encode images together.
        arguments = trainer_arguments(recipe, plan.switches, None if data.task is None else data.task.key)
        left_out = LeftOut(run.path, recipe.data.on_bad_row, resumes=resumes)
        cache = encode_images(recipe, base, data, trained, phases, left_out, say)
        progress = Progress(checkpoints=run.checkpoints, log=log.write if is_main else None)
        trainer = make_trainer(
            recipe,
            run,
            base,
            data,
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
            is_main=is_main,
        )

        if isinstance(start, Fresh):
            reply_to_samples(trainer, recipe, run, data, phases, "before", is_main=is_main)
        try:
            trainer.train(resume_from_checkpoint=str(start.checkpoint) if isinstance(start, Resume) else None)
        finally:
            progress.close()
        stop.raise_if_received()

        phases.begin("save")
        result = save_result(trainer, run, base, record, is_main=is_main)
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
                best_checkpoint=trainer.state.best_model_checkpoint,
            )
            report_result(trainer, run, result, data.task, amounts, phases.seconds, say)
    return run.path
