"""TRL's trainer, stopped anywhere and going on as if it had not been; see `resumption`."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from finetune.run.folder import RunFolder
from finetune.training.best_checkpoint import metric_key, step_is_best
from finetune.training.interrupts import Abandoned, StopOnSignal
from finetune.training.resumption import Resumption
from finetune.training.save_times import SaveInTime
from finetune.training.step_in_packs import StepInPacks
from finetune.training.throughput import Throughput
from finetune.training.zero_trainer import ZeroTrainer


class ResumableTrainer(ZeroTrainer):
    """A signal abandons the step or the evaluation that is under way, and saves the state after the last whole step.

    Attributes:
        run: the folder that checkpoints are written to.
        throughput: counts what is trained on.
        step_in_packs: the current step; None between two.
        stop, saves: the callbacks of these kinds, or such that nothing tells anything.
    """

    run: RunFolder
    throughput: Throughput
    step_in_packs: StepInPacks | None
    _supervised: torch.Tensor | int  # tokens of all processes since the last log

    def obey(self, callbacks: Sequence[TrainerCallback]) -> None:
        """Called when the trainer is made, with its own callbacks."""
        self.stop = next((one for one in callbacks if isinstance(one, StopOnSignal)), None) or StopOnSignal()
        self.saves = next((one for one in callbacks if isinstance(one, SaveInTime)), None) or SaveInTime(None)
        self.resumption = Resumption(self)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self.resumption.resume_from(kwargs.get("resume_from_checkpoint"))
        try:
            return super()._inner_training_loop(*args, **kwargs)
        except Abandoned:
            self.resumption.leave()
            self.is_in_train = False
            return TrainOutput(self.state.global_step, float("nan"), {})

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        self.resumption.begin()
        # Transformers looks only after the next micro-batch.
        return None if self.control.should_training_stop else super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self.resumption.begin()  # where no epoch was left
        self.stop.abandon_if_received()
        return super()._finalize_training(*args, **kwargs)

    def agree_on_the_step(self) -> None:
        """After each micro-batch: abandon the step in all processes if any has a signal, and hear whether the main
        process wishes to save."""
        (wishes,) = self.stop.agree(self.saves.wishes() if self.args.process_index == 0 else 0)
        self.saves.heard(wishes)
        if self.stop.agreed:
            raise Abandoned

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        with self.resumption.after_step():
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.resumption.owing_evaluation():
            return super()._evaluate(*args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As the base class's, which keeps the first of equal ones; see `best_checkpoint.is_new_best`."""
        metric = self.args.metric_for_best_model
        if metric is None or metric_key(metric) not in metrics:
            return super()._determine_best_metric(metrics, trial)
        is_best = step_is_best(self.args, self.state)
        if is_best:
            self.state.best_metric, self.state.best_global_step = metrics[metric_key(metric)], self.state.global_step
        return is_best
